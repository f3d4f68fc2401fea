"""Measures bertflask on this machine: its server, its bulk speed, its endurance.

    python bench.py serve         # side by side with what users would pick instead
    python bench.py bulk          # as a share of the machine's own matrix products
    python bench.py large         # the server with 12 layers of 768
    python bench.py int8 RUN CSV  # what integers would gain and lose
    python bench.py train         # side by side with other ways to train
    python bench.py endurance     # three times the load that it can take, and worse

`int8` and `endurance` apart, they need the larger test data (BERTFLASK_TEST_DATA);
`serve` and `train` compare with peers in an environment of their own (PEERS_PYTHON).
Models are kept in MODELS_DIR. The heads that are served and the large model are as
good as random, on which speed does not depend; the answer cache is off.

The rooms, each under a banner `# ===`: 1 runs and texts, 2 servers, 3 serve and large,
4 bulk and int8, 5 training, 6 endurance.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import http.client
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

import bertflask

# === 1. Runs and texts: main, random_run, large_checkpoint, read_texts ===

MODELS_DIR = Path(os.environ.get("MODELS_DIR", "models")).resolve()
DATA_DIR = Path(os.environ.get("BERTFLASK_TEST_DATA", "../shared")).resolve()
PEERS_PYTHON = os.environ.get("PEERS_PYTHON", ".peers/bin/python")
N_LABELS, MAX_SEQ_LEN = 77, 192  # as in BANKING77, and as the peers take it
DATASETS = ("banking77", "stackoverflow")
_SECONDS = click.option("--seconds", default=10.0, help="of each measurement")
_ROUNDS = click.option("--rounds", default=3, help="of which the median is shown")


@click.group(context_settings={"show_default": True})
def main() -> None:
    """Measure bertflask on this machine."""


def checkpoint() -> Path:
    """The checkpoint that all servers share, fetched the first time."""
    return bertflask.fetch_pretrained("minilm_L-6_H-384_A-12", MODELS_DIR)


def random_run(checkpoint_dir: Path, seed: int = 0) -> Path:
    """A run with a head that has learned nothing; made once for a bertflask.py."""
    folder = MODELS_DIR / "bench" / f"{checkpoint_dir.name}-{seed}"
    own_dir = folder / bertflask._digest(Path(bertflask.__file__))[:8]
    if not (own_dir / bertflask.LATEST).exists():
        shutil.rmtree(folder, ignore_errors=True)  # of another bertflask.py
        labels = [f"label {i:02}" for i in range(N_LABELS)]
        given = {"max_seq_len": MAX_SEQ_LEN, "seed": seed, "models_dir": str(own_dir)}
        given |= {"n_epochs": 1, "test_size": 0, "validation_size": 0}
        config = bertflask.TrainConfig(str(checkpoint_dir), **given)
        bertflask.train(config, bertflask.Examples(labels, labels))
    return next(own_dir.glob("trained/*"))


def large_checkpoint() -> Path:
    """A random checkpoint of 12 layers of 768 with the small one's vocabulary."""
    from safetensors.numpy import save_file

    small_dir, folder = checkpoint(), MODELS_DIR / "bench" / "large"
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(small_dir / "vocab.txt", folder)
        config = json.loads((small_dir / "config.json").read_text())
        config |= {"num_hidden_layers": 12, "num_attention_heads": 12}
        config |= {"hidden_size": 768, "intermediate_size": 3072}
        (folder / "config.json").write_text(json.dumps(config))
        model = bertflask.build_model(folder, 2, load_weights=False)
        weights = {name: value.numpy() for name, value in model.variables.items()}
        # Hugging Face keeps kernels the other way round
        weights |= {k: v.T.copy() for k, v in weights.items() if k.endswith("kernel")}
        save_file(weights, folder / "model.safetensors")
    return folder


def read_texts(dataset: str, *parts: str) -> list[str]:
    """The texts of these parts, `train` or `test`, of a data set."""
    if not DATA_DIR.is_dir():
        words = f"{DATA_DIR} is missing; BERTFLASK_TEST_DATA names another folder"
        raise click.ClickException(words)
    paths = [DATA_DIR / "data" / dataset / f"{part}.csv" for part in parts]
    return [text for path in paths for text in bertflask.read_examples(path).texts]


# === 2. Servers: Server, ask ===

_START_S, _STOP_S = 180.0, 60.0
_GOOD = {"x": ["a text"]}


def ask(port: int, path: str, body: Any = None) -> tuple[int, str]:
    """Status and body of one answer; OSError or HTTPException if there is none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        method, data = ("POST", json.dumps(body)) if body else ("GET", None)
        connection.request(method, path, data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


class Server:
    """A server on a port of loopback, in a process group of its own, until it stops."""

    def __init__(self, *command: str | Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [*map(str, command), "--port", str(self.port)]
        # so that none looks on the internet for the checkpoint that it has
        options = {"env": os.environ | {"HF_HUB_OFFLINE": "1"}}
        with tempfile.TemporaryFile() as log:
            began = time.perf_counter()
            options |= {"stdout": log, "stderr": log, "start_new_session": True}
            self.process = subprocess.Popen(command, **options)
            while not self._answers():
                time.sleep(0.01)
                self.ready_s = time.perf_counter() - began
                if self.process.poll() is not None or self.ready_s > _START_S:
                    self.stop()
                    log.seek(0)
                    words = log.read().decode(errors="replace")[-2000:]
                    raise click.ClickException(f"{command} does not answer: {words}")
            self.ready_s = time.perf_counter() - began

    def _answers(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return ask(self.port, "/predict", _GOOD)[0] == 200
        return False

    def memory(self, kind: str) -> float:
        """MB of all its processes together: VmRSS is now, VmHWM was the most."""
        found = 0
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # that process has ended meanwhile
                group = (folder / "stat").read_text().rpartition(")")[2].split()[2]
                if int(group) == self.process.pid:
                    status = (folder / "status").read_text()
                    found += sum(map(int, re.findall(rf"{kind}:\s+(\d+) kB", status)))
        return found / 1024

    def stop(self) -> int | None:
        """Ends it with SIGTERM; gives its exit code, or None if that did not do."""
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.terminate()
            code = self.process.wait(_STOP_S)
        with contextlib.suppress(ProcessLookupError):  # workers may outlive it
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return code

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def serve_command(*flags: str | Path) -> list[str | Path]:
    """The command line of bertflask's server."""
    return [sys.executable, Path(bertflask.__file__), "serve", *flags]


# === 3. Serve and large: bench_serve, bench_large ===

PEERS = {  # and what they import
    "hf_train": "torch, transformers, accelerate, sklearn",
    "hf_server": "torch, transformers, fastapi, uvicorn",
    "ort_server": "torch, transformers, onnx, onnxscript, onnxruntime, litserve",
}
CLIENTS, MORE_CLIENTS = (1, 16, 64), (128, 256)  # more: for bertflask alone


def peer_command(name: str, *flags: str | Path) -> dict[str, list[str | Path]]:
    """The peer's command under its name; nothing if its environment is missing."""
    python, modules = shlex.quote(PEERS_PYTHON), PEERS[name]
    if subprocess.getstatusoutput(f"{python} -c 'import {modules}'")[0]:
        words = f"{name} is left out: {PEERS_PYTHON} cannot import {modules}"
        click.echo(words, err=True)
        return {}
    path = DATA_DIR / "peers" / f"{name}.py"
    return {name: [PEERS_PYTHON, path, checkpoint(), *flags]}


@contextlib.contextmanager
def _loader(seconds: float) -> Iterator[Callable]:
    """A function that loads a server with a data set's test texts; gives figures."""

    def load(server: Server, dataset: str, n_clients: int) -> dict[str, float]:
        path = Path(folder, f"{dataset}.csv")
        flags = f"--clients {n_clients} --seconds {seconds} --warmup {min(2, seconds)}"
        where = f"http://127.0.0.1:{server.port}"
        command = [sys.executable, DATA_DIR / "peers" / "load.py", where, path]
        output = subprocess.check_output([*command, *flags.split()], text=True)
        click.echo(f"{dataset}: {output.strip()}", err=True)
        found = {key: value or 0.0 for key, value in json.loads(output).items()}
        # it counts what both began and ended in its time, so it misses one latency
        share = max(0.1, 1 - found["p50_ms"] / 1000 / seconds)
        found["steady_per_s"] = found["requests_per_s"] / share
        statuses = found["statuses"] or {}
        found["failures"] = sum(n for x, n in statuses.items() if x != "200")
        keys = ("requests_per_s", "steady_per_s", "p50_ms", "p99_ms", "failures")
        return {f"{dataset}, {n_clients} clients: {k}": found[k] for k in keys}

    with tempfile.TemporaryDirectory() as folder:
        for dataset in DATASETS:  # whose columns have several names, load.py's one
            rows = [["text"], *([x] for x in read_texts(dataset, "test"))]
            with Path(folder, f"{dataset}.csv").open(
                "w", -1, "utf-8", newline=""
            ) as file:
                csv.writer(file).writerows(rows)
        yield load


@main.command("serve")
@_SECONDS
@_ROUNDS
def bench_serve(seconds: float, rounds: int) -> None:
    """Start and load all servers in turn, and print one table of medians."""
    run_dir = random_run(checkpoint())
    commands = {"bertflask": serve_command("--run", run_dir, "--cache-size", "0")}
    for name in ("hf_server", "ort_server"):
        flags = ["--labels", str(N_LABELS), "--max-seq-len", str(MAX_SEQ_LEN)]
        commands |= peer_command(name, *flags)
    found: dict = {name: [] for name in commands}  # by server, figures of each round
    with _loader(seconds) as load:
        for _, name in itertools.product(range(rounds), commands):
            clients = CLIENTS + MORE_CLIENTS * (name == "bertflask")
            found[name].append(_round(load, commands[name], clients))
    click.echo("\n".join([*_table(found), *_after_peak(found["bertflask"])]))


def _round(load: Callable, command: list, clients: tuple) -> dict[str, float]:
    with Server(*command) as server:
        figures = {"start to first answer: s": server.ready_s}
        for case in itertools.product(DATASETS, clients):
            figures |= load(server, *case)
        return figures | {"peak memory: MB": server.memory("VmHWM")}


def _median(rounds: list[dict], figure: str) -> float:
    return statistics.median(figures.get(figure, math.nan) for figures in rounds)


def _table(found: dict[str, list[dict]]) -> Iterator[str]:
    """A line a figure: all servers, then the first one's ratio to each other one."""
    heads = [*found, *(f"/ {name}" for name in [*found][1:])]
    yield f"{'':<44}" + "".join(f"{head:>13}" for head in heads)
    for figure in found["bertflask"][0]:
        values = [_median(rounds, figure) for rounds in found.values()]
        values += [values[0] / x if x else math.nan for x in values[1:]]
        cells = ("-" if math.isnan(x) else f"{x:.2f}" for x in values)
        yield f"{figure:<44}" + "".join(f"{cell:>13}" for cell in cells)


def _after_peak(rounds: list[dict]) -> Iterator[str]:
    """How far throughput falls when there are more clients than it needs."""
    for dataset in DATASETS:
        head, counts = f"{dataset}, {{}} clients: steady_per_s", CLIENTS + MORE_CLIENTS
        rates = [_median(rounds, head.format(n)) for n in counts]
        share = min(rates[rates.index(max(rates)) :]) / (max(rates) or 1)
        yield f"{dataset}: from its peak on, throughput is at least {share:.2f} of it"


@main.command("large")
@_SECONDS
@_ROUNDS
def bench_large(seconds: float, rounds: int) -> None:
    """Load a model of 12 layers of 768 with 16 clients."""
    run_dir = random_run(large_checkpoint())
    command = serve_command("--run", run_dir, "--cache-size", "0")
    with _loader(seconds) as load, Server(*command) as server:
        for dataset in DATASETS:
            found = [load(server, dataset, 16) for _ in range(rounds)]
            for figure in found[0]:
                click.echo(f"12 x 768, {figure}: {_median(found, figure):.2f}")


# === 4. Bulk and int8: bench_bulk, bench_int8 ===


def multiply_adds(config: dict, n_tokens: int) -> int:
    """Those that a text needs: no padding, and only [CLS] in the last layer."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]

    def layer(n: int) -> int:  # for n of its tokens, which attend to all
        keys_values, attention = 2 * n_tokens * hidden**2, 2 * n * n_tokens * hidden
        return keys_values + attention + 2 * n * hidden * (hidden + inner)

    head = hidden * (hidden + N_LABELS)
    return (config["num_hidden_layers"] - 1) * layer(n_tokens) + layer(1) + head


def _product_rate(seconds: float) -> float:
    """Multiply-adds a second of large float32 matrix products."""
    n, n_done = 2048, 0
    matrix, product = np.random.default_rng(0).random((2, n, n), np.float32)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        np.matmul(matrix, matrix, product)
        n_done += 1
    return n_done * n**3 / (time.perf_counter() - began)


@main.command("bulk")
@click.option("--n-texts", default=10_000, help="from all data sets, mixed")
@_SECONDS
@_ROUNDS
def bench_bulk(n_texts: int, seconds: float, rounds: int) -> None:
    """Compare Classifier.probabilities with matrix products, by turns."""
    found = [read_texts(name, "train", "test") for name in DATASETS]
    texts = random.Random(0).sample([*itertools.chain(*found)], n_texts)
    run_dir, shares = random_run(checkpoint()), []
    config = bertflask.read_config(checkpoint())
    token_ids, _ = bertflask.Classifier.load(run_dir).encode(texts)
    needed = sum(multiply_adds(config, len(ids)) for ids in token_ids)
    for _ in range(rounds):
        classifier = bertflask.Classifier.load(run_dir)  # which remembers no words yet
        before, began = _product_rate(seconds / 2), time.perf_counter()
        classifier.probabilities(texts)
        rate = needed / (time.perf_counter() - began)
        alone = (before + _product_rate(seconds / 2)) / 2
        shares.append(rate / alone)
        words = f"{n_texts * rate / needed:.1f} texts/s, {rate / 1e9:.1f} of"
        click.echo(f"{words} {alone / 1e9:.1f} G multiply-adds/s", err=True)
    click.echo(f"bulk: {statistics.median(shares):.3f} of the matrix-product rate")


@main.command("int8")
@click.argument("run_dir", type=Path)
@click.argument("data", type=Path)
@_ROUNDS
def bench_int8(run_dir: Path, data: Path, rounds: int) -> None:
    """Compare RUN_DIR with itself in 8-bit integers on DATA: accuracy and texts/s."""
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import quantize_dynamic

    examples, plain = bertflask.read_examples(data), bertflask.Classifier.load(run_dir)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        # reduced, since processors without VNNI saturate
        options = {"reduce_range": True, "extra_options": {"DefaultTensorType": 1}}
        quantize_dynamic(run_dir / path.name, path, **options)  # 1: float32
        click.echo(f"{path.stat().st_size / 2**20:.0f} MB")
        session = InferenceSession(path, providers=["CPUExecutionProvider"])
    rates: dict = {"float32": [], "int8": []}
    models = dict(zip(rates, (plain, dataclasses.replace(plain, session=session))))
    for _, (name, model) in itertools.product(range(rounds), models.items()):
        began = time.perf_counter()
        found = model.probabilities(examples.texts).argmax(-1)
        rates[name].append(len(found) / (time.perf_counter() - began))
        right = np.array(model.labels)[found] == np.array(examples.labels)
        words = f"{name}: accuracy {right.mean():.4f}"
        click.echo(f"{words}, {statistics.median(rates[name]):.1f} texts/s")


# === 5. Training: bench_train ===


@main.command("train")
@click.option("--dataset", "datasets", default=DATASETS, multiple=True)
@click.option("--epochs", default=3, help="of both")
@click.option("--lr", default=1e-4, help="highest learning rate of the Trainer")
@_ROUNDS
def bench_train(datasets: tuple, epochs: int, lr: float, rounds: int) -> None:
    """Train beside Hugging Face's Trainer and the recipe of 2020, a seed each round."""
    found: dict = {}
    for seed, name in itertools.product(range(rounds), datasets):
        for peer, command in _train_commands(name, epochs, lr, seed).items():
            figures = {f"{name}: {k}": v for k, v in _run_alone(command).items()}
            click.echo(f"{peer}, seed {seed}: {figures}", err=True)
            found.setdefault(peer, {}).setdefault(seed, {}).update(figures)
    table = _table({peer: [*seeds.values()] for peer, seeds in found.items()})
    click.echo("\n".join(table))


def _train_commands(dataset: str, epochs: int, lr: float, seed: int) -> dict:
    train, test = (DATA_DIR / "data" / dataset / f"{x}.csv" for x in ("train", "test"))
    command = [sys.executable, bertflask.__file__, "train", train, "--test", test]
    command += ["--model-name", checkpoint(), "--models-dir"]
    command += [MODELS_DIR / "bench" / "train"]  # not among those that are served
    flags = f"--validation-size 0 --n-epochs {epochs} --batch-size 32 --seed {seed}"
    commands = {"bertflask": [*command, *flags.split()]}
    flags = f"--epochs {epochs} --batch-size 32 --lr {lr} --seed {seed}"
    commands |= peer_command("hf_train", train, test, *flags.split())
    if seed == 0:
        path = DATA_DIR / "peers" / "recipe2020.py"
        recipe = [sys.executable, path, checkpoint(), train, "--limit", "128"]
        commands["recipe2020"] = recipe
    return commands


def _run_alone(command: list) -> dict[str, float]:
    """The figures of a process's last line, and the memory that it used at most."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*map(str, command)], stdout=output, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise click.ClickException(f"exit code {process.returncode}: {command}")
        output.seek(0)
        found = json.loads(output.read().splitlines()[-1])
    found.pop("run_dir", None)
    return found | {"peak memory: MB": usage.ru_maxrss / 1024}


# === 6. Endurance: bench_endurance ===

_TOLERANCE = 1e-5  # of probabilities, between a batch of one and any other
# Of memory, to the last third of the time from the first, which warms up, and from the
# second. The least is of one model: the old one goes when its answers are given, which
# the deadline ends before the next reload.
_GROWTH = {min: (1.25, 1.1), max: (math.inf, 1.1)}
_N_CLIENTS, _N_WAITING, _N_TEXTS = 500, 256, 500
_RELOAD_S, _DEADLINE_S, _SAMPLE_S, _CAPACITY_S = 4, 2, 0.25, 5.0
_LATE, _REFUSALS = "X-Request-Deadline-Ms", (429, 503, 504)  # that good input may meet
_BAD = (  # method, path, body and headers that must be refused
    ("POST", "/predict", b'{"x": "no list"}'),
    ("POST", "/predict", b'{"x": []}'),
    ("POST", "/predict", b'{"x": [1, null]}'),
    ("POST", "/predict", b'{"x": ["a text"], "top_k": 0}'),
    ("POST", "/predict", b'{"x": ["a text"], "top_k": NaN}'),
    ("POST", "/predict", b'{"x": [%s""]}' % (b'"",' * 1000)),
    ("POST", "/predict", b"[" * 100_000),
    ("POST", "/predict", b'{"x": ["a text"]}', {_LATE: "soon"}),
    ("POST", "/nowhere", b'{"x": ["a text"]}'),
    ("DELETE", "/predict"),
)


def _bad_request(rng: random.Random) -> tuple:
    whole = json.dumps(_GOOD).encode()
    noise = rng.randbytes(rng.randint(0, 2000)), whole[: rng.randrange(len(whole))]
    return rng.choice([*_BAD, *(("POST", "/predict", body) for body in noise)])


def _good_request(texts: list[str], rng: random.Random) -> tuple:
    headers = {_LATE: str(rng.randint(0, 2000))} if rng.random() < 0.05 else {}
    return "POST", "/predict", json.dumps({"x": texts, "top_k": 3}), headers


class Traffic:
    """Requests of many clients to a server; every answer is checked."""

    def __init__(self, port: int, expected: dict) -> None:
        self.port, self.expected = port, expected  # by model, text and label
        self.texts = [*next(iter(expected.values()))]
        self.seen, self.wrong = Counter(), Counter()  # statuses and models; problems
        self.lock = threading.Lock()

    def start(
        self, n_clients: int, seconds: float, rate: float, bad: float
    ) -> Callable[[], None]:
        """Sends `rate` requests/s, a share of them `bad`; gives what waits for it."""
        began = time.monotonic()
        # a client that is late takes the next time, so that the rate is kept
        times = (began + i / rate for i in itertools.count())
        args = (times, began + seconds, bad)
        make = functools.partial(threading.Thread, target=self._client, daemon=True)
        threads = [make(args=(*args, random.Random(i))) for i in range(n_clients)]
        for thread in threads:
            thread.start()
        return lambda: [thread.join() for thread in threads]

    def _client(self, times: Iterator, end: float, bad: float, rng: Any) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=90)
        while time.monotonic() < end:
            with self.lock:
                at = next(times)
            time.sleep(max(0.0, min(at, end) - time.monotonic()))
            if at < end:
                self._send(connection, bad, rng)
        connection.close()

    def _send(self, connection: Any, bad: float, rng: random.Random) -> None:
        texts = [] if rng.random() < bad else rng.sample(self.texts, 2)
        request = _good_request(texts, rng) if texts else _bad_request(rng)
        try:
            connection.request(*request)
            if rng.random() < bad / 10:
                self._note("left")
                connection.close()
            else:
                answer = connection.getresponse()
                self._check(texts, answer.status, answer.read())
        except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
            self._note("lost", f"no answer or another shape: {error!r}")
            connection.close()

    def _check(self, texts: list[str], status: int, body: bytes) -> None:
        problem = ""
        if status == 200 and texts:
            answer = json.loads(body)
            self._note(answer["model"])
            rows, expected = answer["top_k"], self.expected[answer["model"]]
            found = zip(
                rows, map(expected.get, texts), answer["predictions"], strict=True
            )
            off = max(_off(*one) for one in found)
            problem = f"{off:.2g} off" if off > _TOLERANCE else ""
        elif status not in (_REFUSALS if texts else range(400, 500)):
            problem = f"{status} to {'good' if texts else 'bad'} input: {body[:200]}"
        self._note(str(status), problem)

    def _note(self, what: str, problem: str = "") -> None:
        with self.lock:
            self.seen[what] += 1
            self.wrong += Counter([problem] * bool(problem))


def _off(row: list[dict], expected: dict[str, float], label: str) -> float:
    """The largest error in the answer to a text, whose order counts too."""
    if label != row[0]["label"]:
        return math.inf
    best = sorted(expected.values(), reverse=True)
    ranks = ((x["probability"], expected[x["label"]], y) for x, y in zip(row, best))
    return max(max(rank) - min(rank) for rank in ranks)


def _expected(run_dirs: list[Path]) -> dict:
    """Probabilities by model, text and label, each from a batch of one."""
    texts, found = bertflask.load_examples("docstrings").texts, {}
    for classifier in map(bertflask.Classifier.load, run_dirs):
        rows = found[classifier.name] = {}
        for text in random.Random(0).sample(texts, _N_TEXTS):
            row = classifier.probabilities([text])[0].tolist()
            rows[text] = dict(zip(classifier.labels, row))
    return found


def _never_reads(port: int) -> socket.socket:
    """A client that asks for more than fits on the way, and reads none of it."""
    client = socket.socket()
    client.settimeout(_START_S)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    body = json.dumps({"x": [str(i) for i in range(1000)], "top_k": N_LABELS})
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
    client.sendall(f"{head}\r\n\r\n{body}".encode())
    client.recv(1, socket.MSG_PEEK)  # before the queue is full
    return client


@main.command("endurance")
@click.option("--seconds", default=60, help="of the overload")
def bench_endurance(seconds: int) -> None:
    """Overload a server that gets bad input and new models; fail if anything is off."""
    run_dirs = [random_run(checkpoint(), seed) for seed in (0, 1)]
    expected, runs = _expected(run_dirs), itertools.cycle(run_dirs)
    with tempfile.TemporaryDirectory() as folder:
        latest = Path(folder, bertflask.LATEST)

        def change() -> None:
            bertflask._write_json(latest, {"model_dir": str(next(runs))})

        change()
        flags = ("--models-dir", folder, "--cache-size", "100")
        flags += ("--deadline", str(_DEADLINE_S))
        with Server(*serve_command(*flags)) as server:
            traffic = Traffic(server.port, expected)
            problems = _overload(server, traffic, seconds, change)
    problems += [f"{n} times: {what}" for what, n in traffic.wrong.most_common(20)]
    problems += [f"{x} never answered" for x in expected if not traffic.seen[x]]
    if problems:
        raise click.ClickException("\n".join(problems))
    click.echo("all answers right, no 5xx but 503 and 504, memory flat, exit code 0")


def _overload(
    server: Server, traffic: Traffic, seconds: int, change: Callable
) -> list[str]:
    """Tells what it saw and gives the problems of the server as a whole."""
    capacity = _capacity(traffic)
    with contextlib.closing(_never_reads(server.port)) as client:
        join, memory = traffic.start(_N_CLIENTS, seconds, 3 * capacity, 0.1), []
        began, n_changes = time.monotonic(), 0
        while (passed := time.monotonic() - began) < seconds:
            memory.append(server.memory("VmRSS"))
            if passed >= n_changes * _RELOAD_S:
                change()
                n_changes += 1
            time.sleep(_SAMPLE_S)
        join()
        metrics = ask(server.port, "/metrics")[1]
        unread, code = client.recv(12, socket.MSG_PEEK), server.stop()
    n_sent = sum(n for what, n in traffic.seen.items() if what not in traffic.expected)
    click.echo(f"capacity {capacity:.1f}, offered {n_sent / seconds:.1f} requests/s")
    click.echo(f"answers: {dict(sorted(traffic.seen.items()))}")
    problems = re.findall(r'requests_total\{.*status="5(?!03|04).*', metrics)
    problems += re.findall(r'reloads_total\{(?!result="done").*', metrics)
    problems += [f"who never reads got {unread}"] * (unread != b"HTTP/1.1 200")
    return problems + _growth(memory) + [f"exit code {code}"] * (code != 0)


def _growth(memory: list[float]) -> list[str]:
    """The same for memory, by the least and the most of each third of the time."""
    problems = []
    for kind, bounds in _GROWTH.items():
        *before, last = found = [float(kind(x)) for x in np.array_split(memory, 3)]
        words = f"{kind.__name__} MB in each third of the time: {[*map(round, found)]}"
        click.echo(words)
        over = any(last > bound * x for x, bound in zip(before, bounds))
        problems += [f"memory grew: {words}"] * over
    return problems


def _capacity(traffic: Traffic) -> float:
    """Requests/s when as many clients wait as the server lets in."""
    began = time.perf_counter()
    traffic.start(_N_WAITING, _CAPACITY_S, math.inf, 0)()
    rate = traffic.seen["200"] / (time.perf_counter() - began)
    traffic.seen.clear()
    return rate


if __name__ == "__main__":
    try:
        main()
    except bertflask.BertFlaskError as error:
        sys.exit(f"error: {error}")
