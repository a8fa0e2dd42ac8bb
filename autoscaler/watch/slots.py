"""Adapts the slots of replicas that serve: new heartbeats to the controller, its decisions to the cell.

Called by watcher.py on every scan, on its thread; no Postgres. What a machine reports is bounded before it is
believed: it can talk its own slots down to one or up to what its engine was configured for, nothing else. Loses
nothing by a restart: slots stand in Redis, and the measurements of a few seconds are made again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import structlog

from autoscaler.cell import Cell, ReplicaReading
from autoscaler.watch.table import KnownReplica
from controlplane.policy.slots import SlotMemory, SlotObservation, SlotTarget, first_slots, next_slots
from workers.contract import Heartbeat
from workers.engine.steps import gaps_of

log = structlog.get_logger("corral.autoscaler")

# The promise is the client's. Gateway, Redis and network add some milliseconds of their own to a gap now and then.
ENGINE_SHARE = 0.95
MAX_STEPS = 1_000_000  # of one beat; more is no measurement


class SlotKeeper:
    """The controller's memory of every replica, and what deployments have learned. One thread."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self._memories: dict[str, SlotMemory] = {}
        self._seqs: dict[str, int] = {}
        self._learned: dict[tuple[str, int], int] = {}  # (deployment, ceiling): slots last set for a replica

    def slots_for(self, replica: KnownReplica, offered: int) -> int:
        """With how many slots to enrol it: as adapted so far, never more than the machine offers."""
        if replica.elsewhere is not None:
            return min(replica.slots, max(offered, 0))
        memory = self._memories.get(replica.id)
        if memory is not None:
            slots = memory.slots
        else:
            slots = first_slots(self._learned.get(_kind(replica)), _target(replica))
        return min(slots, offered) if offered > 0 else slots

    def adapt(
        self,
        replicas: Mapping[str, KnownReplica],
        readings: Mapping[str, ReplicaReading],
        queued: Mapping[str, int],
        deployments: Collection[str],
        now_s: float,
    ) -> None:
        """One look at all of them. `queued`: requests waiting by deployment; `deployments`: those that exist, idle
        ones included. Raises redis.RedisError.
        """
        for rid in self._memories.keys() - replicas.keys():
            del self._memories[rid]
            self._seqs.pop(rid, None)
        for kind in [kind for kind in self._learned if kind[0] not in deployments]:
            del self._learned[kind]
        for rid, reading in readings.items():
            beat = reading.beat
            if reading.state == "ready" and beat is not None and beat.seq != self._seqs.get(rid):
                self._seqs[rid] = beat.seq
                self._one(replicas[rid], reading, beat, queued.get(replicas[rid].deployment, 0), now_s)

    def _one(
        self, replica: KnownReplica, reading: ReplicaReading, beat: Heartbeat, n_queued: int, now_s: float
    ) -> None:
        if replica.elsewhere is not None:  # its concurrency is stated, and none while it is left alone
            slots = min(replica.slots, max(beat.slots, 0))
            if slots != reading.slots:
                self.cell.resize(replica.id, was=reading.slots, slots=slots, why=beat.note or "closed")
            return
        memory = self._memories.get(replica.id) or SlotMemory(reading.slots)
        seen = _observation(reading, beat, n_queued, now_s)
        slots, memory, reason = next_slots(memory, seen, _target(replica, beat.slots))
        if slots != reading.slots:
            n_given = self.cell.resize(replica.id, was=reading.slots, slots=slots, why=reason)
            # Drained or set anew since it was read: the next beat is judged by what it has then.
            if n_given < 0:
                return
            self._learned[_kind(replica)] = slots
            log.info(
                "replica.slots",
                replica=replica.id,
                deployment=replica.deployment,
                was=reading.slots,
                slots=slots,
                n_given=n_given,
                reason=reason,
            )
        self._memories[replica.id] = memory


def _kind(replica: KnownReplica) -> tuple[str, int]:
    return replica.deployment, replica.slots


def _target(replica: KnownReplica, offered: int = 0) -> SlotTarget:
    ceiling = min(replica.slots, offered) if offered > 0 else replica.slots
    return SlotTarget(itl_ms=ENGINE_SHARE * replica.itl_ms, ceiling=max(ceiling, 1))


def _observation(reading: ReplicaReading, beat: Heartbeat, n_queued: int, now_s: float) -> SlotObservation:
    n_steps = beat.n_steps if 0 < beat.n_steps <= MAX_STEPS else 0
    return SlotObservation(
        at_s=now_s,
        slots=reading.slots,
        used=reading.used,
        n_queued=n_queued,
        n_steps=n_steps,
        gaps=gaps_of(beat.itl_counts) if n_steps else (),
        engine_queue=_bounded(beat.engine_queue, 1e6),
        kv_used_ratio=_bounded(max(beat.kv_used_ratio, beat.kv_peak_ratio), 1.0),
        n_preempted=min(max(beat.n_preempted, 0), MAX_STEPS),
    )


def _bounded(value: float, most: float) -> float:
    return min(max(value, 0.0), most) if math.isfinite(value) else most
