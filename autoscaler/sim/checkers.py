"""Invariants that hold at every event of every simulation, whatever the policies.

A violation raises `InvariantError` with what was seen; the runner adds seed and scenario, so that it can be replayed.
"""

from __future__ import annotations

from autoscaler.sim.job import NEVER, Job
from autoscaler.sim.world import World


class InvariantError(AssertionError):
    """An invariant does not hold."""


class Conservation:
    """No request is lost, served twice, or ends before it began; nobody waits beside a free slot; KV is bounded.

    Counts at every event; each replica's books in full every `every` events (they cost a pass over its batch).
    """

    def __init__(self, every: int = 64) -> None:
        self.n_checks = 0
        self._every = every
        self._ended: set[int] = set()

    def on_event(self, world: World) -> None:
        self.n_checks += 1
        n_waiting = len(world.queue)
        n_bound = 0
        n_free = 0
        for replica in world.replicas.values():
            n_bound += replica.used
            if replica.is_ready:
                n_free += max(replica.slots - replica.used, 0)
            engine = replica.engine
            if engine.kv_used > engine.spec.kv_tokens + engine.n_running:
                raise InvariantError(
                    f"replica {replica.id}: {engine.kv_used} tokens of KV, {engine.spec.kv_tokens} exist"
                )
        if world.n_arrived != world.n_ended + n_waiting + n_bound:
            raise InvariantError(
                f"{world.n_arrived} arrived, but {world.n_ended} ended + {n_waiting} wait + {n_bound} bound"
            )
        if n_waiting and n_free:
            raise InvariantError(f"{n_waiting} wait beside {n_free} free slots")
        if self.n_checks % self._every == 0:
            self._books(world)

    def on_end(self, world: World, job: Job) -> None:
        if job.id in self._ended:
            raise InvariantError(f"job {job.id} ended twice")
        self._ended.add(job.id)
        if job.n_done != job.n_output:
            raise InvariantError(f"job {job.id} ended with {job.n_done} of {job.n_output} tokens")
        if not job.arrived_s <= job.dispatched_s <= job.first_s <= job.ended_s or job.dispatched_s == NEVER:
            raise InvariantError(
                f"job {job.id}: arrived {job.arrived_s}, bound {job.dispatched_s}, first token {job.first_s}, "
                f"ended {job.ended_s}: out of order"
            )

    @staticmethod
    def _books(world: World) -> None:
        for replica in world.replicas.values():
            engine = replica.engine
            running = engine.running()
            if len(running) != engine.n_running or engine.n_held + replica.n_on_way != replica.used:
                raise InvariantError(
                    f"replica {replica.id}: {len(running)} run, {engine.n_running} counted, {engine.n_held} held, "
                    f"{replica.n_on_way} on the way, {replica.used} used"
                )
            n_kv = sum(j.n_prompt + engine.done_of(j) - j.n_shared for j in running)
            if n_kv != engine.kv_used:
                raise InvariantError(
                    f"replica {replica.id}: KV of its requests is {n_kv}, its books say {engine.kv_used}"
                )
            decoding = [j for j in running if not j.n_prefill_left]
            n_context = sum(j.n_prompt + engine.done_of(j) for j in decoding)
            if n_context != engine.n_context or len(decoding) != engine.n_decoding:
                raise InvariantError(
                    f"replica {replica.id}: context {n_context}, its books say {engine.n_context}"
                )
