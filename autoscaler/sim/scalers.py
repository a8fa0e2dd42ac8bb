"""How many machines a simulated deployment wants: the production scaler, and the rules it is compared with.

Each looks at the world when asked; the fleet asks once per tick. `target_ratio` of the slots should be busy.
HPA follows Kubernetes' documented algorithm (ratio with 10 % tolerance, 15 s period, highest wish of the last 300 s
when shrinking); KPA is Knative's (stable window 60 s, panic window 6 s at twice what is ready).
"""

from __future__ import annotations

import math
from collections import deque
from typing import Protocol

from autoscaler.policy.replicas import wish
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

    def __init__(self, spec: ScalerSpec) -> None:
        self.spec = spec
        self.memory = ScalerMemory()
        self._n = 0

    def wanted(self, world: World, n_starting: int, now_s: float) -> int:
        self._n += 1
        views = [
            ReplicaView(
                f"{r.id:08d}", "m", ReplicaPhase.READY, 0.0, 0.0, r.slots, r.used, self._n, r.n_dispatched
            )
            for r in world.ready
        ]
        views += [
            ReplicaView(f"s{i:07d}", "m", ReplicaPhase.STARTING, now_s, now_s, self.spec.slots)
            for i in range(n_starting)
        ]
        observation = Observation(now_s, "d", len(world.queue), tuple(views))
        wanted = wish(observation, self.spec, self.memory)
        self.memory = wanted.memory
        return wanted.n


class Hpa:
    """Kubernetes' horizontal pod autoscaler on busy slots and the queue."""

    def __init__(self, slots: int, target_ratio: float, *, n_min: int = 1, n_max: int = 1000) -> None:
        self.slots, self.target_ratio, self.n_min, self.n_max = slots, target_ratio, n_min, n_max
        self._wishes: deque[tuple[float, int]] = deque()

    def wanted(self, world: World, n_starting: int, now_s: float) -> int:
        n_now = max(len(world.ready) + n_starting, 1)
        load = (sum(r.used for r in world.ready) + len(world.queue)) / self.slots
        ratio = load / n_now / self.target_ratio
        n = n_now if abs(ratio - 1) <= 0.1 else math.ceil(n_now * ratio)
        n = min(max(n, self.n_min), self.n_max)
        self._wishes.append((now_s, n))
        while self._wishes[0][0] < now_s - 300:
            self._wishes.popleft()
        return max(n, min(n_now, max(w for _, w in self._wishes)))


class Kpa:
    """Knative's pod autoscaler on concurrency."""

    def __init__(self, slots: int, target_ratio: float, *, n_min: int = 1, n_max: int = 1000) -> None:
        self.per_replica = slots * target_ratio
        self.n_min, self.n_max = n_min, n_max
        self._samples: deque[tuple[float, float]] = deque()
        self._panic_until_s = -math.inf
        self._panic_n = 0

    def wanted(self, world: World, n_starting: int, now_s: float) -> int:
        load = float(sum(r.used for r in world.ready) + len(world.queue))
        self._samples.append((now_s, load))
        while self._samples[0][0] <= now_s - 60:
            self._samples.popleft()
        stable = sum(v for _, v in self._samples) / len(self._samples)
        recent = [v for at_s, v in self._samples if at_s > now_s - 6]
        short = sum(recent) / len(recent)
        n_ready = max(len(world.ready), 1)
        n_stable, n_short = math.ceil(stable / self.per_replica), math.ceil(short / self.per_replica)
        if n_short / n_ready >= 2:
            self._panic_until_s = now_s + 60
        if now_s < self._panic_until_s:
            self._panic_n = max(self._panic_n, n_short, n_stable)
            n = self._panic_n
        else:
            self._panic_n = 0
            n = max(n_stable, n_ready // 2)  # at most halved at once
        return min(max(n, self.n_min), self.n_max)
