"""Which replicas get a deployment's requests, and how many each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from autoscaler.cell.giving_up import GivingUp
from workers.scripts import ENROL, RESIZE, SPILL, SWEEP

BOUND_PER_CALL = 256  # what the scripts bind at once (lib_queue.lua)
MAX_ENROL_CALLS = 16  # an engine batches 4,096 at most
MAX_WITHDRAW_CALLS = 64  # of 512 requests each: more than a replica's slots


class Routing(GivingUp):
    """All of it may be repeated."""

    def enrol(
        self,
        *,
        replica: str,
        machine: str,
        deployment: str,
        slots: int,
        kv_tokens: int = 0,
        elsewhere: tuple[str, int, float] | None = None,
        share: int | None = None,
        pace: str = "",
    ) -> int:
        """The replica takes requests; answers how many waiting ones were given out. Safe to repeat. `kv_tokens`: what
        its memory holds; 0 leaves what was said before. `elsewhere`: of an endpoint its role, after how many ms an
        overflow takes what waits, and what a token there costs to routing. `share`: of a canary (policy/canary.py:
        threshold). `pace`: how fast it should be (controlplane/policy/pace.py: Speed.text)."""
        extra: tuple[str | int, ...] = ()
        if elsewhere is not None:
            extra = (elsewhere[0], elsewhere[1], f"{elsewhere[2]:.3f}")
        elif share is not None or pace:
            extra = ("", 0, 0, "" if share is None else share, pace)
        n_bound = n = int(self._run(ENROL, replica, machine, deployment, slots, kv_tokens, *extra))
        for _ in range(MAX_ENROL_CALLS):
            if n < BOUND_PER_CALL:
                break
            n = int(self._run(ENROL, replica, machine, deployment, slots, 0, *extra))
            n_bound += n
        return n_bound

    def set_share(self, deployment: str, shares: Mapping[str, int | None]) -> None:
        """What each canary is given of the requests from now on, of 65,536; None: as much as any replica. Replicas that
        do not take requests (yet) are left alone. Safe to repeat."""
        changed = False
        for replica, share in shares.items():
            key = self.keys.replica(replica)
            told = cast(list[bytes | None], self.redis.hmget(key, "state", "share"))
            if told[0] is None or told[1] == (None if share is None else str(share).encode()):
                continue
            changed = True
            if share is None:
                self.redis.hdel(key, "share")
            else:
                self.redis.hset(key, "share", share)
        if changed:
            self.redis.publish(self.keys.route_channel, deployment)

    def resize(self, replica: str, *, was: int, slots: int, why: str) -> int:
        """The replica runs so many requests at once from now on; answers how many waiting ones it was given, -1
        when it drains or has other slots than `was`.
        """
        return int(self._run(RESIZE, replica, was, slots, why))

    def spill(self, deployment: str) -> int:
        """What has waited too long goes to the deployment's overflow replicas; how many did."""
        return int(self._run(SPILL, deployment))

    def drain(self, replica: str) -> None:
        """The replica gets nothing new. Safe to repeat."""
        self._withdraw(replica, "drain")

    def put_to_sleep(self, replica: str) -> None:
        """As `drain`; and what its cache held is forgotten, since it will be. Safe to repeat."""
        self._withdraw(replica, "drain")
        self.redis.delete(self.keys.replica_prefixes(replica))

    def withdraw_dead(self, replica: str) -> int:
        """What the replica ran goes back to the queue, or fails as poison; how many went back. Repeatable."""
        n_requeued = 0
        for _ in range(MAX_WITHDRAW_CALLS):
            n, n_left, n_given_up = self._withdraw(replica, "dead")
            n_requeued += n
            if n_given_up:
                self.finish_failed()
            if n_left == 0:
                break
        return n_requeued

    def sweep_counters(self, deployment: str, cursor: str, n_fields: int) -> tuple[str, int]:
        """One step of forgetting what the fair queue need not know: (next cursor, '0' = done; n forgotten)."""
        cursor_after, n = cast(tuple[bytes, int], self._run(SWEEP, deployment, cursor, n_fields))
        return cursor_after.decode(), int(n)
