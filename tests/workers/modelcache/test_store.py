"""The store: a version appears whole and verified, once, or not at all."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from workers.modelcache.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    ManifestError,
    decode_manifest,
    hash_file,
)
from workers.modelcache.store import ModelStore, ModelStoreError


def a_version(directory: Path, files: dict[str, bytes]) -> Manifest:
    """Files and their manifest in a directory; what an importer would have made."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    entries = tuple(
        FileEntry(name=n, size_bytes=len(files[n]), sha256=hash_file(directory / n)) for n in sorted(files)
    )
    manifest = Manifest(files=entries, architecture="X", licence="mit", n_params=1, max_model_len=8)
    (directory / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    return manifest


FILES = {"config.json": b"{}", "model.safetensors": os.urandom(100_000)}


def test_ensure_brings_a_version_whole_and_read_only(tmp_path: Path) -> None:
    manifest = a_version(tmp_path / "src", FILES)
    store = ModelStore(tmp_path / "store")
    seen: list[tuple[int, int]] = []
    path = store.ensure(
        manifest.digest, (tmp_path / "src").as_uri(), lambda _, done, n: seen.append((done, n))
    )
    assert path == store.path(manifest.digest)
    assert {p.name for p in path.iterdir()} == {*FILES, MANIFEST_NAME}
    assert all(not p.stat().st_mode & 0o222 for p in path.iterdir())
    assert store.verify(manifest.digest) == manifest
    assert store.digests() == [manifest.digest]
    assert seen[-1] == (manifest.size_bytes, manifest.size_bytes)
    assert not list((tmp_path / "store" / ".incoming").iterdir())


def test_a_version_that_is_here_needs_no_source(tmp_path: Path) -> None:
    manifest = a_version(tmp_path / "src", FILES)
    store = ModelStore(tmp_path / "store")
    path = store.ensure(manifest.digest, (tmp_path / "src").as_uri())
    assert store.ensure(manifest.digest, "nowhere://") == path


def test_another_store_is_a_source_and_its_files_are_linked(tmp_path: Path) -> None:
    manifest = a_version(tmp_path / "src", FILES)
    first, second = ModelStore(tmp_path / "a"), ModelStore(tmp_path / "b")
    first.ensure(manifest.digest, (tmp_path / "src").as_uri())
    path = second.ensure(manifest.digest, (tmp_path / "a").as_uri())
    assert (path / "model.safetensors").samefile(first.path(manifest.digest) / "model.safetensors")
    # A plain directory may change under us: it is copied.
    assert not (path / "model.safetensors").samefile(tmp_path / "src" / "model.safetensors")


@pytest.mark.parametrize("damage", ["flipped", "short", "missing"])
def test_damaged_sources_leave_nothing_behind(tmp_path: Path, damage: str) -> None:
    manifest = a_version(tmp_path / "src", FILES)
    weights = tmp_path / "src" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "flipped":
        content[500] ^= 1
        weights.write_bytes(content)
    elif damage == "short":
        weights.write_bytes(content[:-1])
    else:
        weights.unlink()
    store = ModelStore(tmp_path / "store")
    with pytest.raises(ModelStoreError, match=r"model\.safetensors") as caught:
        store.ensure(manifest.digest, (tmp_path / "src").as_uri())
    assert caught.value.code == "bad_weights"
    assert not store.has(manifest.digest)
    assert not list((tmp_path / "store" / ".incoming").iterdir())


def test_a_manifest_of_another_version_is_refused(tmp_path: Path) -> None:
    a_version(tmp_path / "src", FILES)
    store = ModelStore(tmp_path / "store")
    with pytest.raises(ModelStoreError) as caught:
        store.ensure("ab" * 32, (tmp_path / "src").as_uri())
    assert caught.value.code == "bad_weights"


def test_sources_that_are_not_here_say_so(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    for source, code in (("ftp://x/y", "unknown_source"), ((tmp_path / "no").as_uri(), "source_missing")):
        with pytest.raises(ModelStoreError) as caught:
            store.ensure("ab" * 32, source)
        assert caught.value.code == code


def test_a_directory_without_manifest_is_no_version_and_is_replaced(tmp_path: Path) -> None:
    manifest = a_version(tmp_path / "src", FILES)
    store = ModelStore(tmp_path / "store")
    store.path(manifest.digest).mkdir()
    (store.path(manifest.digest) / "half").write_bytes(b"x")
    assert not store.has(manifest.digest)
    store.ensure(manifest.digest, (tmp_path / "src").as_uri())
    assert not (store.path(manifest.digest) / "half").exists()


def test_concurrent_calls_fetch_once(tmp_path: Path) -> None:
    manifest = a_version(tmp_path / "src", FILES)
    store = ModelStore(tmp_path / "store")
    fetches: list[str] = []
    paths: list[Path] = []

    def ensure() -> None:
        report = lambda stage, done, n: fetches.append(stage)  # noqa: E731
        paths.append(
            ModelStore(tmp_path / "store").ensure(manifest.digest, (tmp_path / "src").as_uri(), report)
        )

    threads = [threading.Thread(target=ensure) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 8
    assert len(fetches) == len(FILES)
    store.verify(manifest.digest)


def test_verify_names_a_file_that_changed(tmp_path: Path) -> None:
    manifest = a_version(tmp_path / "src", FILES)
    store = ModelStore(tmp_path / "store")
    path = store.ensure(manifest.digest, (tmp_path / "src").as_uri())
    (path / "config.json").chmod(0o644)
    (path / "config.json").write_bytes(b"[]")
    with pytest.raises(ModelStoreError, match=r"config\.json"):
        store.verify(manifest.digest)


def test_a_full_disk_is_told_before_copying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = a_version(tmp_path / "src", FILES)
    store = ModelStore(tmp_path / "store")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ModelStoreError) as caught:
        store.ensure(manifest.digest, (tmp_path / "src").as_uri())
    assert caught.value.code == "disk_full"


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "", "..", MANIFEST_NAME])
def test_manifest_names_cannot_leave_the_directory(name: str) -> None:
    entry = FileEntry(name=name, size_bytes=0, sha256="")
    manifest = Manifest(files=(entry,), architecture="X", licence="", n_params=0, max_model_len=0)
    with pytest.raises(ManifestError):
        decode_manifest(manifest.to_bytes())


@pytest.mark.parametrize("digest", ["", "..", "AB" * 32, "ab" * 31, "../" + "ab" * 31])
def test_only_digests_make_paths(tmp_path: Path, digest: str) -> None:
    with pytest.raises(ValueError, match="digest"):
        ModelStore(tmp_path).path(digest)
