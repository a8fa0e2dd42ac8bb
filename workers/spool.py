"""Second witness of usage: an append-only file per replica that keeps every end until intake has booked it.

The front that serves a replica owns its file while it lives (flock), the machine's agent owns the files of
dead replicas. Life of a record: `begin` before the flush that ends the request, `confirm` once Redis accepted
that flush, `forget` when intake has booked it (or the flush was refused: the request ends elsewhere). A
record that was begun and never confirmed is judged by the lease (workers/accounting.py). Never holds text of
a tenant.

What has gathered reaches the operating system with `write_out` (it then survives the process), in one write:
the publisher calls it before a flush that ends requests leaves, accounting ten times a second for the rest, which
may be lost. `sync` makes it survive the machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_HEADER: Final = struct.Struct("<BII")  # kind, length, crc32 of the payload
_BEGUN, _CONFIRMED, _FORGOTTEN = 1, 2, 3
_EVENT_HEAD: Final = struct.Struct("<QH")  # epoch, length of the request id
_COMPACT_ABOVE_BYTES: Final = 1 << 20
_MAX_UNWRITTEN: Final = 1024  # records


class SpoolBusy(RuntimeError):  # noqa: N818 - a state: somebody else owns the file
    """Another process owns this spool."""


@dataclass(slots=True)
class Record:
    """One finished request that intake has not booked. Instants are of the given clock, in seconds."""

    request_id: str
    epoch: int
    event: bytes  # UsageEvent, msgpack
    confirmed: bool
    due_at_s: float  # when it should be announced again
    interval_s: float


class Spool:
    """One replica's file. Not thread-safe, except `sync`."""

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int,
        republish_after_s: float = 10.0,
        republish_max_s: float = 600.0,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open or create, reading what is there; a torn tail is cut off. SpoolBusy if it has another
        owner.
        """
        self.path = path
        self._max_bytes = max_bytes
        self._after_s, self._max_s = republish_after_s, republish_max_s
        self._now_s = now_s
        self._records: dict[str, Record] = {}
        self._n_live_bytes = self._n_file_bytes = 0
        self._unwritten: list[bytes] = []
        self._dirty = False
        # Called when there is something to write out or to sync.
        self.on_news: Callable[[], object] = lambda: None
        self.failed = False  # the disk refuses writes; usage then has one witness only
        self._fd = _open_owned(path)
        self._read()

    # -- the life of a record

    def begin(self, request_id: str, epoch: int, event: bytes) -> None:
        """Before the flush that ends the request; `write_out` comes in between."""
        self._add(request_id, epoch, event)
        self._write(_BEGUN, _EVENT_HEAD.pack(epoch, len(request_id)) + request_id.encode() + event)

    def confirm(self, request_id: str) -> None:
        """Redis accepted the end: the event is in the usage stream, or Redis has lost it since."""
        record = self._records.get(request_id)
        if record is not None and not record.confirmed:
            record.confirmed = True
            self._write(_CONFIRMED, request_id.encode())

    def forget(self, request_ids: Iterable[str]) -> int:
        """Booked by intake, or never ended here. Unknown ids are ignored. Returns how many it knew."""
        n = 0
        for request_id in request_ids:
            record = self._records.pop(request_id, None)
            if record is not None:
                n += 1
                self._n_live_bytes -= _size(record)
                self._write(_FORGOTTEN, request_id.encode())
        if n and self._n_file_bytes > max(2 * self._n_live_bytes, _COMPACT_ABOVE_BYTES):
            try:
                self._compact()
            except OSError:
                self.failed = True
        return n

    def due(self, limit: int) -> list[Record]:
        """Records to announce again now, at most `limit`; each is next due after double the time."""
        now_s = self._now_s()
        found = []
        for record in self._records.values():
            if record.due_at_s <= now_s:
                record.interval_s = min(record.interval_s * 2, self._max_s)
                record.due_at_s = now_s + record.interval_s
                found.append(record)
                if len(found) == limit:
                    break
        return found

    def hasten(self) -> None:
        """All are due now: what was announced may be lost."""
        now_s = self._now_s()
        for record in self._records.values():
            record.due_at_s, record.interval_s = now_s, self._after_s

    # -- state

    @property
    def full(self) -> bool:
        """Take no new work: what is unbooked must not outgrow the disk. Running requests may still end."""
        return self.failed or self._n_live_bytes >= self._max_bytes

    @property
    def dirty(self) -> bool:
        """Whether there is anything for `sync` to do."""
        return self._dirty

    def __len__(self) -> int:
        return len(self._records)

    def pending(self) -> list[Record]:
        return list(self._records.values())

    # -- the file

    def repair(self) -> None:
        """After `failed`: write everything again; it stays failed if the disk still refuses."""
        if self.failed:
            with contextlib.suppress(OSError):
                self._compact()
                self.failed = False

    def write_out(self) -> None:
        """Hand what has gathered to the operating system. A full disk must not keep a request from ending: it is
        remembered in `failed`.
        """
        if not self._unwritten:
            return
        data = b"".join(self._unwritten)
        self._unwritten.clear()
        try:
            self._append(self._fd, data)
        except OSError:
            self.failed = True
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._n_file_bytes)

    def sync(self) -> None:
        """fsync what was written out since the last call. Meant for another thread; errors are raised there."""
        if self._dirty:
            self._dirty = False
            fd = os.dup(self._fd)  # compaction may replace ours meanwhile
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)

    def close(self, *, delete_if_empty: bool = False) -> None:
        if self._fd < 0:
            return
        self.write_out()
        if delete_if_empty and not self._records:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
        os.close(self._fd)
        self._fd = -1

    def _add(self, request_id: str, epoch: int, event: bytes) -> None:
        old = self._records.pop(request_id, None)
        if old is not None:
            self._n_live_bytes -= _size(old)
        due_at_s = self._now_s() + self._after_s
        record = Record(request_id, epoch, event, False, due_at_s, self._after_s)
        self._records[request_id] = record
        self._n_live_bytes += _size(record)

    def _write(self, kind: int, payload: bytes) -> None:
        """One more record for the next `write_out`."""
        self._unwritten.append(_framed(kind, payload))
        if len(self._unwritten) == 1:
            self.on_news()
        if len(self._unwritten) >= _MAX_UNWRITTEN:
            self.write_out()

    def _append(self, fd: int, data: bytes) -> None:
        if os.write(fd, data) != len(data):
            raise OSError(f"{self.path.name}: the disk is full")
        self._n_file_bytes += len(data)
        self._dirty = True

    def _read(self) -> None:
        data = self.path.read_bytes()
        n_good = 0
        for end, kind, payload in _frames(data):
            n_good = end
            if kind == _BEGUN:
                epoch, n_id = _EVENT_HEAD.unpack_from(payload)
                at = _EVENT_HEAD.size + n_id
                self._add(payload[_EVENT_HEAD.size : at].decode(), epoch, payload[at:])
            elif kind == _CONFIRMED and (record := self._records.get(payload.decode())):
                record.confirmed = True
            elif kind == _FORGOTTEN and (gone := self._records.pop(payload.decode(), None)):
                self._n_live_bytes -= _size(gone)
        if n_good < len(data):
            os.ftruncate(self._fd, n_good)
        self._n_file_bytes = n_good

    def _compact(self) -> None:
        """Rewrite with live records only: bounded by `max_bytes`, in practice a few KB. On OSError the old
        file stays in use.
        """
        scratch = self.path.with_suffix(".new")
        scratch.unlink(missing_ok=True)
        fd, n_before = _open_owned(scratch), self._n_file_bytes
        self._n_file_bytes = 0
        try:
            for record in self._records.values():
                head = _EVENT_HEAD.pack(record.epoch, len(record.request_id))
                self._append(fd, _framed(_BEGUN, head + record.request_id.encode() + record.event))
                if record.confirmed:
                    self._append(fd, _framed(_CONFIRMED, record.request_id.encode()))
            os.fdatasync(fd)
            scratch.rename(self.path)
        except OSError:
            os.close(fd)
            self._n_file_bytes = n_before
            raise
        self._unwritten.clear()  # all of it is in the records
        old_fd, self._fd = self._fd, fd
        os.close(old_fd)


def _open_owned(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise SpoolBusy(f"{path.name} is owned by another process") from None
    return fd


def _framed(kind: int, payload: bytes) -> bytes:
    return _HEADER.pack(kind, len(payload), zlib.crc32(payload)) + payload


def _size(record: Record) -> int:
    return _HEADER.size + _EVENT_HEAD.size + len(record.request_id) + len(record.event)


def _frames(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(end position, kind, payload) of every whole, undamaged record from the start."""
    at = 0
    while at + _HEADER.size <= len(data):
        kind, length, crc = _HEADER.unpack_from(data, at)
        start = at + _HEADER.size
        payload = data[start : start + length]
        if len(payload) != length or zlib.crc32(payload) != crc or not _BEGUN <= kind <= _FORGOTTEN:
            return
        at = start + length
        yield at, kind, payload
