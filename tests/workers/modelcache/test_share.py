"""A machine's model versions for its siblings: by ticket, by range, within bounds, and nothing else."""

from __future__ import annotations

import http.client
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.workers.modelcache.ranges import RangeServer
from tests.workers.modelcache.test_remote import _manifest
from workers.config import AgentConfig, ConfigError
from workers.modelcache.manifest import MANIFEST_NAME, FileEntry, Manifest, hash_file
from workers.modelcache.pieces import PIECES_NAME, pieces_of
from workers.modelcache.share import Share, version_url
from workers.modelcache.store import ModelStore
from workers.modelcache.ticket import LIFE_S, SKEW_S, is_good, query

WEIGHTS = random.Random(5).randbytes(300_000)


@pytest.fixture
def origin(tmp_path: Path) -> tuple[ModelStore, Manifest]:
    """A machine that holds a version of several pieces."""
    store = ModelStore(tmp_path / "origin")
    with store.incoming("x") as staging:
        (staging / "model.safetensors").write_bytes(WEIGHTS)
        (staging / "config.json").write_bytes(b"{}")
        pieces = pieces_of([staging / "model.safetensors"], 1 << 16)
        assert pieces is not None
        (staging / PIECES_NAME).write_bytes(pieces.to_bytes())
        entries = tuple(
            FileEntry(name=p.name, size_bytes=p.stat().st_size, sha256=hash_file(p))
            for p in sorted(staging.iterdir())
        )
        manifest = Manifest(files=entries, architecture="a", licence="MIT", n_params=1, max_model_len=8)
        store.adopt(staging, manifest)
    return store, manifest


@pytest.fixture
def share(origin: tuple[ModelStore, Manifest]) -> Iterator[Share]:
    made = Share(origin[0], "127.0.0.1", 0, n_slots=2)
    made.start()
    yield made
    made.close()


def _ask(share: Share, path: str, ranged: str = "bytes=0-9") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(share.url).netloc, timeout=10)
    connection.request("GET", path, headers={"Range": ranged} if ranged else {})
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def _path(share: Share, digest: str, name: str, key: bytes | None = None, ends_in_s: float = 60) -> str:
    return f"/models/{digest}/{name}?{query(key or share.key, digest, int(time.time() + ends_in_s))}"


def test_a_machine_fetches_a_version_from_its_sibling(
    origin: tuple[ModelStore, Manifest], share: Share, tmp_path: Path
) -> None:
    _, manifest = origin
    bucket = RangeServer({f"/{MANIFEST_NAME}": manifest.to_bytes()})  # and nothing else
    urls = {name: [f"{bucket.url}/{name}"] for name in (MANIFEST_NAME, *(f.name for f in manifest.files))}
    base = version_url(share.url, manifest.digest, query(share.key, manifest.digest, int(time.time() + 60)))
    other = ModelStore(tmp_path / "other")
    other.ensure(manifest.digest, "s3://b", urls=urls, siblings=[base])
    other.verify(manifest.digest)
    assert share.n_sent_bytes == manifest.size_bytes
    bucket.close()


def test_without_a_good_ticket_nothing_is_told(
    origin: tuple[ModelStore, Manifest], share: Share, tmp_path: Path
) -> None:
    digest = origin[1].digest
    assert _ask(share, _path(share, digest, "config.json"), "bytes=0-1") == (206, b"{}")
    other = "cd" * 32
    for path in (
        f"/models/{digest}/config.json",
        _path(share, digest, "config.json", key=b"x" * 32),
        _path(share, digest, "config.json", ends_in_s=-SKEW_S - 5),
        _path(share, digest, "config.json", ends_in_s=LIFE_S + SKEW_S + 60),
        _path(share, other, "config.json").replace(other, digest),
    ):
        assert _ask(share, path) == (403, b"")


@pytest.mark.parametrize(
    ("name", "ranged", "status"),
    [
        (MANIFEST_NAME, "bytes=0-9", 404),
        ("..%2Fconfig.json", "bytes=0-1", 404),
        ("absent.json", "bytes=0-1", 404),
        ("config.json", "", 416),
        ("config.json", "bytes=0-2", 416),
        ("config.json", "bytes=1-0", 416),
    ],
)
def test_only_ranges_of_the_versions_files_are_sent(
    origin: tuple[ModelStore, Manifest], share: Share, name: str, ranged: str, status: int
) -> None:
    assert _ask(share, _path(share, origin[1].digest, name), ranged) == (status, b"")
    assert _ask(share, _path(share, "cd" * 32, "config.json"), "bytes=0-1")[0] == 404, "not here"


def test_slots_bound_what_siblings_take(origin: tuple[ModelStore, Manifest], share: Share) -> None:
    digest = origin[1].digest
    with share.slot() as first, share.slot() as second:
        assert first and second
        assert _ask(share, _path(share, digest, "config.json"), "bytes=0-1") == (503, b"")
    assert _ask(share, _path(share, digest, "config.json"), "bytes=0-1")[0] == 206


def test_what_is_being_sent_is_not_evicted(origin: tuple[ModelStore, Manifest], share: Share) -> None:
    store, manifest = origin
    where = urlsplit(share.url)
    with store.incoming("x") as staging:  # larger than what sockets hold
        big = random.Random(1).randbytes(1 << 20) * 24
        (staging / "model.safetensors").write_bytes(big)
        large = _manifest({"model.safetensors": big})
        store.adopt(staging, large)
    slow = socket.create_connection((where.hostname, where.port or 0), timeout=10)
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    path = _path(share, large.digest, "model.safetensors")
    slow.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nRange: bytes=0-{len(big) - 1}\r\n\r\n".encode())
    assert slow.recv(12) == b"HTTP/1.1 206"
    assert not store.evict(large.digest), "it is being sent"
    assert store.evict(manifest.digest)
    slow.close()
    deadline_s = time.monotonic() + 10
    while not store.evict(large.digest):
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.02)


def test_a_ticket_is_for_one_version_and_a_while() -> None:
    key = b"k" * 32
    parts = dict(part.split("=") for part in query(key, "ab" * 32, 1000).split("&"))
    assert is_good(key, "ab" * 32, parts["ends"], parts["ticket"], 1000 - LIFE_S)
    assert is_good(key, "ab" * 32, parts["ends"], parts["ticket"], 1000 + SKEW_S)
    assert not is_good(key, "ab" * 32, parts["ends"], parts["ticket"], 1001 + SKEW_S)
    assert not is_good(key, "cd" * 32, parts["ends"], parts["ticket"], 900)
    assert not is_good(key, "ab" * 32, "1001", parts["ticket"], 900)
    assert not is_good(key, "ab" * 32, "-1", "\u00e4", 900)


@pytest.mark.parametrize("text", ["7437", "host:", "host:99999", "*:80", ":80", "host:x"])
def test_an_address_that_siblings_cannot_reach_is_refused_at_the_start(text: str) -> None:
    argv = ["--machine-id", "m1", "--enrol-url", "http://x", "--var", "/v"]
    with pytest.raises(ConfigError, match="--model-share"):
        AgentConfig.from_args(argv, {"CORRAL_MODEL_SHARE": text})
    assert AgentConfig.from_args(argv, {}).model_share is None
    assert AgentConfig.from_args(argv, {"CORRAL_MODEL_SHARE": "imds:7437"}).model_share == ("imds", 7437)
