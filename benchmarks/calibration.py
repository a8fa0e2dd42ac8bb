"""What a simulated engine must know of a live one, measured by its clients in a run of its own.

Steps: a base, a share per running sequence, a share per prompt token (autoscaler/sim and the performance model have
these terms). Around the engine: the way of a request through gateway, Redis and worker to it and of its first token
back, as one duration; and by how much a gap that a client sees differs from the step that made it (flushes, sockets,
other processes on the same cores). Pure arithmetic on records of replay.py.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.replay import Seen
from benchmarks.stats import quantile
from controlplane.policy.perfmodel import StepModel
from controlplane.prediction.perf.nnls import nnls

_ROUNDS = 20
_HUBER = 0.1  # of a gap: what differs more than this was not the engine's doing
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
    """From records of which the first `alone` met an idle engine; the others overlap. ValueError for too few."""
    whole = [one for one in seen if one.is_whole and len(one.tokens_s) > 1]
    gaps = _gaps(whole)
    firsts = [one for one in seen[:alone] if one.is_whole]
    if len(gaps) < 100 or len(firsts) < 5:
        raise ValueError(f"{len(gaps)} gaps, {len(firsts)} requests alone: too few to calibrate from")
    # Columns: base, per running sequence, per prompt token, the way.
    rows = [[1.0, n, n_prompt, 0.0] for _, n, n_prompt in gaps]
    rows += [[1.0, 0.0, one.n_prompt, 1.0] for one in firsts]
    seconds = np.array([s for s, _, _ in gaps] + [one.tokens_s[0] - one.sent_s for one in firsts])
    columns = np.array(rows, dtype=float)
    # As many firsts as gaps, in weight: only they tell the way.
    balance = np.concatenate([np.ones(len(gaps)), np.full(len(firsts), (len(gaps) / len(firsts)) ** 0.5)])
    weight = balance
    x = np.zeros(4)
    for _ in range(_ROUNDS):
        x = nnls(columns * (weight / seconds)[:, None], weight)
        error = np.abs(columns @ x - seconds) / seconds
        weight = balance * np.sqrt(np.minimum(1.0, _HUBER / np.maximum(error, 1e-9)))
    base_s, seq_s, token_s, way_s = (float(value) for value in x)
    step = StepModel(base_s, 0.0, token_s, max(seq_s - token_s, 0.0), 0.0, 0.0)
    left = seconds - columns @ x
    return Calibrated(
        step, way_s, _quantiles(left[: len(gaps)].tolist()), _quantiles(left[len(gaps) :].tolist())
    )


def _gaps(whole: Sequence[Seen]) -> list[tuple[float, int, int]]:
    """Of each gap its length, the requests that were decoding, and the prompt tokens computed in it."""
    firsts = sorted((one.tokens_s[0], one.n_prompt) for one in whole)
    starts = [at_s for at_s, _ in firsts]
    ends = sorted(one.tokens_s[-1] for one in whole)
    median_s = statistics.median(
        b - a for one in whole for a, b in zip(one.tokens_s, one.tokens_s[1:], strict=False)
    )
    found = []
    for one in whole:
        for a, b in zip(one.tokens_s, one.tokens_s[1:], strict=False):
            if b - a < median_s / 10:
                continue  # two tokens in one read
            # Half a gap of grace: clients of one step hear of it at slightly different times.
            half_s = (b - a) / 2
            joined = range(bisect_right(starts, a + half_s), bisect_right(starts, b + half_s))
            n_old = bisect_right(starts, a + half_s) - bisect_left(ends, b - half_s)
            found.append((b - a, max(n_old, 1), sum(firsts[i][1] for i in joined)))
    return found


def _quantiles(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(quantile(values, (i + 0.5) / _N_NOISE) for i in range(_N_NOISE))
