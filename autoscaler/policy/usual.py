"""What load a deployment usually has, as a histogram that forgets: how much room its own bursts take. Pure.

Averages say nothing of bursts, and the highest load of the last quarter of an hour is one sample of them. A high
quantile of the load of the last minutes, old ones counting less and less, is neither: it keeps room for what comes
again and again, gives up what came once, and needs no season. (Kubernetes' vertical pod autoscaler sizes requests for
memory by such a histogram.) Called by replicas.py in every tick; small enough to be stored with every decision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

RATIO: Final = 1.05  # of one bucket to the next: how exact a level is
MAX_BUCKETS: Final = 320  # from one request to six millions
_LOG: Final = math.log(RATIO)
_LONGEST_S: Final = 60.0  # what one look stands for at most: a pause of the scaler is no load
_NOTHING: Final = 1e-3


@dataclass(frozen=True, slots=True)
class UsualMemory:
    """Seconds spent at each load, fading: `weights[i]` at loads of about RATIO ** (first + i) requests."""

    at_s: float = 0.0
    first: int = 0
    weights: tuple[float, ...] = ()


def learn(now_s: float, load: float, memory_s: float, memory: UsualMemory | None) -> UsualMemory:
    """One look more: `load` in requests since the last one. What is `memory_s` old counts 1 / e. Looks backwards in
    time are ignored."""
    if memory is None:
        return UsualMemory(at_s=now_s)
    passed_s = now_s - memory.at_s
    if passed_s <= 0:
        return memory
    keep = math.exp(-passed_s / memory_s)
    weights = {memory.first + i: weight * keep for i, weight in enumerate(memory.weights)}
    bucket = min(round(math.log(max(load, 1.0)) / _LOG), MAX_BUCKETS - 1)
    weights[bucket] = weights.get(bucket, 0.0) + min(passed_s, _LONGEST_S)
    held = [number for number, weight in weights.items() if weight > _NOTHING]
    first, last = min(held), max(held)
    return UsualMemory(now_s, first, tuple(round(weights.get(n, 0.0), 3) for n in range(first, last + 1)))


def level(share: float, memory: UsualMemory | None, proven_s: float) -> float | None:
    """The load that is exceeded in `1 - share` of the time; None, "cannot tell", before `proven_s` were seen."""
    if memory is None or not memory.weights:
        return None
    total = sum(memory.weights)
    if total < proven_s:
        return None
    below = 0.0
    for i, weight in enumerate(memory.weights):
        below += weight
        if below >= share * total:
            return RATIO ** (memory.first + i)
    return RATIO ** (memory.first + len(memory.weights) - 1)
