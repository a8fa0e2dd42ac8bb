"""A replica is put to sleep and woken by its agent: real processes, the toy engine with real memory, a real Redis."""

from pathlib import Path

from tests.workers.agents import AgentProcess, agent_on, spec
from tests.workers.serving import Cell
from tests.workers.waiting import wait_until
from workers.contract import ReplicaPhase, ReplicaStatus
from workers.engine.base import EngineProfile

READY, LOADING = ReplicaPhase.READY, ReplicaPhase.LOADING
MIB = 1 << 20
KV, WEIGHTS = 64 * MIB, 16 * MIB
PROFILE = EngineProfile(
    engine="toy",
    toy_step_ms=2,
    max_model_len=512,
    sleep_level=1,
    kv_cache_bytes=KV,
    toy_weights_bytes=WEIGHTS,
).to_json()


def rss_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def asleep(agent: AgentProcess) -> ReplicaStatus:
    status = agent.await_phase("r1", LOADING)
    assert status.asleep
    return status


def order(agent: AgentProcess, *, sleep: bool) -> None:
    agent.desire(spec(profile=PROFILE, sleep=sleep))


def test_it_sleeps_and_wakes_as_desired_and_serves_as_before(cell: Cell, tmp_path: Path) -> None:
    with agent_on(cell, tmp_path) as agent:
        order(agent, sleep=False)
        pid = agent.await_phase("r1", READY).pid
        cell.enrol("r1")
        first = cell.admit("badi")
        wait_until(lambda: cell.end(first), "an answer")
        awake = rss_of(pid)

        order(agent, sleep=True)
        status = asleep(agent)
        assert status.pid == pid and "sleep" in status.stages_ms
        wait_until(lambda: (b := agent.heartbeat("r1")) is not None and b.asleep, "its beats to say so")
        assert rss_of(pid) < awake - 0.8 * KV, (
            "the KV cache's memory is the kernel's; the weights stay in RAM"
        )

        bound = cell.admit("badi")  # a request that was on its way: served all the same
        wait_until(lambda: cell.end(bound), "its answer")
        asleep(agent)

        agent.kill()
        order(agent, sleep=False)  # while nobody hears it
        agent.start(proof=False)
        status = agent.await_phase("r1", READY)
        assert status.pid == pid and "wake" in status.stages_ms, "the next agent knows that it sleeps"
        assert rss_of(pid) > awake - 0.2 * KV
        cell.enrol("r1")
        last = cell.admit("badi")
        wait_until(lambda: cell.end(last), "an answer")
        assert cell.text(last) == cell.text(first)

        order(agent, sleep=True)
        asleep(agent)
        agent.desire()
        wait_until(lambda: agent.status("r1") is None, "it to end from its sleep")
        assert not Path(f"/proc/{pid}").exists()
