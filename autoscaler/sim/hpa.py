"""Kubernetes' horizontal pod autoscaler, as its documentation and its controller compute it; nothing of ours in it.

`autoscaling/v2` on one external metric with an average value per pod (here: requests running and waiting): the ratio of
usage to target with a tolerance, the ceiling, and the default behaviour: growing by 100 % or 4 pods per 15 s, whichever
is more, at once; shrinking to the highest recommendation of the stabilisation window. Sources: "Horizontal Pod
Autoscaling", algorithm details and default behaviour (kubernetes.io); replica_calculator.go and horizontal.go.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HpaSpec:
    """`target`: average metric value per pod. The rest are Kubernetes' defaults."""

    target: float
    tolerance: float = 0.1
    stabilisation_s: float = 300.0
    period_s: float = 15.0
    up_ratio: float = 1.0  # per period: this share more,
    up_pods: int = 4  # or so many, whichever is more
    n_min: int = 1
    n_max: int = 1000

    def __post_init__(self) -> None:
        if self.target <= 0 or self.tolerance < 0 or self.stabilisation_s < 0 or self.period_s <= 0:
            raise ValueError(f"{self}: target and period_s must be positive, the others not negative")


class Hpa:
    """Its state between two looks."""

    def __init__(self, spec: HpaSpec) -> None:
        self.spec = spec
        self._recommended: deque[tuple[float, int]] = deque()
        self._looked_s = -math.inf
        self._n: int | None = None
        self._grown: deque[tuple[float, int]] = deque()  # (when, by how many)

    def replicas(self, now_s: float, n_now: int, usage: float) -> int:
        """Replicas from now on; `n_now` in the scale's status, total `usage`. Asked between two periods it keeps its
        word."""
        if self._n is not None and now_s - self._looked_s < self.spec.period_s:
            return self._n
        self._looked_s = now_s
        self._n = self._bounded(now_s, max(n_now, 0), self.recommendation(n_now, usage))
        return self._n

    def recommendation(self, n_now: int, usage: float) -> int:
        """What the metric alone asks for."""
        spec = self.spec
        if n_now == 0:
            return math.ceil(usage / spec.target)
        ratio = usage / (spec.target * n_now)
        return n_now if abs(1 - ratio) <= spec.tolerance + 1e-12 else math.ceil(usage / spec.target - 1e-9)

    def _bounded(self, now_s: float, n_now: int, n: int) -> int:
        spec = self.spec
        self._recommended.append((now_s, n))
        while self._recommended[0][0] < now_s - spec.stabilisation_s:
            self._recommended.popleft()
        if n < n_now:  # not below the highest of the window, and never up for that reason
            n = min(n_now, max(wish for _, wish in self._recommended))
        while self._grown and self._grown[0][0] <= now_s - spec.period_s:
            self._grown.popleft()
        n_before = n_now - sum(by for _, by in self._grown)
        most = max(n_before + spec.up_pods, math.ceil(n_before * (1 + spec.up_ratio)))
        n = min(max(min(n, max(most, n_now)), spec.n_min), spec.n_max)
        if n > n_now:
            self._grown.append((now_s, n - n_now))
        return n
