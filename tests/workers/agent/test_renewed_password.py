"""The machine's Redis password is replaced under a running answer: agent and front as processes, all cut off once."""

import hashlib
from pathlib import Path

import pytest
import redis

from tests.workers.agents import agent_on, spec
from tests.workers.serving import PASSWORD, Cell
from tests.workers.waiting import wait_until
from workers import sealed
from workers.contract import ReplicaPhase
from workers.engine.base import EngineProfile

SLOW = EngineProfile(engine="toy", toy_step_ms=5, max_model_len=512).to_json()


def test_an_answer_goes_on_while_the_password_is_replaced_and_the_old_one_dies(
    cell: Cell, tmp_path: Path
) -> None:
    with agent_on(cell, tmp_path) as agent:
        agent.desire(spec(profile=SLOW))
        agent.await_phase("r1", ReplicaPhase.READY)
        cell.enrol("r1")
        old, new = (hashlib.sha256(p.encode()).hexdigest() for p in (PASSWORD, "another-one"))
        beat = agent.heartbeat()
        assert beat is not None and beat.password == old
        request = cell.admit(max_tokens=400, sampling={"ignore_eos": True})
        wait_until(lambda: cell.stream(request), "the first token")

        keys = agent.keys
        cell.r.execute_command("ACL", "SETUSER", keys.redis_user, *keys.acl_rules(old, new))
        public = agent.enrol.asked[0]["capabilities"]["box_public"]
        cell.r.set(keys.password, sealed.seal_for(public, b"another-one"))
        cell.r.lpush(keys.bell, "1")
        wait_until(lambda: (b := agent.heartbeat()) is not None and b.password == new, "the agent to take it")
        cell.r.execute_command("ACL", "SETUSER", keys.redis_user, *keys.acl_rules(new))
        assert cell.r.execute_command("CLIENT", "KILL", "USER", keys.redis_user) >= 4

        wait_until(lambda: cell.end(request), "the answer")
        end = cell.end(request)
        assert (end.n_completion, end.attempts) == (400, 1), "the same attempt went on"
        later = cell.admit()
        wait_until(lambda: cell.end(later), "an answer to what was asked afterwards: its consumer is back")
        address = agent.cell.url.rpartition("@")[2]
        with (
            redis.Redis.from_url(f"redis://{keys.redis_user}:{PASSWORD}@{address}") as thief,
            pytest.raises(redis.AuthenticationError),
        ):
            thief.ping()
        agent.desire()
        wait_until(lambda: agent.status("r1") is None, "the replica to end as told")
