"""From zero to a routed replica and back with everything real: provider, agent, zygote, toy engine, enrolment.

The requests never come from a gateway here; what is shown is that a wake-up ends in a replica that takes them,
that SIGKILL of the replica and of the agent are survived, and that ending the machine leaves nothing behind.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoscaler.models import Machine, MachineState, Replica, ReplicaPhase, StartTiming
from autoscaler.watch.recorder import Recorder
from autoscaler.watch.watcher import Watcher
from infra.local.process import find_marked, identity_of
from infra.providers.local import MARK, LocalProvider, read_agent_pid
from tests.autoscaler.conftest import Scaling


@pytest.fixture
def real(
    scaling: Scaling, live_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Scaling]:
    """The control worker's two threads, the local provider, and a web server that enrols."""
    from controlplane.api import internal

    monkeypatch.setattr(internal, "build_cell", lambda: scaling.house.cell)
    provider = LocalProvider(tmp_path / "machines", capacity=1)
    scaling.configure(
        provider="local", enrol_url=f"{live_server.url}/internal/enrol", model_cache=str(tmp_path / "models")
    )
    scaling.house = replace(scaling.house, provider=provider)
    recorder = Recorder(scaling.house)
    watcher = Watcher(scaling.house.cell, recorder, stale_after_s=2.0)
    recorder.start()
    watcher.start()
    yield scaling
    watcher.stop()
    recorder.stop()
    for machine in provider.describe():
        provider.terminate(machine.ref)


def test_a_wake_up_ends_in_a_replica_that_survives_kills(
    real: Scaling, eventually: Callable[..., None]
) -> None:
    cell, did = real.house.cell, real.deployment.id.hex
    real.queue("first")
    cell.redis.publish(cell.keys.wake_channel, did)
    eventually(lambda: len(cell.routed(did)) == 1, "a replica is routed to", 60)
    eventually(lambda: Replica.objects.filter(phase=ReplicaPhase.READY).exists(), "its row says ready")
    assert real.machine().state == MachineState.READY
    assert cell.redis.hget(cell.keys.request("first"), "rid") == cell.routed(did)[0].hex.encode()
    stages = StartTiming.objects.values_list("stage", flat=True)
    eventually(
        lambda: set(stages.all()) == {"launching_machine", "starting_replica", "loading_model"}, "timings"
    )

    first = real.replica()
    machine = real.machine()
    directory = real.house.provider.root / machine.id.hex  # type: ignore[attr-defined]
    status = cell.read_actual([(first.id.hex, machine.id.hex)])[first.id.hex]
    pids = [status.pid] if status.pid else []
    agent = read_agent_pid(directory / "agent.pid")
    assert agent is not None
    for pid in pids or _fronts(machine, agent.pid):
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: real.replica().id != first.id, "a successor is ordered")
    eventually(lambda: [r.hex for r in cell.routed(did)] == [real.replica().id.hex], "and routed to", 30)
    assert Machine.objects.count() == 1

    os.kill(agent.pid, signal.SIGKILL)
    eventually(lambda: identity_of(agent.pid) is None, "the agent is gone")
    Machine.objects.update(launched_at=machine.created_at.replace(year=2020))
    eventually(lambda: real.machine().n_restarts == 1, "the agent was started again", 30)
    assert [r.hex for r in cell.routed(did)] == [real.replica().id.hex]

    real.house.provider.terminate(machine.provider_ref)
    assert find_marked(f"{MARK}={machine.id.hex}") == []


def _fronts(machine: Machine, agent_pid: int) -> list[int]:
    """Pids of replica fronts: marked, neither the agent nor the zygote (whose parent is the agent or init)."""
    marked = find_marked(f"{MARK}={machine.id.hex}")
    parents = {
        pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in marked
    }
    return [
        pid for pid in marked if pid != agent_pid and parents[pid] in marked and parents[pid] != agent_pid
    ]
