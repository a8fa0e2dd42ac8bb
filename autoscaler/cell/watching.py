"""The active watcher's lock and ears, and how full the cell is."""

from __future__ import annotations

from typing import Any, cast

from redis.client import PubSub

from autoscaler.cell.connection import Connection
from workers.keys import RETENTION_MS
from workers.scripts import SHORTEN

SCANNED_PER_CALL = 2000  # keys; some 0.3 ms of Redis


class Watching(Connection):
    """For autoscaler/watch/."""

    def hold_watch(self, owner: str, life_ms: int) -> bool:
        """Whether `owner` is the active watcher: takes the lock if nobody has it, renews its own."""
        if self.redis.set(self.keys.watcher_lock, owner, nx=True, px=life_ms):
            return True
        if self.redis.get(self.keys.watcher_lock) != owner.encode():
            return False
        return bool(self.redis.pexpire(self.keys.watcher_lock, life_ms))

    def may_look(self, life_ms: int) -> bool:
        """Whether the provider may be asked about machines that somebody waits for; then nobody may for so long."""
        return bool(self.redis.set(self.keys.look_lock, b"1", nx=True, px=life_ms))

    def pubsub(self) -> PubSub:
        """A connection that hears the agents' events, requests that wait for a first replica, and changes."""
        pubsub = cast(PubSub, cast(Any, self.redis).pubsub(ignore_subscribe_messages=True))
        pubsub.psubscribe(self.keys.event_pattern)
        pubsub.subscribe(self.keys.wake_channel, self.keys.invalidate_channel)
        return pubsub

    def leave_watch(self, owner: str) -> None:
        if self.redis.get(self.keys.watcher_lock) == owner.encode():
            self.redis.delete(self.keys.watcher_lock)

    def memory_used_ratio(self) -> float:
        """Of what Redis may use; 0.0 where it has no bound."""
        info = self.redis.info("memory")
        most = int(info.get("maxmemory", 0))
        return int(info["used_memory"]) / most if most else 0.0

    def shorten_journals(self, cursor: int, life_ms: int) -> tuple[int, int]:
        """Keep journals of ended requests no longer than `life_ms` from now; looks at some thousand keys from `cursor`.

        (cursor to go on from, 0 = all were seen; how many were shortened).
        """
        found = self.redis.scan(cursor, match=f"{self.keys.prefix}m:*:jrn:*", count=SCANNED_PER_CALL)
        cursor, journals = cast(tuple[int, list[bytes]], found)
        if not journals:
            return cursor, 0
        return cursor, int(self._run_bare(SHORTEN, life_ms, RETENTION_MS, *journals))
