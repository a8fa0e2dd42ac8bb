"""Keeping a supervised process down for a while: a note per process that the supervisor reads before it restarts it.

Written by drills, and by an operator who needs a server away (`var/hold/<name>`, an instant). A note that nobody
removes runs out by itself, so that no outage outlives whoever asked for it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from infra.local.privatefile import write_private_text

MAX_S = 600.0


@contextlib.contextmanager
def held(var: Path, name: str, most_s: float) -> Iterator[None]:
    """Inside, the supervisor of `var` does not start `name` again; for `most_s` seconds (600 at most) if we die."""
    path = _note(var, name)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    write_private_text(path, f"{time.time() + min(most_s, MAX_S):.3f}\n")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def is_held(var: Path, name: str) -> bool:
    """Whether a note that has not run out names this process. An unreadable note holds nothing."""
    try:
        until_s = float(_note(var, name).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return False
    return 0 < until_s - time.time() <= MAX_S


def _note(var: Path, name: str) -> Path:
    return var / "hold" / name
