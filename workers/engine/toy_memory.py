"""Memory that the toy engine really takes, so that tests can see a sleep give it back.

What would be an accelerator's memory are two anonymous mappings, weights and KV cache, both written to. Asleep at
level 1 the weights are one copy in RAM and the rest is the kernel's again; at level 2 nothing is kept, and the weights
are made again as a disk would give them. Whoever wakes gets the very same weights, or an error.
"""

from __future__ import annotations

import mmap
import zlib
from typing import Final

_PIECE: Final = 1 << 16


class ToyMemory:
    """Awake when made."""

    def __init__(self, n_weights: int, n_kv: int) -> None:
        self._n_weights, self._n_kv = n_weights, n_kv
        self._kept: bytes | None = None
        self._weights: mmap.mmap | None = _made(n_weights)
        self._kv: mmap.mmap | None = _filled(n_kv)
        self._crc = zlib.crc32(self._weights)

    @property
    def n_taken(self) -> int:
        """Bytes of what would be the accelerator's."""
        return len(self._weights or b"") + len(self._kv or b"")

    @property
    def n_kept(self) -> int:
        """Bytes of weights in RAM beside."""
        return len(self._kept or b"")

    def sleep(self, level: int) -> None:
        if self._weights is None or self._kv is None:
            return
        if level == 1:
            self._kept = self._weights[:]
        self._weights.close()
        self._kv.close()
        self._weights = self._kv = None

    def wake(self) -> bool:
        """False when the weights are not what they were."""
        if self._weights is None:
            if self._kept is None:
                self._weights = _made(self._n_weights)
            else:
                self._weights = mmap.mmap(-1, self._n_weights)
                self._weights[:] = self._kept
            self._kept = None
            self._kv = _filled(self._n_kv)
        return zlib.crc32(self._weights) == self._crc


def _made(n: int) -> mmap.mmap:
    """Weights: each piece its own bytes, always the same."""
    memory = mmap.mmap(-1, n)
    for at in range(0, n, _PIECE):
        piece = (at // _PIECE).to_bytes(8, "little") * (_PIECE // 8)
        memory[at : at + _PIECE] = piece[: min(_PIECE, n - at)]
    return memory


def _filled(n: int) -> mmap.mmap:
    """Written to, or the kernel would give no page for it."""
    memory = mmap.mmap(-1, n)
    for at in range(0, n, mmap.PAGESIZE):
        memory[at] = 1
    return memory
