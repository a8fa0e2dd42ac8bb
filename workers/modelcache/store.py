"""Model versions on this machine's disk, by digest: `<root>/<digest>/`. A version is there when its manifest is.

The agent calls `acquire` before it starts a replica; importers add versions with `adopt`. Blocking I/O: call from a
thread. Several processes may share a root. What comes over HTTP arrives at its final place, so that an engine may
load it meanwhile (arrival.py); its manifest is written last, when every byte is verified and on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from workers.modelcache.arrival import Board
from workers.modelcache.eviction import Held, victims
from workers.modelcache.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    ManifestError,
    decode_manifest,
    hash_file,
    is_digest,
)
from workers.modelcache.remote import Urls, fetch_files, fetch_manifest
from workers.modelcache.transfer import TransferError
from workers.modelcache.uses import Claim, Uses

Progress = Callable[[str, int, int], None]  # stage, bytes done, bytes in all
LOCK_TIMEOUT_S: Final = 1800.0  # another process may be copying tens of gigabytes
_SPARE_BYTES: Final = 64 << 20
MAX_EVICTIONS: Final = 16  # rounds, each of several versions
MAX_ACQUIRES: Final = 3


class ModelStoreError(RuntimeError):
    """`code` is stable: `unknown_source`, `source_missing`, `source_expired`, `source_unreachable`, `bad_weights`,
    `disk_full`, `busy`. The message has the remedy."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class ModelStore:
    """One root directory. Files in it are read-only and never change: a changed model is another digest."""

    def __init__(self, root: Path, *, budget_bytes: int | None = None) -> None:
        """budget_bytes: what all versions together may take; None: what the disk has."""
        self.root = root
        self.budget_bytes = budget_bytes
        self._incoming = root / ".incoming"
        self._locks = root / ".locks"
        self.sources = root / ".sources"  # importers remember here what they have imported
        for directory in (self._incoming, self._locks, self.sources):
            directory.mkdir(parents=True, exist_ok=True)
        self._uses = Uses(root / ".uses")

    def path(self, digest: str) -> Path:
        """Where a version is, or would be."""
        if not is_digest(digest):
            raise ValueError(f"digest: {digest!r} is not 64 lower-case hex digits")
        return self.root / digest

    def has(self, digest: str) -> bool:
        """Whether the version is here. It was verified when it came; `verify` looks again."""
        return (self.path(digest) / MANIFEST_NAME).exists()

    def digests(self) -> list[str]:
        return sorted(p.name for p in self.root.iterdir() if is_digest(p.name) and self.has(p.name))

    def manifest(self, digest: str) -> Manifest:
        """Raises ModelStoreError (`source_missing`, `bad_weights`)."""
        return _read_manifest(self.path(digest), digest)

    def verify(self, digest: str) -> Manifest:
        """Read every byte again; ModelStoreError `bad_weights` names the file that is not what it should be."""
        manifest = self.manifest(digest)
        for entry in manifest.files:
            _check(self.path(digest) / entry.name, entry)
        return manifest

    def ensure(
        self,
        digest: str,
        source: str,
        progress: Progress | None = None,
        urls: Urls | None = None,
        siblings: Sequence[str] = (),
        on_open: Callable[[Path], None] | None = None,
        *,
        may_evict: bool = True,
    ) -> Path:
        """The version's directory, fetched if it is not here yet.

        `source` is a `file://` URL of a directory with a manifest, or of a store that holds the digest; with `urls`,
        its files come over HTTP instead (from `siblings` first, remote.py), and an attempt that fails leaves what it
        got to the next. Verified before the version appears; `on_open` hears when a loader may begin with what has
        arrived (arrival.Arrival). may_evict: else only room that is free is taken. Concurrent calls for one digest
        fetch once. Raises ModelStoreError.
        """
        target = self.path(digest)
        if self.has(digest):
            return target
        origin = None if urls else _local_source(source, digest)
        with self._lock(digest):
            if self.has(digest):
                return target
            began_s = time.monotonic()
            if origin is None:
                self._ensure_remote(digest, urls or {}, siblings, progress, on_open, may_evict=may_evict)
            else:
                manifest = _read_manifest(origin, digest)
                self._make_room(manifest.size_bytes, may_evict=may_evict)
                with self.incoming(digest) as staging:
                    _fetch(origin, manifest, staging, progress)
                    self._install(staging, manifest)
            self._uses.fetched(digest, time.monotonic() - began_s)
        return target

    def _ensure_remote(
        self,
        digest: str,
        urls: Urls,
        siblings: Sequence[str],
        progress: Progress | None,
        on_open: Callable[[Path], None] | None,
        *,
        may_evict: bool,
    ) -> None:
        target = self.path(digest)  # no version until its manifest is in it; kept for the next attempt
        board: Board | None = None
        try:
            manifest = fetch_manifest(urls, digest)
            target.mkdir(exist_ok=True)
            n_there = sum(p.stat().st_blocks * 512 for p in target.iterdir())
            self._make_room(max(manifest.size_bytes - n_there, 0), may_evict=may_evict)
            board = Board(target, [entry.name for entry in manifest.files])
            fetch_files(
                urls,
                manifest,
                target,
                siblings=siblings,
                progress=progress,
                on_ready=board.ready,
                on_open=lambda: on_open(target) if on_open is not None else None,
            )
            board.verified()
            self._install(target, manifest)
        except TransferError as error:
            if board is not None:
                board.failed(error.code, str(error))
            raise ModelStoreError(error.code, str(error)) from None
        finally:
            if board is not None:
                board.close()

    def acquire(
        self,
        digest: str,
        source: str,
        progress: Progress | None = None,
        urls: Urls | None = None,
        siblings: Sequence[str] = (),
        on_open: Callable[[Path], None] | None = None,
    ) -> tuple[Path, Claim]:
        """As `ensure`, and the version stays until the claim is closed or this process ends."""
        for _ in range(MAX_ACQUIRES):
            path = self.ensure(digest, source, progress, urls, siblings, on_open)
            claim = self._uses.claim(digest)
            if self.has(digest):
                return path, claim
            claim.close()  # evicted in between
        raise ModelStoreError(
            "disk_full", "the model cache is too small: versions are evicted as fast as they come"
        )

    def claim(self, digest: str) -> Claim:
        """Keep a version that is here, for another process than the one that acquired it; counts as no use."""
        return self._uses.claim(digest, counts=False)

    def evict(self, digest: str) -> bool:
        """Remove a version that nobody uses; False when somebody does."""
        with self._uses.free(digest) as is_free:
            if not is_free:
                return False
            manifest = self.path(digest) / MANIFEST_NAME
            with contextlib.suppress(FileNotFoundError):
                manifest.unlink()  # from here on it is not there, whatever becomes of us
            self._remove(digest)
        return True

    def _remove(self, digest: str) -> None:
        """Out of the way at once: who fetches it again begins with an empty directory."""
        grave = self._incoming / f"{digest[:16]}.{os.getpid()}.{secrets.token_hex(4)}"
        with contextlib.suppress(FileNotFoundError):
            self.path(digest).rename(grave)
        shutil.rmtree(grave, ignore_errors=True)

    def held(self) -> list[Held]:
        """What is on the disk, with its use."""
        found = []
        for digest in self.digests():
            with contextlib.suppress(ModelStoreError):
                size = self.manifest(digest).size_bytes
                found.append(Held(digest, size, self._uses.read(digest), self._uses.is_claimed(digest)))
        return found

    @contextlib.contextmanager
    def incoming(self, name: str) -> Iterator[Path]:
        """A private directory on the store's filesystem, gone afterwards unless it was adopted."""
        staging = self._incoming / f"{name[:16]}.{os.getpid()}.{secrets.token_hex(4)}"
        staging.mkdir(parents=True)
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def adopt(self, staging: Path, manifest: Manifest) -> Path:
        """Make a directory from `incoming`, whose files match the manifest, the version's directory."""
        with self._lock(manifest.digest):
            if not self.has(manifest.digest):
                self._install(staging, manifest)
        return self.path(manifest.digest)

    def _install(self, staging: Path, manifest: Manifest) -> None:
        target = self.path(manifest.digest)
        for entry in manifest.files:
            (staging / entry.name).chmod(0o444)
            _sync(staging / entry.name)
        draft = staging / f"{MANIFEST_NAME}.new"
        draft.write_bytes(manifest.to_bytes())
        draft.chmod(0o444)
        _sync(draft)
        draft.rename(staging / MANIFEST_NAME)
        _sync(staging)
        if staging == target:
            _sync(self.root)
            return
        if target.exists():  # without a manifest: what a crash left behind
            shutil.rmtree(target)
        staging.rename(target)
        _sync(self.root)

    @contextlib.contextmanager
    def _lock(self, digest: str, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
        """Across threads and processes; freed by the kernel when its holder dies."""
        end_s = time.monotonic() + timeout_s
        with (self._locks / digest).open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno != errno.EWOULDBLOCK:
                        raise
                if time.monotonic() > end_s:
                    raise ModelStoreError("busy", f"another process has been fetching {digest} for too long")
                time.sleep(0.05)
            yield

    def _clear_leftovers(self) -> None:
        """What fetches that nobody goes on with have left: at most their room is lost, the bytes come again."""
        for path in self.root.iterdir():
            if not is_digest(path.name) or self.has(path.name):
                continue
            with contextlib.suppress(ModelStoreError), self._lock(path.name, timeout_s=0.0):
                if not self.has(path.name):
                    self._remove(path.name)

    def has_room(self, n_bytes: int) -> bool:
        """Whether so much would come without anything leaving."""
        return self._free(self.held()) >= n_bytes

    def free_bytes(self) -> int:
        """What may come without anything leaving, by budget and disk."""
        return max(self._free(self.held()), 0)

    def _free(self, held: list[Held]) -> int:
        free = shutil.disk_usage(self.root).free - _SPARE_BYTES
        if self.budget_bytes is None:
            return free
        return min(free, self.budget_bytes - sum(h.size_bytes for h in held))

    def _make_room(self, n_bytes: int, *, may_evict: bool) -> None:
        """Evict until `n_bytes` fit the budget and the disk. Raises ModelStoreError when what runs fills it."""
        if not self.has_room(n_bytes):
            self._clear_leftovers()
        for _ in range(MAX_EVICTIONS):
            held = self.held()
            free = self._free(held)
            if free >= n_bytes:
                return
            leaving = victims(held, n_bytes - free, time.time()) if may_evict else None
            if leaving is None:
                raise ModelStoreError(
                    "disk_full",
                    f"the model needs {n_bytes >> 20} MiB and {max(free, 0) >> 20} MiB are free in the model cache; "
                    "the rest is in use: give the cache a larger disk or budget",
                )
            for digest in leaving:
                self.evict(digest)
        raise ModelStoreError("disk_full", "the model cache could not be emptied: others fill it meanwhile")


def _local_source(source: str, digest: str) -> Path:
    url = urlsplit(source)
    if url.scheme != "file" or url.netloc not in ("", "localhost"):
        raise ModelStoreError(
            "unknown_source", f"model source {source!r} is not a file:// URL of this machine"
        )
    directory = Path(unquote(url.path))
    for candidate in (directory / digest, directory):
        if (candidate / MANIFEST_NAME).exists():
            return candidate
    raise ModelStoreError(
        "source_missing", f"model source {source!r} holds no {MANIFEST_NAME} and no {digest}"
    )


def _read_manifest(directory: Path, digest: str) -> Manifest:
    try:
        manifest = decode_manifest((directory / MANIFEST_NAME).read_bytes())
    except FileNotFoundError:
        raise ModelStoreError("source_missing", f"{directory} holds no model version") from None
    except ManifestError as error:
        raise ModelStoreError("bad_weights", str(error)) from None
    if manifest.digest != digest:
        raise ModelStoreError(
            "bad_weights", f"{directory}/{MANIFEST_NAME} belongs to {manifest.digest}, not to {digest}"
        )
    return manifest


def _fetch(origin: Path, manifest: Manifest, staging: Path, progress: Progress | None) -> None:
    """Link or copy every file, then verify it at its new place."""
    n_done = 0
    # Another store's files never change, so a second name for them is as good as a copy and costs nothing.
    may_link = origin.name == manifest.digest
    for entry in manifest.files:
        source, target = origin / entry.name, staging / entry.name
        try:
            if not (may_link and _link(source, target)):
                shutil.copyfile(source, target)
        except FileNotFoundError:
            raise ModelStoreError(
                "bad_weights", f"{source} is missing though the manifest lists it"
            ) from None
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise ModelStoreError("disk_full", f"no space left while copying {entry.name}") from None
            raise
        _check(target, entry)
        n_done += entry.size_bytes
        if progress is not None:
            progress("fetch", n_done, manifest.size_bytes)


def _link(source: Path, target: Path) -> bool:
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            return False
        raise
    return True


def _check(path: Path, entry: FileEntry) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ModelStoreError("bad_weights", f"{path} is missing though the manifest lists it") from None
    if size != entry.size_bytes:
        raise ModelStoreError("bad_weights", f"{path} has {size} bytes, the manifest says {entry.size_bytes}")
    if hash_file(path) != entry.sha256:
        raise ModelStoreError("bad_weights", f"{path} is damaged: its SHA-256 is not the manifest's")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
