"""Runs a set of processes: starts them in order, restarts what dies, stops all, and leaves no orphan.

Called by `manage.py up` through stack.py, in the main thread of a process of its own. Children live in
their own sessions and are tied to this process by the kernel, so that not even kill -9 of the supervisor
leaves them behind. It knows nothing of what it runs; it must never block longer than one readiness probe (2
s).
"""

import contextlib
import os
import secrets
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from infra.local.hold import is_held
from infra.local.logfile import bound_log, log_tail
from infra.local.process import Account, ProcessIdentity, identity_of, kill_session, spawn
from infra.local.restart import RestartPolicy
from infra.local.rolling import take_request
from infra.local.stackstate import (
    ProcessRecord,
    StackRecord,
    run_mark,
    write_state,
)

_BUSY_TICK_S = 0.05
_IDLE_TICK_S = 1.0  # a death wakes us at once (SIGCHLD)
_LOG_CHECK_S = 10.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Phase(StrEnum):
    """Where a process is in its life."""

    WAITING = "waiting"  # for what it depends on
    STARTING = "starting"
    READY = "ready"
    DONE = "done"  # a one-shot that ended well
    BACKING_OFF = "backing-off"  # died; the next start is due later
    FAILED = "failed"  # given up
    STOPPED = "stopped"


@dataclass(frozen=True)
class ProcessSpec:
    """How to run one process.

    `argv` may be a function when it is known only after `before_start`, `env` when it changes between
    starts. `marker` is text of its command line by which a leftover is recognised. `ready` gets the pid;
    None means ready once started. A `one_shot` is ready when it ends with 0. When a `required` process fails
    during the start, all is stopped. `log_path` None: our own output.
    """

    name: str
    argv: Sequence[str] | Callable[[], Sequence[str]]
    marker: str
    env: Mapping[str, str] | Callable[[], Mapping[str, str]]
    log_path: Path | None
    cwd: Path = Path("/")
    account: Account | None = None
    depends_on: tuple[str, ...] = ()
    before_start: Callable[[], None] | None = None
    ready: Callable[[int], bool] | None = None
    ready_timeout_s: float = 30.0
    on_ready: Callable[[], None] | None = None
    on_stopped: Callable[[], None] | None = None
    one_shot: bool = False
    required: bool = True
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    stop_signal: signal.Signals = signal.SIGTERM
    stop_grace_s: float = 10.0
    death_signal: signal.Signals = signal.SIGKILL


Report = Callable[[str, Phase, str, float], None]
"""Told of every change: name, phase, detail, seconds since that process was last started."""


class _Child:
    """A spec and what became of it."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self.phase = Phase.WAITING
        self.popen: subprocess.Popen[bytes] | None = None
        self.identity: ProcessIdentity | None = None
        self.started_s = 0.0
        self.retry_s = 0.0
        self.deaths_s: list[float] = []
        self.n_restarts = 0
        self.detail = ""

    def record(self) -> ProcessRecord:
        return ProcessRecord(
            name=self.spec.name,
            phase=str(self.phase),
            pid=self.identity.pid if self.identity else None,
            start_ticks=self.identity.start_ticks if self.identity else None,
            marker=self.spec.marker,
            stop_signal=int(self.spec.stop_signal),
            n_restarts=self.n_restarts,
            detail=self.detail,
            log=str(self.spec.log_path) if self.spec.log_path else None,
        )

    def exit_code(self) -> int | None:
        """Status of the process if it has ended (the rest of its session is then ended too)."""
        if self.popen is None:
            return None
        if os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        kill_session(self.popen.pid)  # before it is reaped: until then the number is surely its own
        code = self.popen.wait()
        self.popen = self.identity = None
        return code


class Supervisor:
    """`run` blocks until a stop signal, or until the start failed; call it once, from the main thread."""

    def __init__(
        self, specs: Sequence[ProcessSpec], *, var: Path, facts: dict[str, Any], report: Report
    ) -> None:
        names = [spec.name for spec in specs]
        for index, spec in enumerate(specs):
            unknown = set(spec.depends_on) - set(names[:index])
            if unknown or names.count(spec.name) > 1:
                raise ValueError(
                    f"{spec.name}: depends on {sorted(unknown)}, not before it in the list, or twice"
                )
        self._children = {spec.name: _Child(spec) for spec in specs}
        self._var = var
        self._facts = facts
        self._report = report
        self._phase = "starting"
        self._started_at = datetime.now(UTC).isoformat(timespec="seconds")
        self._run_id = secrets.token_hex(8)
        self._n_stop_signals = 0
        self._next_log_check_s = 0.0

    def run(self) -> int:
        """0 after an ordered stop, 1 when something required did not start. The caller holds the stack."""
        with self._signals() as wakeups:
            try:
                return self._loop(wakeups)
            finally:
                self._stop()

    # -- the loop --------------------------------------------------------------------------------------------

    def _loop(self, wakeups: int) -> int:
        self._save()
        while not self._n_stop_signals:
            for child in self._children.values():
                self._step(child, time.monotonic())
            phases = {child.phase for child in self._children.values() if child.spec.required}
            if self._phase == "starting":
                if Phase.FAILED in phases:
                    return 1
                if phases <= {Phase.READY, Phase.DONE}:
                    self._phase = "running"
                    self._save()
            self._bound_logs()
            busy = {child.phase for child in self._children.values()} & {
                Phase.WAITING,
                Phase.STARTING,
                Phase.BACKING_OFF,
            }
            select.select([wakeups], [], [], _BUSY_TICK_S if busy else _IDLE_TICK_S)
            with contextlib.suppress(BlockingIOError):
                os.read(wakeups, 4096)
        return 0

    def _step(self, child: _Child, now_s: float) -> None:
        spec = child.spec
        if child.phase is Phase.WAITING:
            if all(self._children[name].phase in (Phase.READY, Phase.DONE) for name in spec.depends_on):
                self._start(child, now_s)
        elif child.phase is Phase.BACKING_OFF:
            if now_s >= child.retry_s and not is_held(self._var, spec.name):
                child.n_restarts += 1
                self._start(child, now_s)
        elif child.phase in (Phase.STARTING, Phase.READY):
            code = child.exit_code()
            if code is not None:
                self._ended(child, code, now_s)
            elif child.phase is Phase.STARTING:
                self._probe(child, now_s)

    def _start(self, child: _Child, now_s: float) -> None:
        spec = child.spec
        child.started_s = now_s
        try:
            if spec.before_start:
                spec.before_start()
            child.popen = spawn(
                spec.argv() if callable(spec.argv) else spec.argv,
                env={
                    **(spec.env() if callable(spec.env) else spec.env),
                    **dict([run_mark(self._run_id).split("=")]),
                },
                log_path=spec.log_path,
                cwd=spec.cwd,
                account=spec.account,
                death_signal=spec.death_signal,
            )
        except (OSError, RuntimeError) as error:  # no use in trying again: the message says what to do
            self._enter(child, Phase.FAILED, str(error))
            return
        child.identity = identity_of(child.popen.pid)
        self._enter(child, Phase.STARTING, f"pid {child.popen.pid}")

    def _probe(self, child: _Child, now_s: float) -> None:
        spec = child.spec
        if spec.one_shot or child.popen is None or (spec.ready and not spec.ready(child.popen.pid)):
            if now_s - child.started_s > spec.ready_timeout_s:
                self._kill(child)
                self._died(child, f"not ready after {spec.ready_timeout_s:g} s", now_s)
            return
        if self._after_ready(child):
            self._enter(child, Phase.READY, f"pid {child.popen.pid}")

    def _after_ready(self, child: _Child) -> bool:
        if child.spec.on_ready is None:
            return True
        try:
            child.spec.on_ready()
        except (
            Exception
        ) as error:  # whatever it is, this process is not ready and the others must be stopped well
            self._kill(child)
            self._enter(child, Phase.FAILED, f"{type(error).__name__}: {error}")
            return False
        return True

    def _kill(self, child: _Child) -> None:
        if child.popen is not None:
            kill_session(child.popen.pid)
            child.popen.wait()
            child.popen = child.identity = None

    def _ended(self, child: _Child, code: int, now_s: float) -> None:
        if child.spec.one_shot and code == 0:
            if self._after_ready(child):
                self._enter(child, Phase.DONE, "")
        else:
            reason = f"ended with {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
            self._died(child, reason, now_s)

    def _died(self, child: _Child, reason: str, now_s: float) -> None:
        if take_request(self._var, child.spec.name):
            child.retry_s = now_s
            self._enter(child, Phase.BACKING_OFF, "asked to start again")
            return
        child.deaths_s = [*child.deaths_s[-20:], now_s]
        delay_s = child.spec.restart.delay_s(child.deaths_s, now_s)
        if delay_s is None:
            tail = log_tail(child.spec.log_path) if child.spec.log_path else ""
            self._enter(child, Phase.FAILED, f"{reason}, given up" + (f"\n{tail}" if tail else ""))
        else:
            child.retry_s = now_s + delay_s
            self._enter(child, Phase.BACKING_OFF, f"{reason}, again in {delay_s:g} s")

    # -- the end ---------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        """Stop in reverse order, one by one: what uses a server is gone before the server."""
        self._phase = "stopping"
        for child in reversed(self._children.values()):
            spec = child.spec
            if child.popen is not None:
                stopped_s = time.monotonic()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.popen.pid, spec.stop_signal)
                while child.exit_code() is None:
                    grace_s = (
                        spec.stop_grace_s if self._n_stop_signals < 2 else 1.0
                    )  # asked twice: in a hurry
                    if child.popen and time.monotonic() - stopped_s > grace_s:
                        child.popen.kill()
                    time.sleep(0.01)
                self._enter(child, Phase.STOPPED, "", time.monotonic() - stopped_s)
            elif child.phase not in (Phase.FAILED, Phase.DONE):
                child.phase = Phase.STOPPED
            if spec.on_stopped:
                spec.on_stopped()
        self._phase = "stopped"
        self._save()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[int]:
        """Count stop signals, notice deaths of children; yields the descriptor that wakes `select`."""
        read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

        def _count(_signal: int, _frame: object) -> None:
            self._n_stop_signals += 1

        heard = [
            number for number in _STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN
        ]  # nohup
        previous = {number: signal.signal(number, _count) for number in heard}
        previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        try:
            yield read_end
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in previous.items():
                signal.signal(number, handler)
            os.close(read_end)
            os.close(write_end)

    # -- records ---------------------------------------------------------------------------------------------

    def _enter(self, child: _Child, phase: Phase, detail: str, elapsed_s: float | None = None) -> None:
        child.phase, child.detail = phase, detail
        self._save()
        elapsed = time.monotonic() - child.started_s if elapsed_s is None else elapsed_s
        self._report(child.spec.name, phase, detail, elapsed)

    def _save(self) -> None:
        myself = identity_of(os.getpid())
        assert myself is not None
        write_state(
            self._var,
            StackRecord(
                phase=self._phase,
                run_id=self._run_id,
                supervisor=myself,
                started_at=self._started_at,
                facts=self._facts,
                processes=tuple(child.record() for child in self._children.values()),
            ),
        )

    def _bound_logs(self) -> None:
        if time.monotonic() >= self._next_log_check_s:
            self._next_log_check_s = time.monotonic() + _LOG_CHECK_S
            for child in self._children.values():
                if child.spec.log_path:
                    bound_log(child.spec.log_path)
