"""Starting processes of the running stack again, one by one, each ready before the next is asked.

Called by rotation.py: what a process cannot learn while it runs it learns at its start. The note tells the supervisor
that an end was wanted, so that it neither backs off nor gives up.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from infra.local.privatefile import write_private_text
from infra.local.process import command_line, is_alive, wait_until
from infra.local.stackstate import ProcessRecord, StackRecord, read_state

# Gateways first: they must know what the others will write.
_ORDER: Final = ("gateway-", "web", "control", "beat")
_NOTE_LIFE_S: Final = 60.0
_BACK_WITHIN_S: Final = 120.0


def restart_all(var: Path, say: Callable[[str], None]) -> None:
    """Every process that has secrets. Raises RuntimeError naming the one that did not come back."""
    record = _running(var)
    for prefix in _ORDER:
        for process in record.processes:
            if process.name.startswith(prefix):
                _restart(var, process)
                say(f"{process.name} started again")


def take_request(var: Path, name: str) -> bool:
    """Whether this end was asked for, a short time ago; once."""
    note = _note(var, name)
    try:
        age_s = time.time() - note.stat().st_mtime
        note.unlink()
    except OSError:
        return False
    return age_s < _NOTE_LIFE_S


def _restart(var: Path, process: ProcessRecord) -> None:
    before = process.identity()
    if before is None or not is_alive(before) or process.marker not in " ".join(command_line(before.pid)):
        raise RuntimeError(f"{process.name} does not run: `manage.py status`")
    note = _note(var, process.name)
    note.parent.mkdir(mode=0o700, exist_ok=True)
    write_private_text(note, "")
    try:
        os.kill(before.pid, signal.SIGTERM)

        def is_back() -> bool:
            found = next((p for p in _running(var).processes if p.name == process.name), None)
            return found is not None and found.phase == "ready" and found.identity() != before

        if not wait_until(is_back, _BACK_WITHIN_S):
            raise RuntimeError(
                f"{process.name} did not come back in {_BACK_WITHIN_S:g} s: `manage.py logs {process.name}`"
            )
    finally:
        note.unlink(missing_ok=True)


def _running(var: Path) -> StackRecord:
    record = read_state(var)
    if record is None or not record.supervisor_runs():
        raise RuntimeError(f"no stack runs from {var}: start it with `make up`")
    return record


def _note(var: Path, name: str) -> Path:
    return var / "restart" / name
