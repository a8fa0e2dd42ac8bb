"""One file over HTTP: ranges fetched side by side, resumed where a process before us stopped, hashed on the way.

Used by remote.py. The file's bytes land at their place in a file of full size; a journal beside it says which parts
are there. SHA-256 follows the unbroken beginning, so that the file is verified moments after its last byte. Standard
library only: URLs are signed by whoever sent them, and are never logged.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import queue
import random
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from workers.modelcache.manifest import FileEntry

CONNECT_S: Final = 5.0
READ_S: Final = 30.0
ATTEMPTS: Final = 5  # of one part, each at the next source
PAUSE_S: Final = 0.2
_BLOCK_BYTES: Final = 1 << 20


class TransferError(RuntimeError):
    """`code` is stable: `source_missing`, `source_expired`, `source_unreachable`, `bad_weights`, `disk_full`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Tuning:
    """part_bytes: what is lost when a connection breaks. n_streams: one to an object store gives some 100 MB/s."""

    part_bytes: int = 16 << 20
    n_streams: int = 4


class Transfer:
    """`run()` once. `ready(n)` waits until the first n bytes are there, for readers that begin before the end."""

    def __init__(
        self,
        urls: Sequence[str],
        target: Path,
        entry: FileEntry,
        *,
        tuning: Tuning = Tuning(),
        on_bytes: Callable[[int], None] = lambda n: None,
    ) -> None:
        """urls: the same file at several places, best first. on_bytes: hears of every part, from any thread."""
        if not urls:
            raise TransferError("source_missing", f"{entry.name}: no source has it")
        self._urls, self._target, self._entry, self._tuning = tuple(urls), target, entry, tuning
        self._on_bytes = on_bytes
        self._journal = target.with_name(target.name + ".parts")
        n = -(-entry.size_bytes // tuning.part_bytes)
        self._there = [False] * n
        self._changed = threading.Condition()
        self._n_ready = 0
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self.n_fetched_bytes = 0

    def run(self) -> None:
        """Raises TransferError; what has come stays for the next attempt, unless it was wrong."""
        descriptor = os.open(self._target, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._resume(descriptor)
            with self._journal.open("a", encoding="ascii") as journal:
                self._fetch(descriptor, journal)
            self._journal.unlink(missing_ok=True)
        except TransferError as error:
            self._fail(error)
            if error.code == "bad_weights":  # nobody can say which part is wrong
                self._target.unlink(missing_ok=True)
                self._journal.unlink(missing_ok=True)
            raise
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._stop.set()
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
            self._error = error
            self._changed.notify_all()

    def _resume(self, descriptor: int) -> None:
        """Take over what an earlier run wrote with parts of the same size; begin anew otherwise."""
        head = f"{self._entry.sha256} {self._tuning.part_bytes}"
        lines: list[str] = []
        with contextlib.suppress(OSError, UnicodeDecodeError):
            lines = self._journal.read_text(encoding="ascii").split("\n")
        if lines and lines[0] == head and os.fstat(descriptor).st_size == self._entry.size_bytes:
            for line in lines[1:-1]:  # the last one may be cut off
                if line.isdigit() and int(line) < len(self._there):
                    self._there[int(line)] = True
            return
        try:
            os.truncate(descriptor, 0)
            if self._entry.size_bytes:
                os.posix_fallocate(descriptor, 0, self._entry.size_bytes)
        except OSError as error:
            raise TransferError("disk_full", f"no space for {self._entry.name}: {error.strerror}") from None
        self._journal.write_text(head + "\n", encoding="ascii")

    def _fetch(self, descriptor: int, journal: object) -> None:
        parts: queue.SimpleQueue[int] = queue.SimpleQueue()
        missing = [n for n, there in enumerate(self._there) if not there]
        for n in missing:
            parts.put(n)
        lock = threading.Lock()

        def done(part: int, n_bytes: int) -> None:
            with lock:
                journal.write(f"{part}\n")  # type: ignore[attr-defined]
                journal.flush()  # type: ignore[attr-defined]
                self.n_fetched_bytes += n_bytes
            self._on_bytes(n_bytes)
            with self._changed:
                self._there[part] = True
                self._changed.notify_all()

        threads = [
            threading.Thread(target=self._stream, args=(descriptor, parts, done, n), daemon=True)
            for n in range(min(self._tuning.n_streams, len(missing)))
        ]
        for thread in threads:
            thread.start()
        try:
            digest = self._hash(descriptor)
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(READ_S + CONNECT_S)
        if digest != self._entry.sha256:
            raise TransferError("bad_weights", f"{self._entry.name}: its SHA-256 is not the manifest's")

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
                self._n_ready = at
                self._changed.notify_all()
        return digest.hexdigest()

    def _stream(
        self, descriptor: int, parts: queue.SimpleQueue[int], done: Callable[[int, int], None], number: int
    ) -> None:
        """One connection: parts until there are none. The first thing that cannot be mended ends the transfer."""
        line = _Line()
        try:
            while not self._stop.is_set():
                try:
                    part = parts.get_nowait()
                except queue.Empty:
                    return
                start = part * self._tuning.part_bytes
                end = min(start + self._tuning.part_bytes, self._entry.size_bytes)
                self._part(line, descriptor, start, end, number)
                done(part, end - start)
        except BaseException as error:
            self._fail(error)
        finally:
            line.close()

    def _part(self, line: _Line, descriptor: int, start: int, end: int, number: int) -> None:
        """Bytes [start, end) at their place; the next source where one fails, with a growing pause."""
        last: TransferError | None = None
        for attempt in range(ATTEMPTS):
            if self._stop.is_set():
                raise TransferError("source_unreachable", "stopped")
            url = self._urls[attempt % len(self._urls)]
            try:
                line.fetch(url, start, end, descriptor, self._entry.name)
                return
            except TransferError as error:
                if error.code == "disk_full":
                    raise
                last = error
                line.close()
                if attempt + 1 >= len(self._urls):
                    self._stop.wait(PAUSE_S * 2**attempt * random.uniform(0.5, 1.0))
        assert last is not None
        raise last


class _Line:
    """One kept connection to one host."""

    def __init__(self) -> None:
        self._key: tuple[str, str] | None = None
        self._connection: http.client.HTTPConnection | None = None

    def fetch(self, url: str, start: int, end: int, descriptor: int, name: str) -> None:
        """Raises TransferError, and leaves a connection that may not be used again."""
        where = urlsplit(url)
        path = f"{where.path}?{where.query}" if where.query else where.path
        deadline_s = time.monotonic() + max(
            READ_S, (end - start) / 200_000
        )  # a stream below 200 kB/s is given up
        try:
            connection = self._connect(where.scheme, where.netloc)
            connection.request("GET", path, headers={"Range": f"bytes={start}-{end - 1}"})
            answer = connection.getresponse()
            if answer.status != 206 and not (answer.status == 200 and start == 0):
                _refuse(answer.status, name)
            at = start
            while at < end:
                block = answer.read(min(_BLOCK_BYTES, end - at))
                if not block or time.monotonic() > deadline_s:
                    raise TransferError("source_unreachable", f"{name}: the source stopped in the middle")
                _write(descriptor, block, at, name)
                at += len(block)
            if answer.status == 200 or answer.read(1):
                self.close()  # more comes than was asked for
        except (OSError, http.client.HTTPException) as error:
            raise TransferError("source_unreachable", f"{name}: {type(error).__name__}") from None

    def _connect(self, scheme: str, netloc: str) -> http.client.HTTPConnection:
        if self._connection is not None and self._key == (scheme, netloc):
            return self._connection
        self.close()
        if scheme == "https":
            self._connection = http.client.HTTPSConnection(
                netloc, timeout=CONNECT_S, context=ssl.create_default_context()
            )
        elif scheme == "http":
            self._connection = http.client.HTTPConnection(netloc, timeout=CONNECT_S)
        else:
            raise TransferError(
                "source_missing", f"{scheme}:// is no source of model files: give http or https"
            )
        self._connection.connect()
        self._connection.sock.settimeout(READ_S)
        self._key = (scheme, netloc)
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = self._key = None


def _write(descriptor: int, block: bytes, at: int, name: str) -> None:
    try:
        while block:
            n = os.pwrite(descriptor, block, at)
            block, at = block[n:], at + n
    except OSError as error:
        raise TransferError("disk_full", f"no space left for {name}: {error.strerror}") from None


def _refuse(status: int, name: str) -> None:
    if status in (401, 403):
        raise TransferError(
            "source_expired", f"{name}: the source refused us ({status}): its URL may have expired"
        )
    if status in (404, 410):
        raise TransferError("source_missing", f"{name}: the source does not have it ({status})")
    raise TransferError("source_unreachable", f"{name}: the source answered {status}")
