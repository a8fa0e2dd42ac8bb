"""The watcher's hand in Postgres: writes reports into rows, ticks deployments, reads the table anew.

One thread, one thing at a time. Notes and wishes for ticks are bounded; when Postgres is away they wait, and the
thread tries again with growing pauses. What overflows is found again by the scans, so nothing is lost for good.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from uuid import UUID

import structlog
from django.db import close_old_connections, connections

from autoscaler import reconcile, records
from autoscaler.policy.machines import Silence
from autoscaler.tick import House, tick
from autoscaler.watch import table as tables
from autoscaler.watch.table import Table
from workers.contract import ReplicaStatus

log = structlog.get_logger("corral.autoscaler")

MAX_NOTES = 10_000
MAX_TICKS = 10_000
NOTES_PER_STEP = 100
TABLE_EVERY_S = 2.0
BUSY_RETRY_S = 0.2
BACKOFF_FIRST_S = 0.2
BACKOFF_MAX_S = 5.0


@dataclass(frozen=True, slots=True)
class Reported:
    """A machine announced a replica's phase."""

    machine: str
    status: ReplicaStatus


@dataclass(frozen=True, slots=True)
class Lost:
    """The watcher gave a replica up."""

    replica: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class MachineAnswers:
    """An enrolled machine's agent beats."""

    machine: str


@dataclass(frozen=True, slots=True)
class MachineLeaves:
    """A machine's agent was given notice that it will be taken away."""

    machine: str
    ends_in_ms: int


@dataclass(frozen=True, slots=True)
class MachineSilent:
    """A machine's agent does not beat any more. `n_silent` of `n_machines` are silent with it."""

    machine: str
    silent_s: float = 0.0
    n_silent: int = 1
    n_machines: int = 1


@dataclass(frozen=True, slots=True)
class WatchBegins:
    """This watcher became active: machines may have ended and Redis may have lost what we told it."""


@dataclass(frozen=True, slots=True)
class CellEmptied:
    """Redis was restarted or replaced: users, desired replicas and routes may be missing."""


Note = Reported | Lost | MachineAnswers | MachineLeaves | MachineSilent | WatchBegins | CellEmptied


class Recorder:
    """Queue of notes and ticks, and the thread that works them off. `step` does one turn (tests call it)."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.table = Table()
        self.n_dropped = 0
        self._notes: deque[Note] = deque()
        self._ticks: dict[str, float] = {}  # deployment -> not before (monotonic)
        self._table_due_s = 0.0
        self._changed = threading.Condition()
        self._stop = False
        self._thread: threading.Thread | None = None

    # -- for the watcher's thread

    def note(self, note: Note) -> None:
        with self._changed:
            if len(self._notes) >= MAX_NOTES:
                self.n_dropped += 1
                return
            self._notes.append(note)
            self._changed.notify()

    def want_tick(self, deployment: str, not_before_s: float = 0.0) -> None:
        """Tick this deployment as soon as possible; wishes for the same one are merged."""
        with self._changed:
            if deployment in self._ticks or len(self._ticks) < MAX_TICKS:
                self._ticks[deployment] = min(self._ticks.get(deployment, not_before_s), not_before_s)
                self._changed.notify()

    def want_table(self) -> None:
        """The watcher heard of something that the table does not have."""
        with self._changed:
            self._table_due_s = 0.0
            self._changed.notify()

    # -- the thread

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="corral-recorder", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        with self._changed:
            self._stop = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        n_failures = 0
        while not self._stop:
            try:
                close_old_connections()
                self.step()
                n_failures = 0
            except Exception as error:  # a recorder that stopped would leave the cell without control
                n_failures += 1
                pause_s = min(BACKOFF_FIRST_S * 2 ** min(n_failures - 1, 10), BACKOFF_MAX_S)
                log.warning("recorder.failed", error=f"{type(error).__name__}: {error}", pause_s=pause_s)
                connections.close_all()
                self._wait(pause_s)
                continue
            self._wait(self._pause_s())
        connections.close_all()

    def step(self) -> None:
        """Notes, then the table when it is due, then ticks. Raises django.db errors with nothing lost."""
        n_noted = 0
        while n_noted < NOTES_PER_STEP and self._notes:
            self._record(self._notes[0])
            self._notes.popleft()
            n_noted += 1
        if n_noted or time.monotonic() >= self._table_due_s:
            self._read_table()
        if self._run_ticks():
            self._read_table()

    def _read_table(self) -> None:
        with self._changed:
            self._table_due_s = time.monotonic() + TABLE_EVERY_S
        self.table = tables.read(self.house.cell.keys.cell, self.table.version + 1)

    def _record(self, note: Note) -> None:
        cell = self.house.cell
        touched: list[UUID] = []
        match note:
            case Reported(machine, status):
                did = records.replica_reported(UUID(hex=machine), status, cell)
                touched = [did] if did else []
            case Lost(replica, code, message):
                did = records.replica_lost(UUID(hex=replica), code, message, cell)
                touched = [did] if did else []
            case MachineAnswers(machine):
                touched = records.machine_answers(UUID(hex=machine))
            case MachineLeaves(machine, ends_in_ms):
                touched = records.machine_leaves(UUID(hex=machine), ends_in_ms)
            case MachineSilent(machine, silent_s, n_silent, n_machines):
                silence = Silence(silent_s, n_silent, n_machines)
                found = reconcile.check_machine(UUID(hex=machine), self.house, silence)
                touched = list(found.deployments)
            case WatchBegins():
                touched = list(reconcile.reconcile(self.house).deployments)
            case CellEmptied():
                n = reconcile.restore(self.house)
                log.warning("cell.restored", n=n)
        for deployment_id in touched:
            self.want_tick(deployment_id.hex)

    def _run_ticks(self) -> bool:
        """Whether any tick ordered something."""
        now_s = time.monotonic()
        with self._changed:
            due = [did for did, not_before_s in self._ticks.items() if not_before_s <= now_s]
            for did in due:
                del self._ticks[did]
        ordered = False
        for index, did in enumerate(due):
            try:
                result = tick(UUID(hex=did), self.house)
            except Exception:
                for rest in due[index:]:
                    self.want_tick(rest, time.monotonic() + BUSY_RETRY_S)
                raise
            if result.busy:
                self.want_tick(did, time.monotonic() + BUSY_RETRY_S)
            ordered = ordered or bool(result.decision and result.decision.commands)
        return ordered

    def _pause_s(self) -> float:
        with self._changed:
            if self._notes:
                return 0.0
            due_s = min([self._table_due_s, *self._ticks.values()])
        return max(0.0, due_s - time.monotonic())

    def _wait(self, timeout_s: float) -> None:
        with self._changed:
            if not self._stop and timeout_s > 0:
                self._changed.wait(timeout_s)
