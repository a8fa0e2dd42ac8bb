"""Who uses which model version on this machine, and how often each was wanted: what eviction goes by.

A claim is a shared lock of the kernel on a file, so it ends with its process however that ends; whoever evicts takes
the lock for itself alone. Scores are small files beside them. Called by ModelStore only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from workers.modelcache.eviction import Use


class Claim:
    """While it is open, the version stays. Closed by `close`, or by the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def close(self) -> None:
        """As often as one likes."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Uses:
    """One directory, shared by every process that uses the store."""

    def __init__(self, root: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._root, self._clock = root, clock
        root.mkdir(parents=True, exist_ok=True)

    def claim(self, digest: str, *, counts: bool = True) -> Claim:
        """In use until the claim is closed; `counts`: and one more use of it."""
        descriptor = self._descriptor(digest)
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # an eviction holds it for the time of a removal at most
        if counts:
            self._write(digest, self.read(digest).seen(self._clock()))
        return Claim(descriptor)

    @contextlib.contextmanager
    def free(self, digest: str) -> Iterator[bool]:
        """Whether nobody has a claim; then nobody gets one until the end."""
        descriptor = self._descriptor(digest)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(descriptor)

    def is_claimed(self, digest: str) -> bool:
        with self.free(digest) as is_free:
            return not is_free

    def fetched(self, digest: str, seconds: float) -> None:
        """Fetching it took this long."""
        self._write(digest, msgspec.structs.replace(self._stored(digest), fetch_s=seconds))

    def read(self, digest: str) -> Use:
        stored = self._stored(digest)
        return Use(stored.score, stored.at_s, stored.fetch_s)

    def _stored(self, digest: str) -> _Stored:
        try:
            return msgspec.json.decode((self._root / f"{digest}.json").read_bytes(), type=_Stored)
        except (OSError, msgspec.MsgspecError):
            return _Stored()

    def _write(self, digest: str, use: Use | _Stored) -> None:
        """The last of two writers at once wins: a use that is not counted costs nothing."""
        stored = _Stored(score=use.score, at_s=use.at_s, fetch_s=use.fetch_s)
        scratch = self._root / f"{digest}.{os.getpid()}.{threading.get_native_id()}.new"
        scratch.write_bytes(msgspec.json.encode(stored))
        scratch.replace(self._root / f"{digest}.json")

    def _descriptor(self, digest: str) -> int:
        return os.open(self._root / f"{digest}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


class _Stored(msgspec.Struct):
    score: float = 0.0
    at_s: float = 0.0
    fetch_s: float = 0.0
