"""Sign of life of a front to the agent of its machine: one small file, so that it needs neither Redis nor a
pipe.

The front's loop writes it every beat; the agent kills a front whose beat is old. Instants are
CLOCK_MONOTONIC, the same for all processes of a machine.
"""

from __future__ import annotations

import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# The last byte was a bool: 0 and 1 mean what they meant, so that an agent and a front of neighbouring versions agree.
_FORMAT: Final = struct.Struct("<4sdB")
_MAGIC: Final = b"beat"
_READY, _ASLEEP = 1, 2


class BeatFile:
    """The writing end."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.at_s = 0.0
        self.touch(ready=False)

    def touch(self, *, ready: bool, asleep: bool = False) -> None:
        """`ready`: the replica has been READY, so starting is over."""
        self.at_s = time.monotonic()
        os.pwrite(self._fd, _FORMAT.pack(_MAGIC, self.at_s, ready * _READY | asleep * _ASLEEP), 0)

    def close(self) -> None:
        os.close(self._fd)


@dataclass(frozen=True, slots=True)
class Beat:
    """The last beat."""

    at_s: float
    ready: bool
    asleep: bool = False


def read_beat(path: Path) -> Beat | None:
    """None before the first."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(data) != _FORMAT.size or data[:4] != _MAGIC:
        return None
    _, at_s, flags = _FORMAT.unpack(data)
    return Beat(at_s, bool(flags & _READY), bool(flags & _ASLEEP))
