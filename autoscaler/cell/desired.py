"""What the agent of a machine should run: desired state, which it follows (docs/decisions.md)."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any, cast

import msgspec

from autoscaler.cell.connection import Connection
from workers.contract import PrefetchSpec, ReplicaSpec

BELL_MAX = 16
PREFETCH_LIFE_MS = 3600 * 1000  # its signed URLs last longer
# A field of `desired` beside the replica ids: without it the hash was lost, and means nothing.
GENERATION_FIELD = "generation"
_json = msgspec.json.Encoder()


class Told(StrEnum):
    """What a field of `desired` asks of its replica. SERVE is false."""

    SERVE = ""
    SLEEP = "sleep"
    DRAIN = "drain"


def _told(spec: ReplicaSpec) -> Told:
    return Told.DRAIN if spec.drain else Told.SLEEP if spec.sleep else Told.SERVE


def _told_in(payload: bytes) -> Told:
    drains, sleeps = b'"drain":true' in payload, b'"sleep":true' in payload
    return Told.DRAIN if drains else Told.SLEEP if sleeps else Told.SERVE


class Desired(Connection):
    """Writes what the rows say; rings the agent's bell."""

    def set_desired(self, machine: str, spec: ReplicaSpec) -> None:
        """The agent of this machine should run this replica as specified."""
        self._change_desired(machine, {spec.replica: _json.encode(spec)}, ())

    def drop_desired(self, machine: str, *replicas: str) -> None:
        """The agent of this machine should not run these replicas."""
        self._change_desired(machine, {}, replicas)

    def restore_desired(self, machine: str, wanted: dict[str, ReplicaSpec], seen: dict[str, Told]) -> bool:
        """Make the hash agree with rows read AFTER `seen` was (see read_desired); True if it did not.

        Only a field that is missing, one too many, or one that must drain, sleep or wake is touched: a change made
        meanwhile is not undone, but for an order to sleep or wake given in that moment, which the next pass repeats.
        """
        put = {
            rid: _json.encode(spec)
            for rid, spec in wanted.items()
            if rid not in seen or seen[rid] not in (_told(spec), Told.DRAIN)
        }
        drop = [rid for rid in seen if rid not in wanted and rid != GENERATION_FIELD]
        if not put and not drop and GENERATION_FIELD in seen:
            return False
        self._change_desired(machine, put, drop)
        return True

    def ask_prefetch(self, machine: str, spec: PrefetchSpec) -> None:
        """The agent of this machine may fetch this version; forgotten if it never does."""
        key = self._machine(machine).prefetch
        pipeline = self.redis.pipeline(transaction=True)
        pipeline.hset(key, spec.digest, _json.encode(spec))
        pipeline.pexpire(key, PREFETCH_LIFE_MS)
        pipeline.execute()

    def read_prefetches(self, machine: str) -> frozenset[str]:
        """Digests it was asked for and has not done with."""
        found = cast(list[bytes], self.redis.hkeys(self._machine(machine).prefetch))
        return frozenset(name.decode() for name in found)

    def read_desired(self, machine: str) -> dict[str, Told]:
        """Replica id -> what it is told; plus GENERATION_FIELD unless the hash was lost."""
        fields = cast(dict[bytes, bytes], self.redis.hgetall(self._machine(machine).desired))
        return {name.decode(): _told_in(value) for name, value in fields.items()}

    def _change_desired(self, machine: str, put: dict[str, bytes], drop: Iterable[str]) -> None:
        keys = self._machine(machine)
        pipeline = self.redis.pipeline(transaction=True)
        pipeline.hincrby(keys.desired, GENERATION_FIELD, 1)
        if put:
            pipeline.hset(keys.desired, mapping=cast(dict[Any, Any], put))
        if drop := list(drop):
            pipeline.hdel(keys.desired, *drop)
        pipeline.lpush(keys.bell, "1")
        pipeline.ltrim(keys.bell, 0, BELL_MAX - 1)
        pipeline.execute()
