"""A version that is still arriving: how far each of its files may be read, told by who fetches to who loads.

A small file beside the version's directory: the fetcher (the agent's thread, in ModelStore.ensure) holds the kernel's
lock on it and writes byte counts; a loader in another process polls them. The lock ends with the fetcher's process, so
nobody waits for the dead. What is not verified whole in the end is never served: `verified` is asked last.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

POLL_S: Final = 0.004
STALL_S: Final = 180.0  # without one more byte; a transfer gives up by itself long before
_ARRIVING, _VERIFIED, _FAILED = 0, 1, 2
_WORD: Final = struct.Struct("<Q")
_MAX_HEAD_BYTES: Final = 4 << 20


class ArrivalFailed(RuntimeError):  # noqa: N818
    """The version will not come. `code` as of ModelStoreError; nothing that was loaded of it may be served."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


_ABANDONED: Final = ArrivalFailed("source_unreachable", "who fetched the model has ended")


class _Head(msgspec.Struct):
    names: tuple[str, ...]


class _Failure(msgspec.Struct):
    code: str
    message: str


def board_of(directory: Path) -> Path:
    """Where the board of the version that arrives in `directory` lies."""
    return directory.parent / ".incoming" / f"{directory.name}.board"


class Board:
    """The fetcher's side. `close` removes it: from then on the version's manifest speaks for itself."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        self._path = board_of(directory)
        self._path.unlink(missing_ok=True)  # of a fetcher that died; its readers have noticed
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        draft = self._path.with_suffix(f".{os.getpid()}.draft")
        draft.unlink(missing_ok=True)
        self._descriptor = os.open(draft, flags, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        head = msgspec.json.encode(_Head(tuple(names)))
        head += b" " * (-len(head) % 8)
        words = bytes(8 * (1 + len(names)))
        os.pwrite(self._descriptor, _WORD.pack(len(head)) + head + words, 0)
        self._at = {name: 8 + len(head) + 8 * n for n, name in enumerate(names, start=1)}
        self._state_at = 8 + len(head)
        self._end_at = self._state_at + len(words)
        draft.rename(self._path)

    def ready(self, name: str, n_bytes: int) -> None:
        """The first so many bytes of the file may be read."""
        os.pwrite(self._descriptor, _WORD.pack(n_bytes), self._at[name])

    def verified(self) -> None:
        """Every byte of every file is what the manifest says."""
        os.pwrite(self._descriptor, _WORD.pack(_VERIFIED), self._state_at)

    def failed(self, code: str, message: str) -> None:
        os.pwrite(self._descriptor, msgspec.json.encode(_Failure(code, message)), self._end_at)
        os.pwrite(self._descriptor, _WORD.pack(_FAILED), self._state_at)

    def close(self) -> None:
        if self._descriptor >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1


class Arrival:
    """The loader's side; each process opens its own. A version that is whole already is verified from the start."""

    def __init__(self, directory: Path, manifest_name: str = "manifest.json") -> None:
        self._directory = directory
        self._at: dict[str, int] = {}
        self._state_at = self._end_at = 0
        self._is_whole = False
        self._descriptor = -1
        try:
            self._descriptor = os.open(board_of(directory), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            # The manifest comes before the board goes, so without both it is neither here nor on its way.
            if not (directory / manifest_name).exists():
                raise ArrivalFailed("source_unreachable", "the fetch of the model has ended") from None
            self._is_whole = True
            return
        n_head = _WORD.unpack(os.pread(self._descriptor, 8, 0))[0]
        head = msgspec.json.decode(os.pread(self._descriptor, min(n_head, _MAX_HEAD_BYTES), 8), type=_Head)
        self._state_at = 8 + n_head
        self._at = {name: self._state_at + 8 * n for n, name in enumerate(head.names, start=1)}
        self._end_at = self._state_at + 8 * (1 + len(head.names))

    def ready(self, name: str, n_bytes: int) -> None:
        """Return when the first `n_bytes` of the file may be read. Raises ArrivalFailed."""
        if self._is_whole:
            return
        if name not in self._at:
            raise ArrivalFailed("bad_weights", f"{name} is no file of this version")
        self._await(lambda: self._word(self._at[name]), n_bytes)

    def verified(self) -> None:
        """Return when the whole version is verified. Raises ArrivalFailed."""
        if not self._is_whole:
            self._await(lambda: 0, 1)

    def failure(self) -> ArrivalFailed | None:
        """Why it will not come, if that is known by now."""
        if self._is_whole or self._word(self._state_at) == _VERIFIED:
            return None
        if self._word(self._state_at) == _FAILED:
            return self._told()
        return _ABANDONED if self._is_abandoned() else None

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _await(self, count: Callable[[], int], wanted: int) -> None:
        last, moved_s, looked_s = -1, time.monotonic(), 0.0
        while True:
            state = self._word(self._state_at)
            if state == _FAILED:
                raise self._told()
            if state == _VERIFIED or count() >= wanted:
                return
            now_s, progress = time.monotonic(), sum(self._word(at) for at in self._at.values())
            if progress != last:
                last, moved_s = progress, now_s
            if now_s - looked_s > 1.0:
                looked_s = now_s
                if self._is_abandoned():
                    raise _ABANDONED
            if now_s - moved_s > STALL_S:
                raise ArrivalFailed("source_unreachable", f"nothing came for {STALL_S:g} s")
            time.sleep(POLL_S)

    def _word(self, at: int) -> int:
        return int(_WORD.unpack(os.pread(self._descriptor, 8, at))[0])

    def _is_abandoned(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        return self._word(self._state_at) == _ARRIVING

    def _told(self) -> ArrivalFailed:
        try:
            told = msgspec.json.decode(os.pread(self._descriptor, 4096, self._end_at), type=_Failure)
        except msgspec.MsgspecError:
            return ArrivalFailed("source_unreachable", "the fetch of the model failed")
        return ArrivalFailed(told.code, told.message)
