"""What the disk knows of the running stack: a lock, a state file, and how to end what a dead run left.

var/stack.lock is held for the life of the supervisor (the kernel frees it, however that ends);
var/stack.json says what runs where (mode 600, replaced atomically). Called by the supervisor and by
`status`, `down`, `logs`.
"""

import contextlib
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.local.privatefile import make_traversable, read_json, write_private_json
from infra.local.process import ProcessIdentity, command_line, end_group, is_alive, kill_marked


class AlreadyRunningError(RuntimeError):
    """Another supervisor holds the lock of this data directory."""


@dataclass(frozen=True)
class ProcessRecord:
    """One process of the stack as last recorded."""

    name: str
    phase: str
    pid: int | None
    start_ticks: int | None
    marker: str
    stop_signal: int
    n_restarts: int
    detail: str
    log: str | None

    def identity(self) -> ProcessIdentity | None:
        """The process it speaks of, running or not."""
        if self.pid is None or self.start_ticks is None:
            return None
        return ProcessIdentity(self.pid, self.start_ticks)


@dataclass(frozen=True)
class StackRecord:
    """The state file.

    `phase` is starting, running, stopping or stopped; `facts` are ports and URLs; `run_id` is in the
    environment of everything it started.
    """

    phase: str
    run_id: str
    supervisor: ProcessIdentity
    started_at: str
    facts: dict[str, Any]
    processes: tuple[ProcessRecord, ...]

    def supervisor_runs(self) -> bool:
        """Whether the supervisor that wrote it is alive."""
        return is_alive(self.supervisor)


def take_lock(var: Path) -> int:
    """Take the lock until the returned descriptor is closed; AlreadyRunningError names the holder."""
    make_traversable(var)
    descriptor = os.open(var / "stack.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise AlreadyRunningError(
            f"already running (pid {holder}): `manage.py status` shows it, `manage.py down` stops it"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


@contextlib.contextmanager
def hold_stack(var: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Be the one supervisor of this data directory, with what a killed one left behind ended first.

    Raises AlreadyRunningError.
    """
    lock = take_lock(var)
    try:
        record = read_state(var)
        for name in end_leftovers(record) if record else []:
            say(f"{name}: left over by a run that was killed, ended")
        yield
    finally:
        os.close(lock)


def is_locked(var: Path) -> bool:
    """Whether a supervisor holds the lock now."""
    try:
        descriptor = os.open(var / "stack.lock", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def write_state(var: Path, record: StackRecord) -> None:
    """Replace the state file."""
    write_private_json(
        var / "stack.json",
        {
            "phase": record.phase,
            "run_id": record.run_id,
            "supervisor": vars(record.supervisor),
            "started_at": record.started_at,
            "facts": record.facts,
            "processes": [vars(process) for process in record.processes],
        },
    )


def read_state(var: Path) -> StackRecord | None:
    """The last recorded state; None when this data directory never had a stack."""
    raw = read_json(var / "stack.json")
    if raw is None:
        return None
    try:
        return StackRecord(
            phase=raw["phase"],
            run_id=raw["run_id"],
            supervisor=ProcessIdentity(**raw["supervisor"]),
            started_at=raw["started_at"],
            facts=raw["facts"],
            processes=tuple(ProcessRecord(**process) for process in raw["processes"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{var / 'stack.json'} is not of this version ({error}); remove it") from error


def end_leftovers(record: StackRecord) -> list[str]:
    """End processes that outlived their supervisor; names of those ended, last started first.

    Only what has the recorded pid, start time and marker in its command line, and then what carries the
    mark of the recorded run in its environment: never a stranger.
    """
    ended = []
    for process in reversed(record.processes):
        identity = process.identity()
        if identity is None or process.marker not in " ".join(command_line(identity.pid)):
            continue
        if end_group(identity, stop_signal=signal.Signals(process.stop_signal), grace_s=5.0):
            ended.append(process.name)
    if kill_marked(run_mark(record.run_id)):
        ended.append("their children")
    return ended


def run_mark(run_id: str) -> str:
    """What a run puts into the environment of all it starts."""
    return f"CORRAL_STACK_RUN={run_id}"
