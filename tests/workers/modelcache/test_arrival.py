"""Versions that are loaded while they arrive, pieces that are verified one by one, siblings that are not believed."""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from tests.workers.modelcache.ranges import RangeServer
from tests.workers.modelcache.test_remote import _manifest
from workers.engine.arriving import tensors
from workers.modelcache import remote
from workers.modelcache.arrival import Arrival, ArrivalFailed, Board
from workers.modelcache.manifest import MANIFEST_NAME
from workers.modelcache.pieces import PIECES_NAME, Pieces, decode_pieces, pieces_of
from workers.modelcache.store import ModelStore, ModelStoreError
from workers.modelcache.transfer import Transfer, TransferError, Tuning

PART = 4096
SMALL = Tuning(part_bytes=PART, n_streams=3)
TENSORS = {f"layer.{n}": np.full((128, 8), n, np.float32) for n in range(12)}
WEIGHTS: bytes = save(TENSORS)
CONFIG = b'{"dtype": "float32"}'


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = (remote.fetch_files.__kwdefaults__ or {}) | {"tuning": SMALL}
    monkeypatch.setattr(remote.fetch_files, "__kwdefaults__", defaults)
    monkeypatch.setattr("workers.modelcache.transfer.PAUSE_S", 0.001)


@pytest.fixture
def server() -> Iterator[RangeServer]:
    made = RangeServer({})
    yield made
    made.close()


@pytest.fixture
def sibling() -> Iterator[RangeServer]:
    made = RangeServer({})
    yield made
    made.close()


def _files(*, pieces: bool) -> dict[str, bytes]:
    files = {"model.safetensors": WEIGHTS, "config.json": CONFIG}
    if pieces:
        of = [hashlib.sha256(WEIGHTS[at : at + PART]).hexdigest() for at in range(0, len(WEIGHTS), PART)]
        files[PIECES_NAME] = Pieces(piece_bytes=PART, files={"model.safetensors": tuple(of)}).to_bytes()
    return files


def _serve(server: RangeServer, *, pieces: bool) -> tuple[str, dict[str, list[str]]]:
    files = _files(pieces=pieces)
    manifest = _manifest(files)
    server.files |= {f"/{name}": data for name, data in files.items()}
    server.files[f"/{MANIFEST_NAME}"] = manifest.to_bytes()
    return manifest.digest, {name: [f"{server.url}/{name}"] for name in (*files, MANIFEST_NAME)}


def _asked(server: RangeServer) -> list[int]:
    return [start for path, start, _ in server.asked if path == "/model.safetensors"]


class Fetch(threading.Thread):
    """`ensure` beside us; its failure, and the directory once loading may begin."""

    def __init__(self, store: ModelStore, digest: str, urls: Any) -> None:
        super().__init__(daemon=True)
        self.opened, self.error = threading.Event(), ""
        self._call = lambda: store.ensure(digest, "s3://b", urls=urls, on_open=lambda _: self.opened.set())
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except ModelStoreError as error:
            self.error = error.code


@pytest.mark.parametrize("pieces", [True, False])
def test_each_tensor_is_loaded_when_its_bytes_have_come(
    server: RangeServer, tmp_path: Path, *, pieces: bool
) -> None:
    digest, urls = _serve(server, pieces=pieces)
    store, gate = ModelStore(tmp_path), threading.Event()
    half = len(WEIGHTS) // 2
    server.mishap = lambda path, start: gate.wait(10) and None if start > half else None
    fetch = Fetch(store, digest, urls)
    assert fetch.opened.wait(10)
    assert not store.has(digest)
    path = store.path(digest)
    loading = tensors(Arrival(path), [path / "model.safetensors"], framework="np")
    early = [next(loading) for _ in range(4)]
    assert not gate.is_set() and not store.has(digest), "it is not there yet"
    gate.set()
    found = {name: array.copy() for name, array in (*early, *loading)}
    assert found.keys() == TENSORS.keys()
    assert all((found[name] == TENSORS[name]).all() for name in TENSORS)
    fetch.join(10)
    store.verify(digest)
    again = {name for name, _ in tensors(Arrival(path), [path / "model.safetensors"], framework="np")}
    assert again == TENSORS.keys(), "a version that is whole loads at once"


@pytest.mark.parametrize("pieces", [True, False])
def test_wrong_bytes_that_come_late_stop_the_loader_before_it_ends(
    server: RangeServer, tmp_path: Path, *, pieces: bool
) -> None:
    digest, urls = _serve(server, pieces=pieces)
    store, gate = ModelStore(tmp_path), threading.Event()
    last = len(WEIGHTS) // PART * PART

    def mishap(path: str, start: int) -> str | None:
        if path == "/model.safetensors" and start == last:
            gate.wait(10)
            return "damage"
        return None

    server.mishap = mishap
    fetch = Fetch(store, digest, urls)
    assert fetch.opened.wait(10)
    path = store.path(digest)
    arrival = Arrival(path)
    loading = tensors(arrival, [path / "model.safetensors"], framework="np")
    assert next(loading)[0] == "layer.0"
    gate.set()
    with pytest.raises(ArrivalFailed) as caught:
        list(loading)
    assert caught.value.code == "bad_weights"
    told = arrival.failure()
    assert told is not None and told.code == "bad_weights"
    fetch.join(10)
    assert fetch.error == "bad_weights"
    assert not store.has(digest)
    with pytest.raises(ArrivalFailed, match="has ended"):
        Arrival(path)


def _hold_a_board(path: Path, pipe: Any) -> None:
    board = Board(path, ["model.safetensors"])
    board.ready("model.safetensors", 10)
    pipe.send("there")
    time.sleep(60)


def test_nobody_waits_for_a_fetcher_that_died(tmp_path: Path) -> None:
    path = ModelStore(tmp_path).path("ab" * 32)
    path.mkdir()
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    other = fork.Process(target=_hold_a_board, args=(path, theirs))
    other.start()
    assert ours.recv() == "there"
    arrival = Arrival(path)
    arrival.ready("model.safetensors", 10)
    assert arrival.failure() is None
    other.kill()
    other.join(10)
    with pytest.raises(ArrivalFailed, match="ended"):
        arrival.ready("model.safetensors", 11)


def test_an_engine_that_would_look_into_the_weights_for_a_dtype_waits_for_them(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.workers.modelcache.test_arrival.CONFIG", b"{}")
    digest, urls = _serve(server, pieces=True)
    fetch = Fetch(ModelStore(tmp_path), digest, urls)
    fetch.join(10)
    assert not fetch.opened.is_set() and not fetch.error


# -- siblings


def _sibling(server: RangeServer) -> str:
    server.files |= {f"/v/{name}": data for name, data in _files(pieces=True).items()}
    return f"{server.url}/v/{{name}}?ticket=t"


def test_a_sibling_is_asked_before_the_object_store(
    server: RangeServer, sibling: RangeServer, tmp_path: Path
) -> None:
    digest, urls = _serve(server, pieces=True)
    store = ModelStore(tmp_path)
    store.ensure(digest, "s3://b", urls=urls, siblings=[_sibling(sibling)])
    assert [path for path, _, _ in server.asked] == [f"/{MANIFEST_NAME}"]
    assert len(sibling.asked) >= len(WEIGHTS) // PART
    store.verify(digest)


def test_a_sibling_cannot_poison_and_is_left_at_the_first_wrong_byte(
    server: RangeServer, sibling: RangeServer, tmp_path: Path
) -> None:
    digest, urls = _serve(server, pieces=True)
    base = _sibling(sibling)
    sibling.files["/v/model.safetensors"] = bytes(len(WEIGHTS))
    store = ModelStore(tmp_path)
    store.ensure(digest, "s3://b", urls=urls, siblings=[base])
    store.verify(digest)
    wrong = [path for path, _, _ in sibling.asked if path == "/v/model.safetensors"]
    assert 1 <= len(wrong) <= SMALL.n_streams
    assert len(_asked(server)) == -(-len(WEIGHTS) // PART)


@pytest.mark.parametrize("mishap", [503, 404, "cut"])
def test_a_sibling_that_does_not_help_costs_little(
    server: RangeServer, sibling: RangeServer, tmp_path: Path, mishap: int | str
) -> None:
    digest, urls = _serve(server, pieces=True)
    base = _sibling(sibling)
    sibling.mishap = lambda path, start: mishap
    store = ModelStore(tmp_path)
    store.ensure(digest, "s3://b", urls=urls, siblings=["http://127.0.0.1:1/v/{name}", base])
    store.verify(digest)


def test_what_cannot_be_verified_range_by_range_is_not_asked_of_a_sibling(
    server: RangeServer, sibling: RangeServer, tmp_path: Path
) -> None:
    digest, urls = _serve(server, pieces=False)
    store = ModelStore(tmp_path)
    store.ensure(digest, "s3://b", urls=urls, siblings=[_sibling(sibling)])
    assert {path for path, _, _ in sibling.asked} == {"/v/config.json"}, "one piece: its own digest"
    store.verify(digest)


# -- pieces


def test_pieces_are_those_of_the_file(tmp_path: Path) -> None:
    data = random.Random(3).randbytes(2500)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(data[:1000])
    (tmp_path / "c").write_bytes(data[:2000])
    pieces = pieces_of([tmp_path / "a", tmp_path / "b", tmp_path / "c"], 1000)
    assert pieces is not None
    expected = [hashlib.sha256(data[at : at + 1000]).hexdigest() for at in (0, 1000, 2000)]
    assert pieces.files == {"a": tuple(expected), "c": tuple(expected[:2])}
    assert pieces_of([tmp_path / "b"], 1000) is None
    with pytest.raises(ValueError, match="piece_bytes"):
        decode_pieces(Pieces(piece_bytes=1, files={}).to_bytes())


def test_a_part_that_went_bad_on_the_disk_is_fetched_again_and_only_that(
    server: RangeServer, tmp_path: Path
) -> None:
    digest, urls = _serve(server, pieces=True)
    store = ModelStore(tmp_path)
    server.mishap = lambda path, start: 500 if start > 8 * PART else None
    with pytest.raises(ModelStoreError):
        store.ensure(digest, "s3://b", urls=urls)
    weights = store.path(digest) / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(2 * PART)
        file.write(b"x")
    server.mishap = lambda path, start: None
    server.asked.clear()
    store.ensure(digest, "s3://b", urls=urls)
    asked = _asked(server)
    assert 2 * PART in asked and 0 not in asked
    store.verify(digest)


def test_pieces_of_another_size_are_refused(tmp_path: Path) -> None:
    entry = _manifest({"f": WEIGHTS}).files[0]
    with pytest.raises(TransferError, match="pieces"):
        Transfer(["http://127.0.0.1:1/f"], tmp_path / "f", entry, tuning=SMALL, pieces=["ab"])


def test_what_abandoned_fetches_left_makes_room(server: RangeServer, tmp_path: Path) -> None:
    digest, urls = _serve(server, pieces=True)
    store = ModelStore(tmp_path, budget_bytes=len(WEIGHTS) + 4000)
    server.mishap = lambda path, start: 500 if start > PART else None
    with pytest.raises(ModelStoreError):
        store.ensure(digest, "s3://b", urls=urls)
    assert (store.path(digest) / "model.safetensors").exists()
    store._clear_leftovers()
    assert not store.path(digest).exists()


def test_all_bytes_there_is_not_enough(tmp_path: Path) -> None:
    path = ModelStore(tmp_path).path("ab" * 32)
    path.mkdir()
    (path / "model.safetensors").write_bytes(WEIGHTS)
    board = Board(path, ["model.safetensors"])
    board.ready("model.safetensors", len(WEIGHTS))
    loading = tensors(Arrival(path), [path / "model.safetensors"], framework="np")
    assert {next(loading)[0] for _ in TENSORS} == TENSORS.keys()
    board.failed("bad_weights", "its SHA-256 is not the manifest's")
    with pytest.raises(ArrivalFailed, match="SHA-256"):
        next(loading)
