"""Fixtures from the cheapest on: vocabulary, tiny checkpoint, run, classifier, app."""

import json
import os
from pathlib import Path

import hypothesis
import numpy as np
import pytest

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import bertflask

SHARED = Path(os.environ.get("BERTFLASK_TEST_DATA", "../shared")).resolve()

hypothesis.settings.register_profile("bertflask", deadline=None)
hypothesis.settings.load_profile("bertflask")

WORDS = (
    "the a cat cats dog dog s sat on mat red green blue python java list sort class "
    "error how do i in what is ? ! . , ' caf ##e ##s ##ing ##ed na ##ive 1 2 ##3"
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "needs_shared" in item.keywords and not SHARED.is_dir():
        pytest.skip(f"{SHARED} is missing; BERTFLASK_TEST_DATA names another folder")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """CI sets BERTFLASK_REQUIRE_DATA=1: there a test that is skipped has failed."""
    report = yield
    if os.environ.get("BERTFLASK_REQUIRE_DATA") == "1" and report.skipped:
        report.outcome, report.longrepr = "failed", f"skipped: {report.longrepr[2]}"
    return report


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of the larger test data; for tests marked `needs_shared`."""
    return SHARED


@pytest.fixture(scope="session")
def vocab() -> list[str]:
    letters = [p + c for c in "abcdefghijklmnopqrstuvwxyz" for p in ("", "##")]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split(), *letters]
    assert pieces.index("[PAD]") == 0
    return list(dict.fromkeys(pieces))


TINY_CONFIG = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 24,
    "initializer_range": 0.3,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "type_vocab_size": 2,
}


def google_name(name: str, model_type: str) -> str:
    """The name of a variable in Google's checkpoint, as bert-for-tf2 maps it."""
    import bert

    name = f"bert/{name}"  # both functions below give None for the pooler
    if model_type == "albert":
        return bert.loader_albert.map_to_tfhub_albert_variable_name(name) or name
    return bert.loader.map_to_stock_variable_name(name) or name


def write_google_checkpoint(folder: Path, prefix: str) -> None:
    """Adds a checkpoint with random weights to a folder with a configuration."""
    tf = bertflask._tensorflow()
    model = bertflask.build_model(folder, n_labels=2, load_weights=False)
    stored = {
        google_name(name, model.config["model_type"]): variable.numpy()
        for name, variable in model.variables.items()
        if not name.startswith("classifier/")
    }
    rng = np.random.default_rng(0)
    for name, array in stored.items():
        if not name.endswith("gamma"):
            stored[name] = rng.normal(0, 0.2, array.shape).astype(np.float32)
    names = list(stored)
    tf.raw_ops.SaveV2(
        prefix=str(folder / prefix),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[stored[name] for name in names],
    )


@pytest.fixture(scope="session")
def tiny_bert_dir(vocab, tmp_path_factory) -> Path:
    """A random BERT of two layers in Google's layout."""
    folder = tmp_path_factory.mktemp("bert") / "tiny_bert"
    folder.mkdir()
    config = {**TINY_CONFIG, "vocab_size": len(vocab)}
    (folder / "bert_config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    write_google_checkpoint(folder, "bert_model.ckpt")
    return folder


@pytest.fixture(scope="session")
def tiny_albert_dir(tmp_path_factory) -> Path:
    """A random ALBERT of three layers in Google's layout, SentencePiece included."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("albert") / "tiny_albert"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS.replace("##", "")] * 20),
        model_prefix=str(folder / "30k-clean"),
        vocab_size=50,
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        control_symbols=["[CLS]", "[SEP]", "[MASK]"],
        minloglevel=2,
    )
    (folder / "30k-clean.vocab").unlink()
    config = {**TINY_CONFIG, "vocab_size": 50, "embedding_size": 16}
    config |= {"num_hidden_layers": 3, "hidden_dropout_prob": 0.0}
    (folder / "albert_config.json").write_text(json.dumps(config))
    write_google_checkpoint(folder, "model.ckpt-best")
    return folder


def tiny_examples(n_rows: int = 60) -> bertflask.Examples:
    """Texts whose label is plain from one word."""
    rng = np.random.default_rng(1)
    words, labels = ["cat", "python", "red"], ["animal", "code", "colour"]
    texts, found = [], []
    for row in range(n_rows):
        rest = rng.choice(
            ["the", "a", "how", "do", "i", "sort", "mat"], rng.integers(1, 9)
        )
        texts.append(" ".join([*rest, words[row % 3], str(row)]))
        found.append(labels[row % 3])
    return bertflask.Examples(texts, found)


@pytest.fixture(scope="session")
def examples() -> bertflask.Examples:
    return tiny_examples()


@pytest.fixture(scope="session")
def tiny_models_dir(tiny_bert_dir, examples, tmp_path_factory) -> Path:
    """A models folder with one finished run on the tiny BERT."""
    models_dir = tmp_path_factory.mktemp("models")
    config = bertflask.TrainConfig(
        model_name=str(tiny_bert_dir),
        batch_size=8,
        n_epochs=12,
        max_seq_len=16,
        max_learn_rate=5e-3,
        min_learn_rate=1e-3,
        models_dir=str(models_dir),
    )
    bertflask.train(config, examples)
    return models_dir


def latest_run(models_dir: Path) -> Path:
    """The run that is served."""
    latest = json.loads((models_dir / bertflask.LATEST).read_text())
    return models_dir / latest["model_dir"]


@pytest.fixture(scope="session")
def run_dir(tiny_models_dir) -> Path:
    return latest_run(tiny_models_dir)


@pytest.fixture(scope="session")
def classifier(run_dir) -> bertflask.Classifier:
    return bertflask.Classifier.load(run_dir)


@pytest.fixture
def app(classifier):
    app = bertflask.create_app(classifier)
    app.testing = True
    return app


@pytest.fixture
def client(app):
    return app.test_client()
