"""Log files of the local stack: kept bounded while their writer holds them open, and read from the end.

Writers append (O_APPEND), so a file may be emptied under them. Called by the supervisor and `manage.py logs`.
"""

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
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


def follow(paths: Mapping[str, Path], *, n_lines: int, stop: Callable[[], bool]) -> Iterator[tuple[str, str]]:
    """(name, line) of the last `n_lines` of each file, then of what is written, until `stop` says so.

    Files may appear later, and may be emptied under us.
    """
    offsets: dict[str, int] = {}
    for name, path in paths.items():
        yield from ((name, line) for line in log_tail(path, n_lines).splitlines())
        offsets[name] = path.stat().st_size if path.exists() else 0
    while not stop():
        quiet = True
        for name, path in paths.items():
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                continue
            if size < offsets[name]:
                offsets[name] = 0
            if size == offsets[name]:
                continue
            with path.open("rb") as file:
                file.seek(offsets[name])
                chunk = file.read(1 << 20)
            whole, newline, _ = chunk.rpartition(b"\n")
            if not newline and len(chunk) < 1 << 20:
                continue  # half a line: the rest is on its way
            offsets[name] += len(whole) + len(newline) or len(chunk)
            quiet = False
            yield from ((name, line) for line in (whole or chunk).decode(errors="replace").split("\n"))
        if quiet:
            time.sleep(0.2)
