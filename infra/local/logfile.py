"""Log files of the local stack: kept bounded while their writer holds them open, and read from the end.

Writers append (O_APPEND), so a file may be emptied under them. Called by the supervisor and `manage.py logs`.
"""

import shutil
from collections import deque
from pathlib import Path

MAX_BYTES = 20 << 20  # and as much again in <name>.1


def bound_log(path: Path, max_bytes: int = MAX_BYTES) -> None:
    """Move the content aside to <name>.1 once it exceeds `max_bytes`; lines written meanwhile may be lost."""
    try:
        if path.stat().st_size <= max_bytes:
            return
    except FileNotFoundError:
        return
    previous = path.with_name(path.name + ".1")
    shutil.copyfile(path, previous)
    previous.chmod(0o600)
    with path.open("r+b") as file:
        file.truncate(0)


def log_tail(path: Path, n_lines: int = 15) -> str:
    """The last lines; empty when there is no file."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return "".join(deque(file, maxlen=n_lines)).rstrip()
    except FileNotFoundError:
        return ""
