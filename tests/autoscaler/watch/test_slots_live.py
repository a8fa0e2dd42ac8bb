"""One real replica (agent, zygote, front as processes) under the real watcher: what it measures changes its slots."""

from pathlib import Path

from tests.autoscaler.watch.slot_loop import REPLICA, a_watcher
from tests.workers.agents import agent_on, spec
from tests.workers.serving import Cell
from tests.workers.waiting import wait_until
from workers.contract import ReplicaPhase
from workers.engine.base import EngineProfile

# Twelve at once wait 260 ms between tokens, however quick the machine: more than any promise of 100.
SLOW = EngineProfile(engine="toy", max_num_seqs=12, toy_step_ms=20, toy_seq_ms=20)


def test_a_replica_that_is_too_slow_is_given_fewer_slots_and_finishes_what_it_has(
    redis_url: str, tmp_path: Path
) -> None:
    cell = Cell(redis_url)
    watcher = a_watcher(redis_url, max_num_seqs=12, itl_ms=100)
    with agent_on(cell, tmp_path) as agent:
        agent.desire(spec(REPLICA, profile=SLOW.to_json(), slots=12))
        agent.await_phase(REPLICA, ReplicaPhase.READY)

        def replica() -> dict[str, str]:
            watcher.step(0.01)
            fields = cell.r.hgetall(cell.keys.replica(REPLICA))
            return {name.decode(): value.decode() for name, value in fields.items()}

        wait_until(lambda: replica().get("slots") == "12", "all slots to begin with")
        long = {"max_tokens": 60, "sampling": {"ignore_eos": True}}
        first = [cell.admit(f"badi {n}", **long) for n in range(12)]
        wait_until(lambda: int(replica()["slots"]) <= 6, "fewer slots", deadline_s=30)
        beat = agent.heartbeat(REPLICA)
        assert beat is not None
        assert beat.itl_p95_ms > 100
        assert beat.engine_queue == 0
        seen = replica()
        assert seen["why"].startswith("shrinks from 12: 95 % of gaps within")
        assert int(seen["used"]) == 12  # nothing was taken off
        cell.admit("badi late", **long)
        assert int(replica()["used"]) == 12  # and nothing comes before there is room
        for request in first:
            cell.cancel(request)
    cell.close()
