"""A machine as a whole: agent, zygote, fronts as processes, the toy engine, a real Redis with the machine's
user.
"""

import asyncio
import json
import os
import signal
import stat
import time
from pathlib import Path

import pytest

from tests.workers.agents import AgentProcess, EnrolServer, agent_on, spec
from tests.workers.serving import Cell
from tests.workers.waiting import wait_until
from workers.agent.agent import Agent
from workers.agent.known import Limits
from workers.config import AgentConfig, ServeTuning
from workers.contract import MACHINE_STOPPED, FinishReason, ReplicaPhase
from workers.engine.base import EngineProfile
from workers.modelcache.importers import import_directory
from workers.modelcache.store import ModelStore
from workers.modelcache.tiny import make_tiny_model
from workers.spool import Spool

READY, STOPPED, FAILED = ReplicaPhase.READY, ReplicaPhase.STOPPED, ReplicaPhase.FAILED
LONG = {"max_tokens": 400, "sampling": {"ignore_eos": True}}


def fail_of(agent: AgentProcess, replica: str = "r1") -> str:
    """Code of the failure, which must come."""

    def failed() -> bool:
        status = agent.status(replica)
        return status is not None and status.phase is FAILED and status.code != ""

    wait_until(failed, f"{replica} to fail")
    status = agent.status(replica)
    assert status is not None and status.message
    return status.code


def test_desired_replica_starts_serves_and_stops(cell: Cell, tmp_path: Path) -> None:
    with agent_on(cell, tmp_path) as agent:
        agent.desire(spec())
        status = agent.await_phase("r1", READY)
        assert (status.slots, status.max_model_len) == (8, 512)
        assert status.stages_ms.keys() >= {"agent", "load", "warm", "total"}
        beat = agent.heartbeat("r1")
        assert beat is not None and (beat.phase, beat.slots, beat.deployment) == (READY, 8, "d1")
        cell.enrol("r1")
        requests = [cell.admit(f"badi {i}") for i in range(8)]
        wait_until(lambda: all(cell.end(request) for request in requests), "the answers")
        assert len(cell.usage()) == 8
        agent.desire()
        wait_until(lambda: agent.status("r1") is None, "control to be told that it is gone")
        assert not list(cell.r.scan_iter(agent.keys.prefix + "unacked*"))
        phases = [event.phase.value for event in agent.hear()]
        assert phases[:4] == ["starting", "loading", "ready", "draining"]
        assert set(phases[4:]) == {"stopped"}


def test_a_death_by_a_nameless_signal_is_a_death_like_others(cell: Cell, tmp_path: Path) -> None:
    with agent_on(cell, tmp_path) as agent:
        agent.desire(spec())
        os.kill(agent.await_phase("r1", READY).pid, signal.SIGRTMIN + 9)
        assert fail_of(agent) == "killed"
        agent.desire(spec("r2"))
        agent.await_phase("r2", READY)


def test_enrolment_is_once_and_kept_private(cell: Cell, tmp_path: Path) -> None:
    with agent_on(cell, tmp_path) as agent:
        wait_until(lambda: agent.heartbeat() is not None, "the agent")
        credentials = agent.var / "credentials.json"
        assert stat.S_IMODE(credentials.stat().st_mode) == 0o600
        password = json.loads(credentials.read_text())["redis_url"].split("@")[0].rpartition(":")[2]
        assert agent.terminate() == 0
        agent.start(proof=False)
        wait_until(lambda: agent.heartbeat() is not None, "the agent's return")
        assert agent.enrol.n_enrolled == 1
        assert password not in agent.logs()


def test_a_notice_is_passed_on_at_once_and_what_runs_goes_on(cell: Cell, tmp_path: Path) -> None:
    with agent_on(cell, tmp_path) as agent:
        agent.desire(spec())
        pid = agent.await_phase("r1", READY).pid
        (agent.var / "notice.json").write_text("{}")  # half written: no notice
        wait_until(lambda: (beat := agent.heartbeat()) is not None and beat.phase is READY, "a beat")
        (agent.var / "notice.json").write_text(json.dumps({"ends_at_s": time.time() + 120}))
        wait_until(lambda: agent.heartbeat().phase is ReplicaPhase.DRAINING, "the notice to be beaten")
        left_ms = agent.heartbeat().ends_in_ms
        assert left_ms is not None and 60_000 < left_ms <= 120_000
        wait_until(lambda: any(event.replica == "" for event in agent.hear()), "the event that says: look")
        assert agent.status("r1").pid == pid and agent.status("r1").phase is READY
        assert Path(f"/proc/{pid}").exists(), "control decides what becomes of it"


async def test_an_agent_that_lost_its_zygote_keeper_ends_loudly(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure there once left an agent that could start nothing any more and beat as if all were well."""

    async def broken(agent: Agent) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(Agent, "_start_zygote", broken)
    enrol = EnrolServer(cell)
    enrol.proofs.add("p")
    config = AgentConfig(
        machine="m1",
        enrol_url=enrol.url,
        var_dir=tmp_path,
        model_cache=tmp_path,
        cell=cell.keys.cell,
        proof="p",
    )
    try:
        with pytest.raises(ValueError, match="a bug"):
            async with asyncio.timeout(20):
                await Agent(config).run()
    finally:
        enrol.close()


def test_refused_proof_ends_the_agent_with_a_reason(cell: Cell, tmp_path: Path) -> None:
    enrol = EnrolServer(cell)
    agent = AgentProcess(cell, enrol, tmp_path)
    try:
        agent.start()
        enrol.proofs.clear()
        assert agent.process is not None
        assert agent.process.wait(20) == 4
        assert "unknown or used proof" in agent.logs()
    finally:
        agent.destroy()
        enrol.close()


def test_impossible_profile_fails_with_its_reason_and_only_once(cell: Cell, tmp_path: Path) -> None:
    with agent_on(cell, tmp_path) as agent:
        wrong = spec(profile={"engine": "toy", "max_model_len": 3})
        agent.desire(wrong)
        assert fail_of(agent) == "invalid_profile"
        assert "max_model_len" in agent.status("r1").message
        agent.desire(wrong, spec("r2"))
        agent.await_phase("r2", READY)
        assert [event.phase.value for event in agent.hear() if event.replica == "r1"].count("starting") == 1


def test_damaged_weights_fail_with_the_file_at_fault(cell: Cell, tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "models")
    model = import_directory(make_tiny_model(tmp_path / "tiny"), store, licence="Apache-2.0")
    shard = model.path / "model.safetensors"
    shard.chmod(0o644)
    with shard.open("r+b") as file:
        file.truncate(1_000_000)
    with agent_on(cell, tmp_path) as agent:
        profile = EngineProfile(engine="vllm").to_json()
        agent.desire(spec(profile=profile, model_digest=model.digest, model_source=model.source))
        assert fail_of(agent) == "bad_weights"
        assert "model.safetensors" in agent.status("r1").message
        agent.desire(spec("r2", profile=profile, model_digest="0" * 64, model_source=model.source))
        assert fail_of(agent, "r2") == "source_missing"


def test_restarted_agent_adopts_what_runs(cell: Cell, tmp_path: Path) -> None:
    with agent_on(cell, tmp_path) as agent:
        agent.desire(spec(profile=EngineProfile(engine="toy", toy_step_ms=10, max_model_len=512).to_json()))
        pid = agent.await_phase("r1", READY).pid
        cell.enrol("r1")
        request = cell.admit(max_tokens=300, sampling={"ignore_eos": True})
        wait_until(lambda: cell.stream(request), "the first token")
        agent.kill()
        agent.start(proof=False)
        wait_until(lambda: "replica adopted" in agent.logs(), "the adoption")
        wait_until(lambda: cell.end(request), "the answer, undisturbed")
        assert cell.end(request).attempts == 1
        assert agent.await_phase("r1", READY).pid == pid
        agent.desire()
        wait_until(lambda: agent.status("r1") is None, "the adopted replica to stop")
        assert not Path(f"/proc/{pid}").exists()


def test_end_while_no_agent_ran_is_reported_by_the_next(cell: Cell, tmp_path: Path) -> None:
    with agent_on(cell, tmp_path) as agent:
        agent.desire(spec())
        pid = agent.await_phase("r1", READY).pid
        agent.kill()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), "its end")
        agent.start(proof=False)
        assert fail_of(agent) == "killed"


def test_killed_front_is_reported_and_its_request_can_be_resumed(cell: Cell, tmp_path: Path) -> None:
    with agent_on(cell, tmp_path) as agent:
        agent.desire(spec(profile=EngineProfile(engine="toy", toy_step_ms=10, max_model_len=512).to_json()))
        pid = agent.await_phase("r1", READY).pid
        cell.enrol("r1")
        request = cell.admit(max_tokens=400, sampling={"ignore_eos": True})
        wait_until(lambda: cell.stream(request), "the first token")
        os.kill(pid, signal.SIGKILL)
        assert fail_of(agent) == "killed"
        cell.withdraw("r1")
        assert cell.r.hget(cell.keys.request(request), "crashes") == b"1"
        agent.desire(spec("r2"))
        agent.await_phase("r2", READY)
        cell.enrol("r2")
        wait_until(lambda: cell.end(request), "the resumed answer")
        assert (cell.end(request).n_completion, cell.end(request).attempts) == (400, 2)


def test_hung_engine_is_killed_with_that_reason(cell: Cell, tmp_path: Path) -> None:
    with agent_on(cell, tmp_path, tuning=ServeTuning(hang_s=0.6)) as agent:
        agent.desire(spec())
        agent.await_phase("r1", READY)
        cell.enrol("r1")
        cell.admit("badi <hang>")
        assert fail_of(agent) == "engine_hung"


def test_frozen_front_is_killed_by_the_agent(cell: Cell, tmp_path: Path) -> None:
    with agent_on(cell, tmp_path, limits=Limits(beat_s=1.5)) as agent:
        agent.desire(spec())
        pid = agent.await_phase("r1", READY).pid
        os.kill(pid, signal.SIGSTOP)
        assert fail_of(agent) == "front_hung"
        assert not Path(f"/proc/{pid}").exists()


def test_engine_death_is_reported_and_ends_the_front(cell: Cell, tmp_path: Path) -> None:
    with agent_on(cell, tmp_path) as agent:
        agent.desire(spec())
        agent.await_phase("r1", READY)
        cell.enrol("r1")
        cell.admit("badi <die>")  # the toy engine takes its whole process along, as a segfault would
        assert fail_of(agent) == "crashed"


def test_stop_of_the_machine_hands_requests_back_unharmed(cell: Cell, tmp_path: Path) -> None:
    with agent_on(cell, tmp_path) as agent:
        slow = EngineProfile(engine="toy", toy_step_ms=50, max_model_len=512)
        agent.desire(spec(profile=slow.to_json()))
        agent.await_phase("r1", READY)
        cell.enrol("r1")
        requests = [cell.admit(f"badi {i}", **LONG) for i in range(3)]
        wait_until(lambda: all(cell.stream(request) for request in requests), "first tokens")
        assert agent.terminate() == 0
        assert agent.processes() == []
        ended = agent.status("r1")
        assert ended is not None
        assert (ended.phase, ended.code) == (STOPPED, MACHINE_STOPPED)
        for request in requests:
            assert cell.lease(request)[b"state"] == b"bound"
            made = sum(len(entry.token_ids) for entry in cell.journal(request))
            assert made == sum(entry.n for entry in cell.stream(request)) > 0
        cell.withdraw("r1")
        assert {cell.r.hget(cell.keys.request(r), "crashes") for r in requests} == {None}


def test_drain_lets_running_requests_finish(cell: Cell, tmp_path: Path) -> None:
    with agent_on(cell, tmp_path) as agent:
        agent.desire(spec())
        agent.await_phase("r1", READY)
        cell.enrol("r1")
        request = cell.admit(**LONG)
        wait_until(lambda: cell.stream(request), "the first token")
        agent.desire(spec(drain=True, grace_s=10.0))
        agent.await_phase("r1", STOPPED)
        assert cell.end(request).reason is FinishReason.LENGTH
        assert cell.end(request).n_completion == 400


def test_lost_desired_state_stops_nothing(cell: Cell, tmp_path: Path) -> None:
    with agent_on(cell, tmp_path) as agent:
        agent.desire(spec())
        pid = agent.await_phase("r1", READY).pid
        cell.r.delete(agent.keys.desired, agent.keys.actual)
        cell.r.lpush(agent.keys.bell, "1")
        wait_until(lambda: cell.r.llen(agent.keys.bell) == 0, "the bell to be heard")
        status = agent.await_phase("r1", READY)  # said again by the front itself
        assert status.pid == pid and Path(f"/proc/{pid}").exists()


def test_usage_of_a_dead_replica_is_announced_again_and_forgotten_when_booked(
    cell: Cell, tmp_path: Path
) -> None:
    tuning = ServeTuning(republish_after_s=0.2, republish_max_s=0.4)
    with agent_on(cell, tmp_path, tuning=tuning) as agent:
        agent.desire(spec())
        pid = agent.await_phase("r1", READY).pid
        cell.enrol("r1")
        request = cell.admit()
        wait_until(lambda: cell.usage(), "usage")
        os.kill(pid, signal.SIGKILL)
        assert fail_of(agent) == "killed"
        cell.r.delete(agent.keys.usage)  # Redis lost it
        wait_until(lambda: cell.usage(), "usage, announced again from the spool")
        assert cell.usage()[0].request_id == request
        cell.r.rpush(agent.keys.ack("r1"), request)
        wait_until(lambda: not (agent.var / "spool" / "r1.spool").exists(), "the spool to be forgotten")


def test_spool_of_a_live_front_is_left_alone(cell: Cell, tmp_path: Path) -> None:
    with agent_on(cell, tmp_path) as agent:
        agent.desire(spec())
        agent.await_phase("r1", READY)
        cell.enrol("r1")
        request = cell.admit()
        wait_until(lambda: cell.usage(), "usage")
        with pytest.raises(Exception, match="owned by another process"):
            Spool(agent.var / "spool" / "r1.spool", max_bytes=1000)
        cell.r.rpush(agent.keys.ack("r1"), request)
        wait_until(lambda: not cell.r.exists(agent.keys.ack("r1")), "the front to read the acknowledgement")


@pytest.mark.engine
def test_real_engine_from_command_to_answer(cell: Cell, tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "models")
    model = import_directory(make_tiny_model(tmp_path / "tiny"), store, licence="Apache-2.0")
    profile = EngineProfile(engine="vllm", max_model_len=1024, kv_cache_bytes=64 << 20).to_json()
    options = {"profile": profile, "model_digest": model.digest, "model_source": model.source}
    with agent_on(cell, tmp_path, engine="vllm") as agent:
        wait_until(lambda: (beat := agent.heartbeat()) and beat.phase is READY, "the zygote", 90)
        agent.desire(spec(**options))
        status = agent.await_phase("r1", READY, deadline_s=60)
        print(f"stages: {status.stages_ms}")
        assert status.max_model_len == 1024
        cell.enrol("r1")
        first, second = (cell.admit(max_tokens=16, stream=stream) for stream in (True, False))
        wait_until(lambda: cell.end(first) and cell.end(second), "answers", 60)
        assert cell.text(first) == cell.text(second)
        assert cell.end(first).n_completion <= 16
        too_long = cell.admit("word " * 4000)
        wait_until(lambda: cell.end(too_long), "the refusal", 30)
        assert cell.end(too_long).error.code == "context_length_exceeded"
