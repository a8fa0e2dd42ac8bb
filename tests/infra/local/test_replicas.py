"""What `manage.py status` says of replicas and their slots."""

from pathlib import Path

import msgspec
import redis

from infra.local.environment import SAVED
from infra.local.privatefile import write_private_json
from infra.local.replicas import ReplicaSlots, read_slots
from workers.contract import Heartbeat
from workers.keys import CellKeys

KEYS = CellKeys("c0")
R1, R2, M1 = "a" * 32, "b" * 32, "c" * 32


def test_slots_given_used_and_why(redis_url: str, tmp_path: Path) -> None:
    write_private_json(tmp_path / SAVED, {"CORRAL_REDIS_URL": redis_url, "CORRAL_CELL": "c0"})
    with redis.Redis.from_url(redis_url) as client:
        ready = {"mid": M1, "state": "ready", "slots": 26, "used": 27, "why": "shrinks from 64: slow"}
        client.hset(KEYS.replica(R1), mapping=ready)
        client.hset(KEYS.replica(R2), mapping={**ready, "state": "draining"})
        client.sadd(KEYS.replica(R1) + ":live", "request")
        beat = Heartbeat(machine=M1, seq=1, at_ms=1, replica=R1, slots=64)
        client.set(KEYS.machine(M1).heartbeat(R1), msgspec.json.encode(beat))
        assert read_slots(tmp_path) == [ReplicaSlots(R1, 27, 26, 64, "shrinks from 64: slow")]
        client.set(KEYS.machine(M1).heartbeat(R1), b"nonsense")
        assert [replica.ceiling for replica in read_slots(tmp_path)] == [26]


def test_no_stack_and_no_redis_are_no_failure(tmp_path: Path) -> None:
    assert read_slots(tmp_path) == []
    write_private_json(tmp_path / SAVED, {"CORRAL_REDIS_URL": "redis://127.0.0.1:1/0"})
    assert read_slots(tmp_path) == []
