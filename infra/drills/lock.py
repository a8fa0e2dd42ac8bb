"""One drill at a time on a stack: two would strike each other's streams. Called by `manage.py drill`."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from infra.drills.scene import DrillError


@contextlib.contextmanager
def only_drill(var: Path) -> Iterator[None]:
    """Hold the lock of this data directory; the kernel frees it, however we end. DrillError when another holds it."""
    try:
        descriptor = os.open(var / "drill.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        raise DrillError(f"no stack runs from {var}: start it with `make up`") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DrillError("another drill runs on this stack: wait until it is over") from None
        yield
    finally:
        os.close(descriptor)
