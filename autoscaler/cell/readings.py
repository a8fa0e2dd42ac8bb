"""What a cell's Redis holds of replicas, deployments and agents. Reads only."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast
from uuid import UUID

import msgspec

from autoscaler.cell.connection import Connection
from workers.contract import Heartbeat, ModelShelf, ReplicaStatus, ServingReport

_decode_heartbeat = msgspec.json.Decoder(Heartbeat).decode
_decode_status = msgspec.json.Decoder(ReplicaStatus).decode
_decode_serving = msgspec.json.Decoder(ServingReport).decode


@dataclass(frozen=True, slots=True)
class ReplicaReading:
    """What Redis holds of one replica. `state` '' : the cell does not know it; `beat` None: none came."""

    state: str = ""
    slots: int = 0
    used: int = 0
    is_routed: bool = False
    beat: Heartbeat | None = None


@dataclass(frozen=True, slots=True)
class DeploymentReading:
    """What Redis holds of one deployment."""

    n_queued: int = 0
    n_routed: int = 0
    n_overflowed: int = 0  # requests that its overflow replicas have


class Readings(Connection):
    """Every call is one round trip."""

    def read_replicas(self, replicas: Sequence[tuple[str, str, str]]) -> dict[str, ReplicaReading]:
        """By replica id, for (replica, machine, deployment) triples. One round trip."""
        pipeline = self.redis.pipeline(transaction=False)
        for rid, mid, did in replicas:
            pipeline.hmget(self.keys.replica(rid), "state", "slots", "used")
            pipeline.sismember(self.keys.replicas(did), rid)
            pipeline.sismember(self.keys.overflow(did), rid)
            pipeline.get(self.keys.machine(mid).heartbeat(rid))
        answers = pipeline.execute() if replicas else []
        found = {}
        for i, (rid, mid, _) in enumerate(replicas):
            (state, slots, used), is_routed, is_overflow, beat = answers[4 * i : 4 * i + 4]
            found[rid] = ReplicaReading(
                state=(state or b"").decode(),
                slots=int(slots or 0),
                used=max(int(used or 0), 0),
                is_routed=bool(is_routed or is_overflow),
                beat=_beat_of(beat, mid, rid),
            )
        return found

    def read_deployments(self, deployment_ids: Sequence[str]) -> dict[str, DeploymentReading]:
        """Queue depth and routed replicas by deployment id. One round trip, and one per deployment with an overflow."""
        pipeline = self.redis.pipeline(transaction=False)
        for did in deployment_ids:
            pipeline.zcard(self.keys.queue(did))
            pipeline.scard(self.keys.replicas(did))
            pipeline.smembers(self.keys.overflow(did))
        answers = pipeline.execute() if deployment_ids else []
        found = {}
        for i, did in enumerate(deployment_ids):
            n_queued, n_routed, over = answers[3 * i : 3 * i + 3]
            n_overflowed = self._n_running([rid.decode() for rid in over]) if over else 0
            found[did] = DeploymentReading(int(n_queued), int(n_routed), n_overflowed)
        return found

    def _n_running(self, replicas: Sequence[str]) -> int:
        """Requests bound to these replicas. One round trip."""
        pipeline = self.redis.pipeline(transaction=False)
        for rid in replicas:
            pipeline.scard(self.keys.replica_live(rid))
        return sum(map(int, pipeline.execute()))

    def read_agents(self, machine_ids: Sequence[str]) -> dict[str, Heartbeat | None]:
        """The agents' heartbeats by machine id. One round trip."""
        if not machine_ids:
            return {}
        beats = cast(list[bytes | None], self.redis.mget([self._machine(m).heartbeat() for m in machine_ids]))
        return {mid: _beat_of(beat, mid, "") for mid, beat in zip(machine_ids, beats, strict=True)}

    def read_shelves(self, machine_ids: Sequence[str]) -> dict[str, ModelShelf]:
        """What model versions each machine says it holds; absent: nothing that is understood, or nothing lately."""
        if not machine_ids:
            return {}
        payloads = cast(
            list[bytes | None], self.redis.mget([self._machine(machine).models for machine in machine_ids])
        )
        found = {}
        for machine, payload in zip(machine_ids, payloads, strict=True):
            if payload is not None:
                with contextlib.suppress(msgspec.MsgspecError):
                    found[machine] = msgspec.json.decode(payload, type=ModelShelf)
        return found

    def read_actual(self, replicas: Sequence[tuple[str, str]]) -> dict[str, ReplicaStatus]:
        """What the agents say of these (replica, machine) pairs, by replica id, as far as it parses.

        Asked for by name: a machine may have filled its hash with anything. One round trip.
        """
        pipeline = self.redis.pipeline(transaction=False)
        for rid, mid in replicas:
            pipeline.hget(self._machine(mid).actual, rid)
        answers = pipeline.execute() if replicas else []
        found = {}
        for (rid, _), payload in zip(replicas, answers, strict=True):
            status = parse_status(payload) if payload is not None else None
            if status is not None and status.replica == rid:
                found[rid] = status
        return found

    def read_serving(
        self, replicas: Sequence[tuple[str, str]]
    ) -> dict[str, tuple[set[str], ServingReport | None]]:
        """By replica id, for (replica, machine) pairs: the requests bound to it, and those it says it has.

        One round trip.
        """
        pipeline = self.redis.pipeline(transaction=False)
        for rid, mid in replicas:
            pipeline.smembers(self.keys.replica_live(rid))
            pipeline.get(self._machine(mid).serving(rid))
        answers = pipeline.execute() if replicas else []
        return {
            rid: ({member.decode() for member in answers[2 * i]}, _serving_of(answers[2 * i + 1]))
            for i, (rid, _) in enumerate(replicas)
        }

    def routed(self, deployment: str) -> list[UUID]:
        """Replicas that the cell gives this deployment's requests to."""
        sets = [self.keys.replicas(deployment), self.keys.overflow(deployment)]
        members = cast(set[bytes], self.redis.sunion(sets))
        return [UUID(hex=member.decode()) for member in sorted(members)]


def parse_status(payload: bytes) -> ReplicaStatus | None:
    """None for anything that is no status: machines are not trusted to speak well."""
    try:
        return _decode_status(payload)
    except msgspec.DecodeError:
        return None


def _serving_of(payload: bytes | None) -> ServingReport | None:
    try:
        return None if payload is None else _decode_serving(payload)
    except msgspec.DecodeError:
        return None


def _beat_of(payload: bytes | None, machine: str, replica: str) -> Heartbeat | None:
    if payload is None:
        return None
    try:
        beat = _decode_heartbeat(payload)
    except msgspec.DecodeError:
        return None
    return beat if (beat.machine, beat.replica) == (machine, replica) else None
