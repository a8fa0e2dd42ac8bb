"""Ending local machines: all of theirs, nobody else's."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local.machines import end_machines
from infra.local.process import find_marked, identity_of, kill_marked
from infra.providers.local import MARK
from tests.infra.local.conditions import until

# An agent with a replica in a session of its own; `stubborn` ignores SIGTERM.
AGENT = """
import os, signal, subprocess, sys, time
if "stubborn" in sys.argv: signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["/bin/sleep", "300"], start_new_session=True)
print("up", flush=True)
time.sleep(300)
"""


class Machines:
    def __init__(self, var: Path) -> None:
        self.var = var
        self.processes: list[subprocess.Popen[str]] = []
        self.started: list[str] = []

    def start(self, machine_id: str, *args: str) -> subprocess.Popen[str]:
        agent = subprocess.Popen(
            [sys.executable, "-c", AGENT, *args],
            env={**os.environ, MARK: machine_id},
            start_new_session=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(agent)
        self.started.append(machine_id)
        assert agent.stdout.readline() == "up\n"
        # The environment of a process that is being executed reads as empty for an instant.
        until(lambda: self.n_processes(machine_id) == 2, "the agent and its replica to carry the mark")
        directory = self.var / "machines" / machine_id
        directory.mkdir(parents=True)
        identity = identity_of(agent.pid)
        record = {"pid": identity.pid, "start_time": identity.start_ticks}
        (directory / "agent.pid").write_text(json.dumps(record))
        return agent

    def n_processes(self, machine_id: str) -> int:
        return len(find_marked(f"{MARK}={machine_id}"))


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    machines = Machines(tmp_path)
    yield machines
    for process in machines.processes:
        process.kill()
        process.wait()
        process.stdout.close()
    for machine_id in machines.started:
        kill_marked(f"{MARK}={machine_id}")


@pytest.mark.parametrize("kind", ["polite", "stubborn"])
def test_agent_and_everything_it_started_are_ended(machines: Machines, kind: str) -> None:
    machines.start("aa11", kind)
    assert machines.n_processes("aa11") == 2
    assert end_machines(machines.var, grace_s=0.3) == ["aa11"]
    assert machines.n_processes("aa11") == 0
    assert end_machines(machines.var) == []


def test_replicas_of_a_dead_agent_are_ended(machines: Machines) -> None:
    agent = machines.start("bb22")
    agent.kill()
    agent.wait()
    assert machines.n_processes("bb22") == 1
    assert end_machines(machines.var, grace_s=0.1) == ["bb22"]
    assert machines.n_processes("bb22") == 0


def test_machine_of_another_data_directory_and_a_reused_pid_are_left_alone(
    machines: Machines, tmp_path: Path
) -> None:
    elsewhere = Machines(tmp_path / "elsewhere")
    agent = elsewhere.start("cc33")
    try:
        directory = machines.var / "machines" / "dd44"
        directory.mkdir(parents=True)
        identity = identity_of(agent.pid)
        (directory / "agent.pid").write_text(
            json.dumps({"pid": identity.pid, "start_time": identity.start_ticks})
        )
        assert end_machines(machines.var, grace_s=0.1) == []
        assert elsewhere.n_processes("cc33") == 2
    finally:
        end_machines(elsewhere.var, grace_s=0.1)
        agent.wait()
        agent.stdout.close()
    until(lambda: elsewhere.n_processes("cc33") == 0, "the other machine to be gone")
