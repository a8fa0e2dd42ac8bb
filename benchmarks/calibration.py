"""What a simulated engine must know of a live one, measured by its clients in a run of its own.

Steps: a base, a share per running sequence, a share per prompt token (autoscaler/sim and the performance model have
these terms). Around the engine: the way of a request through gateway, Redis and worker to it and of its first token
back, as one duration; and by how much a gap that a client sees differs from the step that made it (flushes, sockets,
other processes on the same cores). Pure arithmetic on records of replay.py.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.replay import Seen
from benchmarks.stats import quantile
from controlplane.policy.perfmodel import StepModel
from controlplane.prediction.perf.nnls import nnls

WARM_UP = 4
_MIN_GAPS = 10  # of a size of batch, for a median
_N_NOISE = 200  # quantiles kept of each noise


@dataclass(frozen=True)
class Calibrated:
    """`way_s`: to the engine and back, median. Noises: quantiles, evenly spaced, of what a client saw over what the
    step model says; of gaps and of first tokens, in seconds."""

    step: StepModel
    way_s: float
    gap_noise_s: tuple[float, ...]
    first_noise_s: tuple[float, ...]


def calibrate(seen: Sequence[Seen], alone: int) -> Calibrated:
    """From records of which the first `alone` met an idle engine; the others overlap. ValueError for too few.

    Medians first, then lines through them: on a busy machine one gap in ten is anything. The first `WARM_UP` records
    only warm caches and connections.
    """
    seen, alone = seen[WARM_UP:], alone - WARM_UP
    whole = [one for one in seen if one.is_whole and len(one.tokens_s) > 1]
    gaps = _gaps(whole)
    firsts = [one for one in seen[:alone] if one.is_whole]
    by_n: dict[int, list[float]] = defaultdict(list)
    for gap_s, n in gaps:
        by_n[n].append(gap_s)
    sizes = {n: found for n, found in by_n.items() if len(found) >= _MIN_GAPS}
    if len(sizes) < 3 or len(firsts) < 6:
        raise ValueError(
            f"{len(sizes)} sizes of batches, {len(firsts)} requests alone: too few to calibrate from"
        )
    base_s, per_seq_s = _line([(n, statistics.median(g), len(g)) for n, g in sizes.items()])
    by_prompt: dict[int, list[float]] = defaultdict(list)
    for one in firsts:
        by_prompt[one.n_prompt].append(one.tokens_s[0] - one.sent_s)
    _, token_s = _line([(n, statistics.median(t), len(t)) for n, t in by_prompt.items()])
    left = [one.tokens_s[0] - one.sent_s - base_s - token_s * one.n_prompt for one in firsts]
    way_s = max(statistics.median(left), 0.0)
    step = StepModel(base_s, 0.0, token_s, max(per_seq_s - token_s, 0.0), 0.0, 0.0)
    gap_noise = [gap_s - step.step_s(0, 0.0, n, 0) for gap_s, n in gaps]
    return Calibrated(step, way_s, _quantiles(gap_noise), _quantiles([value - way_s for value in left]))


def _line(points: Sequence[tuple[float, float, int]]) -> tuple[float, float]:
    """Seconds at zero and per unit, neither negative, through (units, seconds, weight)."""
    weight = np.sqrt([n for _, _, n in points]) / np.array([s for _, s, _ in points])
    a = np.array([[1.0, x] for x, _, _ in points]) * weight[:, None]
    x = nnls(a, np.array([s for _, s, _ in points]) * weight)
    return float(x[0]), float(x[1])


def _gaps(whole: Sequence[Seen]) -> list[tuple[float, int]]:
    """Of each gap its length and the requests that were decoding; without those near somebody's first token, of which
    clients cannot tell in which step its prompt was computed."""
    starts = sorted(one.tokens_s[0] for one in whole)
    ends = sorted(one.tokens_s[-1] for one in whole)
    all_s = [b - a for one in whole for a, b in zip(one.tokens_s, one.tokens_s[1:], strict=False)]
    usual_s = statistics.median(all_s) if all_s else 0.0
    found = []
    for one in whole:
        for a, b in zip(one.tokens_s, one.tokens_s[1:], strict=False):
            if b - a < usual_s / 10:
                continue  # two tokens in one read
            if bisect_right(starts, b + usual_s) > bisect_left(starts, a - usual_s):
                continue
            n = bisect_right(starts, a) - bisect_left(ends, (a + b) / 2)
            found.append((b - a, max(n, 1)))
    return found


def _quantiles(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(quantile(values, (i + 0.5) / _N_NOISE) for i in range(_N_NOISE))
