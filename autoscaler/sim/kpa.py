"""Knative's pod autoscaler, as pkg/autoscaler/scaling/autoscaler.go computes it; nothing of ours in it.

Concurrency averaged over a stable and a panic window over a target per pod, within the scale-up and scale-down rates.
Panic begins when the panic window alone wants `panic_threshold` times what is ready, ends when a whole stable window
has passed without that, and only grows meanwhile; a scale-down delay takes the highest wish of its window.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KpaSpec:
    """`target`: concurrency per pod. The rest are Knative's defaults (config-autoscaler), bar the simulated bounds."""

    target: float
    stable_window_s: float = 60.0
    panic_share: float = 0.1  # panic window, of the stable one
    panic_threshold: float = 2.0
    max_scale_up_rate: float = 1000.0
    max_scale_down_rate: float = 2.0
    scale_down_delay_s: float = 0.0
    n_min: int = 1
    n_max: int = 1000

    def __post_init__(self) -> None:
        if self.target <= 0 or self.stable_window_s <= 0 or not 0 < self.panic_share <= 1:
            raise ValueError(
                f"{self}: target and stable_window_s must be positive, panic_share within 0 and 1"
            )


class Kpa:
    """Its state between two looks."""

    def __init__(self, spec: KpaSpec) -> None:
        self.spec = spec
        self._samples: deque[tuple[float, float]] = deque()
        self._wishes: deque[tuple[float, int]] = deque()
        self._panic_s: float | None = None
        self._n_panic = 0

    def replicas(self, now_s: float, n_ready: int, concurrency: float) -> int:
        """Pods wanted, from one more measurement."""
        spec = self.spec
        self._samples.append((now_s, concurrency))
        while self._samples[0][0] <= now_s - spec.stable_window_s:
            self._samples.popleft()
        stable = sum(value for _, value in self._samples) / len(self._samples)
        panic_s = spec.stable_window_s * spec.panic_share
        recent = [value for at_s, value in self._samples if at_s > now_s - panic_s]
        n = self.desired(now_s, n_ready, stable, sum(recent) / len(recent))
        return min(max(n, spec.n_min), spec.n_max)

    def desired(self, now_s: float, n_ready: int, stable: float, panic: float) -> int:
        """Pods wanted for what the two windows show."""
        spec = self.spec
        n_ready = max(n_ready, 1)
        highest = math.ceil(spec.max_scale_up_rate * n_ready)
        lowest = math.floor(n_ready / spec.max_scale_down_rate)
        n_stable = math.ceil(stable / spec.target - 1e-9)
        n_panic = math.ceil(panic / spec.target - 1e-9)
        is_over = n_panic / n_ready >= spec.panic_threshold
        n_stable = min(max(n_stable, lowest), highest)
        n_panic = min(max(n_panic, lowest), highest)
        if is_over:
            self._panic_s = now_s
        elif self._panic_s is not None and self._panic_s + spec.stable_window_s < now_s:
            self._panic_s, self._n_panic = None, 0
        n = n_stable
        if self._panic_s is not None:
            self._n_panic = max(self._n_panic, n_stable, n_panic)
            n = self._n_panic
        if spec.scale_down_delay_s > 0:
            self._wishes.append((now_s, n))
            while self._wishes[0][0] <= now_s - spec.scale_down_delay_s:
                self._wishes.popleft()
            n = max(wish for _, wish in self._wishes)
        return n
