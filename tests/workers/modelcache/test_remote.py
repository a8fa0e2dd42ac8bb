"""Model versions over HTTP: side by side, resumed, verified, once per machine; and nothing that could run code."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workers.modelcache.ranges import RangeServer
from workers.modelcache import remote
from workers.modelcache.manifest import MANIFEST_NAME, FileEntry, Manifest
from workers.modelcache.remote import Urls
from workers.modelcache.store import ModelStore, ModelStoreError
from workers.modelcache.transfer import Transfer, TransferError, Tuning

SMALL = Tuning(part_bytes=1000, n_streams=3)
WEIGHTS = random.Random(7).randbytes(25_500)


def _manifest(files: dict[str, bytes]) -> Manifest:
    entries = [
        FileEntry(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in sorted(files.items())
    ]
    return Manifest(files=tuple(entries), architecture="a", licence="Apache-2.0", n_params=1, max_model_len=8)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.fetch_files, "__kwdefaults__", {"tuning": SMALL, "progress": None})
    monkeypatch.setattr("workers.modelcache.transfer.PAUSE_S", 0.001)


@pytest.fixture
def server() -> Iterator[RangeServer]:
    made = RangeServer({})
    yield made
    made.close()


def _serve(server: RangeServer, files: dict[str, bytes]) -> tuple[str, Urls]:
    """(digest, URLs) of a version that the server has."""
    manifest = _manifest(files)
    server.files.update({f"/{name}": data for name, data in files.items()})
    server.files[f"/{MANIFEST_NAME}"] = manifest.to_bytes()
    return manifest.digest, {name: [f"{server.url}/{name}?sig=s"] for name in (*files, MANIFEST_NAME)}


FILES = {"model.safetensors": WEIGHTS, "config.json": b"{}", "empty.txt": b""}


def test_a_version_comes_in_parts_over_few_connections_and_is_whole(
    server: RangeServer, tmp_path: Path
) -> None:
    digest, urls = _serve(server, FILES)
    store = ModelStore(tmp_path)
    path = store.ensure(digest, "s3://b", urls=urls)
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    store.verify(digest)
    parts = sorted(start for path, start, _ in server.asked if path == "/model.safetensors")
    assert parts == list(range(0, 25_500, 1000))
    assert server.n_connections <= 1 + SMALL.n_streams + 2
    assert {p.name for p in path.iterdir()} == {*FILES, MANIFEST_NAME}


@pytest.mark.parametrize("mishap", [500, 503, "cut"])
def test_a_part_that_fails_is_asked_for_again(server: RangeServer, tmp_path: Path, mishap: int | str) -> None:
    digest, urls = _serve(server, FILES)
    failed: set[int] = set()

    def once(path: str, start: int) -> int | str | None:
        if path != "/model.safetensors" or start in failed:
            return None
        failed.add(start)
        return mishap

    server.mishap = once
    ModelStore(tmp_path).ensure(digest, "s3://b", urls=urls)
    assert len(failed) == 26


def test_the_next_source_stands_in_for_one_that_does_not_have_it(server: RangeServer, tmp_path: Path) -> None:
    digest, urls = _serve(server, FILES)
    other = RangeServer({})
    both = {name: [f"{other.url}/{name}", *known] for name, known in urls.items()}
    store = ModelStore(tmp_path)
    store.ensure(digest, "s3://b", urls=both)
    other.close()
    store.verify(digest)
    assert other.asked, "it was asked first"


def test_what_came_before_a_crash_is_not_fetched_again(server: RangeServer, tmp_path: Path) -> None:
    digest, urls = _serve(server, FILES)
    store = ModelStore(tmp_path)
    server.mishap = lambda path, start: 500 if start >= 15_000 else None
    with pytest.raises(ModelStoreError) as caught:
        store.ensure(digest, "s3://b", urls=urls)
    assert caught.value.code == "source_unreachable"
    assert not store.has(digest)
    server.mishap = lambda path, start: None
    server.asked.clear()
    store.ensure(digest, "s3://b", urls=urls)
    again = {start for path, start, _ in server.asked if path == "/model.safetensors"}
    assert again and min(again) >= 12_000
    store.verify(digest)


def test_a_journal_of_another_file_is_not_believed(server: RangeServer, tmp_path: Path) -> None:
    server.files["/f"] = WEIGHTS
    entry = _manifest({"f.json": WEIGHTS}).files[0]
    target = tmp_path / "f.json"
    target.write_bytes(bytes(len(WEIGHTS)))
    (tmp_path / "f.json.parts").write_text("0" * 64 + " 1000\n0\n1\n")
    Transfer([f"{server.url}/f"], target, entry, tuning=SMALL).run()
    assert target.read_bytes() == WEIGHTS


def test_a_damaged_part_is_found_and_the_file_begun_anew(server: RangeServer, tmp_path: Path) -> None:
    digest, urls = _serve(server, FILES)
    server.mishap = lambda path, start: "damage" if start == 3000 else None
    store = ModelStore(tmp_path)
    with pytest.raises(ModelStoreError) as caught:
        store.ensure(digest, "s3://b", urls=urls)
    assert caught.value.code == "bad_weights"
    server.mishap = lambda path, start: None
    store.ensure(digest, "s3://b", urls=urls)
    store.verify(digest)


@pytest.mark.parametrize(
    ("status", "code"), [(403, "source_expired"), (404, "source_missing"), (500, "source_unreachable")]
)
def test_each_refusal_has_its_code(server: RangeServer, tmp_path: Path, status: int, code: str) -> None:
    digest, urls = _serve(server, FILES)
    server.mishap = lambda path, start: status if path == "/model.safetensors" else None
    with pytest.raises(ModelStoreError) as caught:
        ModelStore(tmp_path).ensure(digest, "s3://b", urls=urls)
    assert caught.value.code == code
    assert "sig=" not in str(caught.value), "a signed URL is a secret"


def test_a_manifest_of_another_version_is_refused(server: RangeServer, tmp_path: Path) -> None:
    _, urls = _serve(server, FILES)
    with pytest.raises(ModelStoreError, match="not of") as caught:
        ModelStore(tmp_path).ensure("ab" * 32, "s3://b", urls=urls)
    assert caught.value.code == "bad_weights"


@pytest.mark.parametrize("name", ["model.bin", "modeling_x.py", "weights.pt", "x.pkl", "run"])
def test_what_could_run_code_is_not_even_fetched(server: RangeServer, tmp_path: Path, name: str) -> None:
    digest, urls = _serve(server, {**FILES, name: b"x"})
    with pytest.raises(ModelStoreError, match=name):
        ModelStore(tmp_path).ensure(digest, "s3://b", urls=urls)
    assert {path for path, _, _ in server.asked} == {f"/{MANIFEST_NAME}"}


def test_many_who_want_it_at_once_fetch_it_once(server: RangeServer, tmp_path: Path) -> None:
    digest, urls = _serve(server, FILES)
    server.delay_s = 0.002
    threads = [
        threading.Thread(target=ModelStore(tmp_path).ensure, args=(digest, "s3://b", None, urls))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sum(1 for path, _, _ in server.asked if path == "/model.safetensors") == 26


def test_a_reader_may_begin_before_the_end(server: RangeServer, tmp_path: Path) -> None:
    server.files["/f"] = WEIGHTS
    gate = threading.Event()

    def hold(path: str, start: int) -> None:
        if start >= 20_000:
            gate.wait(10)

    server.mishap = hold
    transfer = Transfer([f"{server.url}/f"], tmp_path / "f", _manifest({"f": WEIGHTS}).files[0], tuning=SMALL)
    thread = threading.Thread(target=transfer.run)
    thread.start()
    transfer.ready(15_000, 10)
    with (tmp_path / "f").open("rb") as file:
        assert file.read(15_000) == WEIGHTS[:15_000]
    gate.set()
    transfer.ready(len(WEIGHTS), 10)
    thread.join(10)


def test_a_reader_hears_of_a_transfer_that_failed(tmp_path: Path) -> None:
    transfer = Transfer(
        ["http://127.0.0.1:1/f"], tmp_path / "f", _manifest({"f": WEIGHTS}).files[0], tuning=SMALL
    )
    with pytest.raises(TransferError, match="Refused"):
        transfer.run()
    with pytest.raises(TransferError, match="failed"):
        transfer.ready(1, 10)
