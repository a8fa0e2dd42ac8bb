"""Which model versions lie in this machine's page cache: loading those reads no disk. Called by the agent's shelf.

Asks the kernel (mincore) about windows of pages spread over each weights file, so that tens of gigabytes cost
milliseconds. Reads nothing, and keeps nothing in memory that was not there.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Final

WINDOWS: Final = 64  # looked at in a file
PAGES: Final = 64  # each
ENOUGH: Final = 0.9  # of the pages looked at: the rest is read meanwhile

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_FAILED: Final = ctypes.c_void_p(-1).value


def is_resident(directory: Path) -> bool:
    """Whether nearly all weights of this version are in memory. False where there are none, or nobody can tell."""
    files = sorted(directory.glob("*.safetensors"))
    return bool(files) and all(resident_share(path) >= ENOUGH for path in files)


def resident_share(path: Path) -> float:
    """Of the pages looked at, evenly spread over the file; 0 where it cannot be told."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0.0
    try:
        return _share(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def _share(fd: int, size: int) -> float:
    page = mmap.PAGESIZE
    n_pages = -(-size // page)
    if not n_pages:
        return 0.0
    n_windows = min(WINDOWS, -(-n_pages // PAGES))
    n_seen = n_there = 0
    for window in range(n_windows):
        first = (n_pages - min(PAGES, n_pages)) * window // max(n_windows - 1, 1)
        n = min(PAGES, n_pages - first)
        at = _libc.mmap(None, n * page, mmap.PROT_READ, mmap.MAP_SHARED, fd, first * page)
        if at in (None, _FAILED):
            return 0.0
        told = (ctypes.c_ubyte * n)()
        failed = _libc.mincore(at, n * page, told)
        _libc.munmap(at, n * page)
        if failed:
            return 0.0
        n_seen += n
        n_there += sum(byte & 1 for byte in told)
    return n_there / n_seen
