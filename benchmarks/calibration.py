"""What a simulated engine must know of a live one, measured by its clients in a run of its own.

Steps: a base, a share per running sequence, a share per prompt token (autoscaler/sim and the performance model have
these terms). Around the engine: the way of a request through gateway, Redis and worker to it and of its first token
back, as one duration; how long a flush keeps the next one back, so that the tokens of quick steps reach the client
several at a time (workers/publisher.py); and by how much a gap that a client sees differs from what these make of it
(sockets, other processes on the same cores). Pure arithmetic on records of replay.py.

What a client reads is not what the engine steps: the tiny model makes a token in 3 ms, and a client reads two or three
of them every 8 ms. Time is therefore measured over the tokens that were made, as the usage tells, never over reads.
"""

from __future__ import annotations

import itertools
import math
import statistics
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.replay import Seen
from benchmarks.stats import quantile
from controlplane.policy.perfmodel import StepModel
from controlplane.prediction.perf.nnls import nnls

WARM_UP = 4
_MIN_STRETCHES = 3  # of a size of batch, for a median
_STRETCH = 8  # reads: their jitter is gone from a sum, a stall of the machine spoils one stretch only
TOGETHER_S = 0.0005  # what comes within it was sent at once
_N_TRIED = 400  # durations of a flush
_N_NOISE = 200  # quantiles kept of each noise


@dataclass(frozen=True)
class Calibrated:
    """`way_s`: to the engine and back, median. `flush_s`: tokens made within it reach the client together, with the one
    after it. Noises: quantiles, evenly spaced, of what a client saw over what the step model says; of gaps and of first
    tokens, in seconds. `busy_noise_s`: of first tokens of requests that met an engine at work, over what the simulation
    says of them; empty until it was asked (truth.py)."""

    step: StepModel
    way_s: float
    flush_s: float
    gap_noise_s: tuple[float, ...]
    first_noise_s: tuple[float, ...]
    busy_noise_s: tuple[float, ...] = ()


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
    for n, stretch in _stretches(gaps):
        by_n[n].append(sum(g.seconds for g in stretch) / sum(g.n_tokens for g in stretch))
    sizes = {n: found for n, found in by_n.items() if len(found) >= _MIN_STRETCHES}
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
    flush_s = _flush_s(gaps, step)
    gap_noise = []
    for gap in gaps:
        step_s = step.step_s(0, 0.0, gap.n_running, 0)
        gap_noise.append(gap.seconds - step_s * together(step_s, flush_s))
    noises = spread(gap_noise), spread([value - way_s for value in left])
    return Calibrated(step, way_s, flush_s, *noises)


def _flush_s(gaps: Sequence[_Gap], step: StepModel) -> float:
    """The duration that tells best how many tokens came together beside how many others; 0 where hardly any did."""
    by_n: dict[int, list[int]] = defaultdict(list)
    for gap in gaps:
        by_n[gap.n_running].append(gap.n_tokens)
    known = [(step.step_s(0, 0.0, n, 0), statistics.fmean(found), len(found)) for n, found in by_n.items()]

    def off(flush_s: float) -> float:
        return sum(n * abs(together(step_s, flush_s) - mean) for step_s, mean, n in known)

    most_s = max(step_s * mean for step_s, mean, _ in known)
    best = [most_s * i / _N_TRIED for i in range(_N_TRIED + 1)]
    least = min(map(off, best))
    fitting = [flush_s for flush_s in best if off(flush_s) <= least * (1 + 1e-9)]
    return 0.0 if fitting[0] == 0.0 else statistics.median(fitting)


def together(step_s: float, flush_s: float) -> int:
    """Steps whose tokens leave in one flush: those that end before the flush before it is answered, and one more."""
    return max(1, math.ceil(flush_s / step_s)) if step_s > 0 else 1


def reads(one: Seen) -> list[tuple[float, int]]:
    """(instant, tokens) of what the client read at once."""
    found: list[tuple[float, int]] = []
    for at_s in one.tokens_s:
        if found and at_s - found[-1][0] < TOGETHER_S:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((at_s, 1))
    return found


def _line(points: Sequence[tuple[float, float, int]]) -> tuple[float, float]:
    """Seconds at zero and per unit, neither negative, through (units, seconds, weight)."""
    weight = np.sqrt([n for _, _, n in points]) / np.array([s for _, s, _ in points])
    a = np.array([[1.0, x] for x, _, _ in points]) * weight[:, None]
    x = nnls(a, np.array([s for _, s, _ in points]) * weight)
    return float(x[0]), float(x[1])


@dataclass(frozen=True)
class _Gap:
    """Between two reads of one client: so many tokens in the second; requests that were decoding meanwhile.
    `is_next`: it follows the one before it in the list."""

    seconds: float
    n_tokens: int
    n_running: int
    is_next: bool


def _gaps(whole: Sequence[Seen]) -> list[_Gap]:
    """Without those near another's first token, of which clients cannot tell in which step its prompt was computed."""
    starts = sorted(one.tokens_s[0] for one in whole)
    ends = sorted(one.tokens_s[-1] for one in whole)
    of = [reads(one) for one in whole]
    all_s = [b - a for found in of for (a, _), (b, _) in itertools.pairwise(found)]
    usual_s = statistics.median(all_s) if all_s else 0.0
    gaps = []
    for found in of:
        is_next = False
        for (a, _), (b, n_tokens) in itertools.pairwise(found):
            n_starts = bisect_right(starts, b + usual_s) - bisect_left(starts, a - usual_s)
            # A first token comes a longer way than the others: the gap after it is too short.
            if a == found[0][0] or n_starts > (found[0][0] >= a - usual_s):
                is_next = False
                continue
            n = bisect_right(starts, a) - bisect_left(ends, (a + b) / 2)
            gaps.append(_Gap(b - a, n_tokens, max(n, 1), is_next))
            is_next = True
    return gaps


def _stretches(gaps: Sequence[_Gap]) -> Iterator[tuple[int, list[_Gap]]]:
    """Gaps of one client in a row beside as many others, some at a time."""
    row: list[_Gap] = []
    for gap in gaps:
        if row and (not gap.is_next or gap.n_running != row[0].n_running or len(row) == _STRETCH):
            yield row[0].n_running, row
            row = []
        row.append(gap)
    if row:
        yield row[0].n_running, row


def spread(values: Sequence[float]) -> tuple[float, ...]:
    """Quantiles of these, evenly spaced: what a simulated value is widened with."""
    return tuple(quantile(values, (i + 0.5) / _N_NOISE) for i in range(_N_NOISE))
