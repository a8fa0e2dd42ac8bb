"""How many machines a simulated deployment wants: the production scaler, and the rules it is compared with.

Each looks at the world when asked; the fleet asks at every tick and after every change, once per instant.
Kubernetes' and Knative's autoscalers are hpa.py and kpa.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from autoscaler.policy.forecast import ForecastMemory
from autoscaler.policy.replicas import wish
from autoscaler.sim.hpa import Hpa, HpaSpec
from autoscaler.sim.kpa import Kpa, KpaSpec
from autoscaler.sim.world import World
from autoscaler.types import Observation, ReplicaPhase, ReplicaView, ScalerMemory, ScalerSpec


class Scaler(Protocol):
    def wanted(self, world: World, n_starting: int, now_s: float) -> int: ...


class Static:
    def __init__(self, n: int) -> None:
        self.n = n

    def wanted(self, world: World, n_starting: int, now_s: float) -> int:
        return self.n


class Production:
    """autoscaler/policy/replicas.py with its memory, on what it would observe."""

    def __init__(
        self, spec: ScalerSpec, begins_at_s: float = 0.0, past: ForecastMemory | None = None
    ) -> None:
        self.spec = spec
        self.begins_at_s = begins_at_s
        self.memory = ScalerMemory(forecast=past)
        self._n = self._wanted = 0

    def wanted(self, world: World, n_starting: int, now_s: float) -> int:
        self._n += 1
        now_s += self.begins_at_s
        # Spare machines and double cover are the buyer's affair: replicas beyond the last wish show as their load only.
        shown, spare = world.ready[: max(self._wanted, 1)], world.ready[max(self._wanted, 1) :]
        n_starting = min(n_starting, max(self._wanted - len(shown), 0))
        views = [
            ReplicaView(
                f"{r.id:08d}", "m", ReplicaPhase.READY, 0.0, 0.0, r.slots, r.used, self._n, r.n_dispatched
            )
            for r in shown
        ]
        views += [
            ReplicaView(f"s{i:07d}", "m", ReplicaPhase.STARTING, now_s, now_s, self.spec.slots)
            for i in range(n_starting)
        ]
        n_queued = len(world.queue) + sum(r.used for r in spare)
        observation = Observation(now_s, "d", n_queued, tuple(views))
        wanted = wish(observation, self.spec, self.memory)
        self.memory = wanted.memory
        self._wanted = wanted.n
        return wanted.n


class Replay:
    """A demand that is given, the same for every buyer: what a table at equal demand needs."""

    def __init__(self, demand: Callable[[float], int]) -> None:
        self.demand = demand

    def wanted(self, world: World, n_starting: int, now_s: float) -> int:
        return self.demand(now_s)


class HpaScaler:
    """hpa.py on requests running and waiting, per slot that should be busy."""

    def __init__(self, spec: HpaSpec) -> None:
        self.hpa = Hpa(spec)

    def wanted(self, world: World, n_starting: int, now_s: float) -> int:
        return self.hpa.replicas(now_s, len(world.ready) + n_starting, load(world))


class KpaScaler:
    """kpa.py on the same."""

    def __init__(self, spec: KpaSpec) -> None:
        self.kpa = Kpa(spec)

    def wanted(self, world: World, n_starting: int, now_s: float) -> int:
        return self.kpa.replicas(now_s, len(world.ready), load(world))


def load(world: World) -> float:
    """Requests that run on replicas in service, and that wait."""
    return float(sum(replica.used for replica in world.ready) + len(world.queue))
