"""The supervisor as its own process: order, restarts, giving up, stopping, and what kill -9 leaves behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.local.hold import held, is_held
from infra.local.process import identity_of, is_alive, session_members
from infra.local.stackstate import StackRecord, read_state
from tests.infra.local.conditions import until

ROOT = Path(__file__).resolve().parents[3]
SLEEPER = ["/bin/sh", "-c", "sleep 300 & wait"]  # leader and a grandchild


def _hear_interrupts() -> None:
    """Who runs the tests in the background of a shell has SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Stack:
    """Starts supervisors over one data directory and looks at what they record."""

    def __init__(self, var: Path) -> None:
        self.var = var
        self.started: list[subprocess.Popen[str]] = []

    def start(self, specs: list[dict[str, Any]]) -> subprocess.Popen[str]:
        program = subprocess.Popen(
            [sys.executable, "-m", "tests.infra.local.supervised", str(self.var), json.dumps(specs)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=_hear_interrupts,
        )
        self.started.append(program)
        return program

    def state(self) -> StackRecord | None:
        return read_state(self.var)

    def pid(self, name: str) -> int | None:
        state = self.state()
        return next((p.pid for p in state.processes if p.name == name), None) if state else None

    def wait_phase(self, phase: str, program: subprocess.Popen[str]) -> StackRecord:
        def look() -> StackRecord | None:
            state = self.state()
            return state if state and state.phase == phase and state.supervisor.pid == program.pid else None

        return until(look, f"phase {phase}")

    def wait_process(self, name: str, phase: str) -> Any:
        def look() -> Any:
            state = self.state()
            return (
                next((p for p in state.processes if p.name == name and p.phase == phase), None)
                if state
                else None
            )

        return until(look, f"{name} {phase}")


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path / "var")
    yield stack
    for program in stack.started:
        if program.poll() is None:
            program.kill()
        program.wait()
        program.stdout.close()


def test_starts_in_order_of_dependence_and_stops_in_reverse(stack: Stack, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    program = stack.start(
        [
            {
                "name": "server",
                "argv": ["/bin/sh", "-c", f"sleep 0.2; touch {ready}; sleep 300"],
                "ready_file": str(ready),
            },
            {"name": "migrate", "argv": ["/bin/true"], "one_shot": True, "depends_on": ["server"]},
            {"name": "client", "argv": SLEEPER, "depends_on": ["migrate"]},
        ]
    )
    stack.wait_phase("running", program)
    program.send_signal(signal.SIGTERM)
    output, _ = program.communicate(timeout=20)
    changes = [tuple(line.split()[:2]) for line in output.splitlines()]
    assert changes == [
        ("server", "starting"),
        ("server", "ready"),
        ("migrate", "starting"),
        ("migrate", "done"),
        ("client", "starting"),
        ("client", "ready"),
        ("client", "stopped"),
        ("server", "stopped"),
    ]
    assert program.returncode == 0
    assert stack.state().phase == "stopped"


def test_restarts_what_dies_and_counts_it(stack: Stack) -> None:
    program = stack.start([{"name": "worker", "argv": SLEEPER}])
    first = stack.wait_phase("running", program).processes[0]
    os.kill(first.pid, signal.SIGKILL)
    second = until(
        lambda: next((p for p in stack.state().processes if p.n_restarts == 1 and p.phase == "ready"), None),
        "a restart",
    )
    assert second.pid != first.pid
    assert not session_members(first.pid), "the grandchild of the dead leader must be gone"
    assert stack.state().phase == "running"


def test_what_is_held_stays_down_until_it_is_released(stack: Stack) -> None:
    program = stack.start([{"name": name, "argv": SLEEPER} for name in "ab"])
    stack.wait_phase("running", program)
    first = stack.pid("a")

    def n_starts(name: str) -> int:
        state = stack.state()
        return next(p.n_restarts for p in state.processes if p.name == name) if state else 0

    with held(stack.var, "a", 60.0):
        os.kill(first, signal.SIGKILL)
        stack.wait_process("a", "backing-off")
        for n in (1, 2):  # the second one waits twice as long as `a` would have
            os.kill(stack.pid("b"), signal.SIGKILL)
            until(lambda n=n: n_starts("b") == n and stack.pid("b"), "b started again")
        assert (n_starts("a"), stack.pid("a")) == (0, None)
    assert until(lambda: stack.pid("a"), "started again") != first


def test_a_hold_whose_maker_died_runs_out(tmp_path: Path) -> None:
    with held(tmp_path, "a", 0.05):
        assert is_held(tmp_path, "a")
        assert not is_held(tmp_path, "b")
        until(lambda: not is_held(tmp_path, "a"), "the note has run out")
    (tmp_path / "hold" / "a").write_text("99999999999")
    assert not is_held(tmp_path, "a"), "nobody is kept down for years by a typing error"


def test_gives_up_after_the_bound_and_keeps_the_rest(stack: Stack) -> None:
    program = stack.start(
        [{"name": "steady", "argv": SLEEPER}, {"name": "dying", "argv": ["/bin/sleep", "300"]}]
    )
    stack.wait_phase("running", program)
    for n_death in range(3):
        pid = until(
            lambda n=n_death: next(
                (
                    p.pid
                    for p in stack.state().processes
                    if (p.name, p.phase, p.n_restarts) == ("dying", "ready", n)
                ),
                None,
            ),
            f"start {n_death}",
        )
        os.kill(pid, signal.SIGKILL)
    record = stack.wait_process("dying", "failed")
    assert "SIGKILL" in record.detail and "given up" in record.detail
    assert is_alive(next(p for p in stack.state().processes if p.name == "steady").identity())


def test_start_that_cannot_succeed_stops_everything_and_shows_the_log(stack: Stack) -> None:
    program = stack.start(
        [
            {"name": "server", "argv": SLEEPER},
            {
                "name": "broken",
                "argv": ["/bin/sh", "-c", "echo no such table; exit 7"],
                "depends_on": ["server"],
                "one_shot": True,
            },
        ]
    )
    output, _ = program.communicate(timeout=20)
    assert program.returncode == 1
    assert "broken failed ended with 7, given up | no such table" in output
    assert output.splitlines()[-1].startswith("server stopped")


def test_optional_process_may_fail(stack: Stack) -> None:
    program = stack.start(
        [
            {"name": "server", "argv": SLEEPER},
            {"name": "extra", "argv": ["/bin/false"], "one_shot": True, "required": False},
        ]
    )
    stack.wait_process("extra", "failed")
    assert stack.wait_phase("running", program)


def test_process_that_never_becomes_ready_is_ended(stack: Stack, tmp_path: Path) -> None:
    program = stack.start(
        [{"name": "deaf", "argv": SLEEPER, "ready_file": str(tmp_path / "never"), "ready_timeout_s": 0.1}]
    )
    output, _ = program.communicate(timeout=20)
    assert program.returncode == 1
    assert output.count("deaf starting") == 3
    assert "not ready after 0.1 s, given up" in output


def test_process_that_ignores_the_stop_signal_is_killed_after_its_grace(stack: Stack) -> None:
    program = stack.start(
        [
            {
                "name": "stubborn",
                "argv": ["/bin/sh", "-c", "trap '' TERM; sleep 300 & wait; wait"],
                "stop_grace_s": 0.2,
            }
        ]
    )
    pid = stack.wait_phase("running", program).processes[0].pid
    program.send_signal(signal.SIGINT)
    assert program.wait(timeout=20) == 0
    assert not session_members(pid)


def test_kill_9_of_the_supervisor_leaves_no_orphans_and_a_second_start_works(stack: Stack) -> None:
    specs = [{"name": "server", "argv": SLEEPER}, {"name": "client", "argv": ["/bin/sleep", "300"]}]
    program = stack.start(specs)
    pids = [p.pid for p in stack.wait_phase("running", program).processes]
    program.kill()
    program.wait()
    until(lambda: not any(identity_of(pid) for pid in pids), "children to die with their supervisor")
    second = stack.start(specs)
    assert stack.wait_phase("running", second)
    assert not session_members(pids[0]), "the grandchild goes when the next run cleans up"


def test_second_supervisor_is_refused_by_name(stack: Stack) -> None:
    program = stack.start([{"name": "server", "argv": SLEEPER}])
    pid = stack.wait_phase("running", program).processes[0].pid
    second = stack.start([{"name": "server", "argv": SLEEPER}])
    output, _ = second.communicate(timeout=20)
    assert second.returncode == 3
    assert f"already running (pid {program.pid})" in output
    assert "manage.py status" in output and "manage.py down" in output
    assert stack.pid("server") == pid and identity_of(pid)


@pytest.mark.parametrize("lie", ["start time", "command line"])
def test_recorded_pid_that_is_somebody_elses_now_is_not_killed(stack: Stack, lie: str) -> None:
    program = stack.start([{"name": "server", "argv": SLEEPER}])
    stack.wait_phase("running", program)
    program.kill()
    program.wait()
    stranger = subprocess.Popen(["/bin/sleep", "300"], start_new_session=True)
    identity = identity_of(stranger.pid)
    try:
        state_path = stack.var / "stack.json"
        raw = json.loads(state_path.read_text())
        ticks = identity.start_ticks - (1 if lie == "start time" else 0)
        marker = "sleep" if lie == "start time" else "celery"
        raw["processes"][0].update(pid=stranger.pid, start_ticks=ticks, marker=marker)
        state_path.write_text(json.dumps(raw))
        second = stack.start([{"name": "server", "argv": SLEEPER}])
        stack.wait_phase("running", second)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_leftover_of_the_recorded_run_is_ended(stack: Stack) -> None:
    program = stack.start([{"name": "server", "argv": SLEEPER}])
    stack.wait_phase("running", program)
    program.kill()
    program.wait()
    leftover = subprocess.Popen(["/bin/sleep", "300"], start_new_session=True)
    try:
        state_path = stack.var / "stack.json"
        raw = json.loads(state_path.read_text())
        raw["processes"][0].update(vars(identity_of(leftover.pid)), marker="sleep")
        state_path.write_text(json.dumps(raw))
        second = stack.start([{"name": "server", "argv": SLEEPER}])
        stack.wait_phase("running", second)
        assert leftover.wait(timeout=10) == -signal.SIGTERM
    finally:
        leftover.kill()
        leftover.wait()


def test_state_file_is_private(stack: Stack) -> None:
    program = stack.start([{"name": "server", "argv": SLEEPER}])
    stack.wait_phase("running", program)
    assert (stack.var / "stack.json").stat().st_mode & 0o777 == 0o600
    assert (stack.var / "log" / "server.log").stat().st_mode & 0o777 == 0o600
