"""One file over HTTP: ranges fetched side by side, resumed where a process before us stopped, hashed on the way.

Used by remote.py. The file's bytes land at their place in a file of full size; a journal beside it says which parts
are there. With the digests of its pieces (pieces.py) each part is verified by the thread that fetches it, and a source
that gives a wrong one is asked no more; without them SHA-256 follows the unbroken beginning. Standard library only:
URLs are signed by whoever sent them, and are never logged.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from workers.modelcache.line import FAR, NEAR, Line, TransferError
from workers.modelcache.manifest import FileEntry

__all__ = ["Transfer", "TransferError", "Tuning"]

ATTEMPTS: Final = 5  # of one part, each at the source with the fewest faults
PAUSE_S: Final = 0.2
_POISONED: Final = 1000  # faults of a source that gave wrong bytes: any other is better
_BLOCK_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Tuning:
    """part_bytes: what is lost when a connection breaks. n_streams: one to an object store gives some 100 MB/s."""

    part_bytes: int = 16 << 20
    n_streams: int = 4


class Transfer:
    """`prepare()`, then `run()` once. `on_ready` hears how many bytes from the beginning are there and may be read."""

    def __init__(
        self,
        urls: Sequence[str],
        target: Path,
        entry: FileEntry,
        *,
        tuning: Tuning = Tuning(),
        pieces: Sequence[str] | None = None,
        faults: dict[str, int] | None = None,
        on_bytes: Callable[[int], None] = lambda n: None,
        on_ready: Callable[[int], None] = lambda n: None,
    ) -> None:
        """urls: the same file at several places, best first. pieces: SHA-256 of each part of `tuning.part_bytes`.
        faults: of each host, to share between the files of one version.

        on_bytes: hears of every part, from any thread; on_ready: in order, from one thread at a time.
        """
        if not urls:
            raise TransferError("source_missing", f"{entry.name}: no source has it")
        self._urls, self._target, self._entry, self._tuning = tuple(urls), target, entry, tuning
        self._on_bytes, self._on_ready = on_bytes, on_ready
        self._journal = target.with_name(target.name + ".parts")
        n = -(-entry.size_bytes // tuning.part_bytes)
        if pieces is not None and len(pieces) != n:
            raise TransferError("bad_weights", f"{entry.name}: its pieces are not those of its size")
        self._pieces = pieces
        self._there = [False] * n
        self._changed = threading.Condition()
        self._n_ready = 0
        self._n_parts_ready = 0
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._is_prepared = False
        self._hosts = [urlsplit(url).netloc for url in self._urls]
        self._faults = {} if faults is None else faults
        self.n_fetched_bytes = 0

    def prepare(self) -> None:
        """Take over what an earlier run wrote with parts of the same size, or lay out the file at its full size."""
        self._is_prepared = True
        head = f"{self._entry.sha256} {self._tuning.part_bytes}"
        lines: list[str] = []
        with contextlib.suppress(OSError, UnicodeDecodeError):
            lines = self._journal.read_text(encoding="ascii").split("\n")
        with contextlib.suppress(FileNotFoundError):
            self._target.chmod(0o600)  # a run that died at its very end may have made it read-only
        descriptor = os.open(self._target, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if lines and lines[0] == head and os.fstat(descriptor).st_size == self._entry.size_bytes:
                for line in lines[1:-1]:  # the last one may be cut off
                    if line.isdigit() and int(line) < len(self._there):
                        self._there[int(line)] = True
                return
            os.truncate(descriptor, 0)
            if self._entry.size_bytes:
                os.posix_fallocate(descriptor, 0, self._entry.size_bytes)
        except OSError as error:
            raise TransferError("disk_full", f"no space for {self._entry.name}: {error.strerror}") from None
        finally:
            os.close(descriptor)
        self._journal.write_text(head + "\n", encoding="ascii")

    def run(self) -> None:
        """Raises TransferError; what has come stays for the next attempt, unless it was wrong."""
        descriptor = -1
        try:
            if not self._is_prepared:
                self.prepare()
            descriptor = os.open(self._target, os.O_RDWR | os.O_CLOEXEC)
            with self._journal.open("a", encoding="ascii") as journal:
                self._fetch(descriptor, journal)
            self._journal.unlink(missing_ok=True)
        except TransferError as error:
            self._fail(error)
            if error.code == "bad_weights" and self._pieces is None:  # nobody can say which part is wrong
                self._target.unlink(missing_ok=True)
                self._journal.unlink(missing_ok=True)
            raise
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._stop.set()
            if descriptor >= 0:
                os.close(descriptor)

    def ready(self, n_bytes: int, timeout_s: float) -> None:
        """Return when the first `n_bytes` are in the file. Raises TransferError when the transfer failed or stalls."""
        with self._changed:
            there = self._changed.wait_for(
                lambda: self._n_ready >= n_bytes or self._error is not None, timeout_s
            )
        if self._error is not None:
            raise TransferError(
                "source_unreachable", f"{self._entry.name}: the transfer failed"
            ) from self._error
        if not there:
            raise TransferError("source_unreachable", f"{self._entry.name}: nothing came for {timeout_s:g} s")

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _fetch(self, descriptor: int, journal: object) -> None:
        parts: queue.SimpleQueue[int] = queue.SimpleQueue()
        here = list(self._there)
        if self._pieces is not None:
            self._there = [False] * len(
                here
            )  # looked at again: a journal may have survived what it speaks of
        n_queued = 0
        for part, there in enumerate(self._there):
            if not there:
                parts.put(part)
                n_queued += 1
        lock = threading.Lock()

        def done(part: int, n_bytes: int, *, fetched: bool) -> None:
            with lock:
                if fetched:
                    self.n_fetched_bytes += n_bytes
                    if not here[part]:
                        journal.write(f"{part}\n")  # type: ignore[attr-defined]
                        journal.flush()  # type: ignore[attr-defined]
            self._on_bytes(n_bytes)
            self._arrived(part)

        threads = [
            threading.Thread(target=self._stream, args=(descriptor, parts, here, done), daemon=True)
            for _ in range(min(self._tuning.n_streams, n_queued))
        ]
        for thread in threads:
            thread.start()
        try:
            digest = self._hash(descriptor) if self._pieces is None else self._await_all()
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(FAR.read_s + FAR.connect_s)
        if digest != self._entry.sha256:
            raise TransferError("bad_weights", f"{self._entry.name}: its SHA-256 is not the manifest's")

    def _arrived(self, part: int) -> None:
        with self._changed:
            self._there[part] = True
            if self._pieces is not None:
                while self._n_parts_ready < len(self._there) and self._there[self._n_parts_ready]:
                    self._n_parts_ready += 1
                self._tell_ready(min(self._n_parts_ready * self._tuning.part_bytes, self._entry.size_bytes))
            self._changed.notify_all()

    def _tell_ready(self, n_bytes: int) -> None:
        """Under the lock."""
        if n_bytes > self._n_ready:
            self._n_ready = n_bytes
            self._on_ready(n_bytes)

    def _await_all(self) -> str:
        """The file's SHA-256, once all its pieces are verified: the manifest vouches for their list as for the file."""
        with self._changed:
            self._changed.wait_for(lambda: all(self._there) or self._error is not None)
            if self._error is not None:
                raise self._error
        return self._entry.sha256

    def _hash(self, descriptor: int) -> str:
        """SHA-256 of the file, following the parts as they come."""
        digest, at = hashlib.sha256(), 0
        size, part_bytes = self._entry.size_bytes, self._tuning.part_bytes
        while at < size:
            part = at // part_bytes
            with self._changed:
                self._changed.wait_for(lambda part=part: self._there[part] or self._error is not None)  # type: ignore[misc]
                if self._error is not None:
                    raise self._error
            end = min((part + 1) * part_bytes, size)
            while at < end:
                block = os.pread(descriptor, min(_BLOCK_BYTES, end - at), at)
                if not block:
                    raise TransferError("bad_weights", f"{self._entry.name}: shorter than the manifest says")
                digest.update(block)
                at += len(block)
            with self._changed:
                self._tell_ready(at)
                self._changed.notify_all()
        return digest.hexdigest()

    def _stream(
        self,
        descriptor: int,
        parts: queue.SimpleQueue[int],
        here: Sequence[bool],
        done: Callable[..., None],
    ) -> None:
        """One connection: parts until there are none. The first thing that cannot be mended ends the transfer."""
        line = Line()
        try:
            while not self._stop.is_set():
                try:
                    part = parts.get_nowait()
                except queue.Empty:
                    return
                start = part * self._tuning.part_bytes
                end = min(start + self._tuning.part_bytes, self._entry.size_bytes)
                if here[part] and self._is_right(descriptor, part, start, end):
                    done(part, end - start, fetched=False)
                    continue
                self._part(line, descriptor, part, start, end)
                done(part, end - start, fetched=True)
        except BaseException as error:
            self._fail(error)
        finally:
            line.close()

    def _is_right(self, descriptor: int, part: int, start: int, end: int) -> bool:
        """Whether a part that an earlier run fetched is still what it should be."""
        assert self._pieces is not None
        digest = hashlib.sha256()
        while start < end and (block := os.pread(descriptor, min(_BLOCK_BYTES, end - start), start)):
            digest.update(block)
            start += len(block)
        return digest.hexdigest() == self._pieces[part]

    def _part(self, line: Line, descriptor: int, part: int, start: int, end: int) -> None:
        """Bytes [start, end) at their place; another source where one fails, with a growing pause."""
        last: TransferError | None = None
        for attempt in range(ATTEMPTS):
            if self._stop.is_set():
                raise TransferError("source_unreachable", "stopped")
            source = min(range(len(self._urls)), key=self._worse)
            patience = FAR if source == len(self._urls) - 1 else NEAR
            digest = None if self._pieces is None else hashlib.sha256()
            try:
                line.fetch(self._urls[source], start, end, descriptor, self._entry.name, digest, patience)
                if digest is None or digest.hexdigest() == self._pieces[part]:  # type: ignore[index]
                    return
                self._blame(source, _POISONED)
                last = TransferError(
                    "bad_weights", f"{self._entry.name}: a source gave bytes that are not the model's"
                )
            except TransferError as error:
                if error.code == "disk_full":
                    raise
                self._blame(source, 1)
                last = error
            if attempt + 1 >= len(self._urls):
                self._stop.wait(PAUSE_S * 2**attempt * random.uniform(0.5, 1.0))
        assert last is not None
        raise last

    def _worse(self, source: int) -> tuple[int, int]:
        """Smallest for the one to ask next."""
        return self._faults.get(self._hosts[source], 0), source

    def _blame(self, source: int, n: int) -> None:
        """Two threads at once may count one fault: it is a preference, not an account."""
        host = self._hosts[source]
        self._faults[host] = self._faults.get(host, 0) + n
