"""How far the fitted model is from what was measured: on what it saw, and on GPUs and models it did not."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from controlplane.policy.gpus import gpu
from controlplane.policy.models import model
from controlplane.policy.perfbias import Corrections
from controlplane.policy.perfmodel import ROOFLINE, Efficiency, step_model
from controlplane.prediction.perf.data import Observation, predicted_s
from controlplane.prediction.perf.fit import ENGINE, Fitted, fit
from controlplane.prediction.perf.kernels import KernelShares


@dataclass(frozen=True, slots=True)
class Residual:
    """Relative errors of `n` rows: median and 90 % of the absolute ones, median of the signed ones (above 0: we say
    slower than it is); `prior`: the median with the roofline alone."""

    group: str
    n: int
    median: float
    p90: float
    bias: float
    prior: float


def residual(
    group: str, rows: Sequence[Observation], efficiency: Callable[[Observation], Efficiency]
) -> Residual:
    errors = np.array([_error(row, efficiency(row)) for row in rows])
    prior = np.array([_error(row, ROOFLINE) for row in rows])
    size = np.abs(errors)
    return Residual(
        group,
        len(rows),
        round(float(np.median(size)), 4),
        round(float(np.quantile(size, 0.9)), 4),
        round(float(np.median(errors)), 4),
        round(float(np.median(np.abs(prior))), 4),
    )


def seen(rows: Sequence[Observation], fitted: Fitted) -> list[Residual]:
    """By GPU, model and dtype, of the engine whose coefficients are kept; then all of them."""
    mine = [row for row in rows if row.engine == ENGINE]
    groups = _grouped(mine, lambda row: f"{row.gpu} {row.model} {row.dtype}")
    found = [residual(name, group, lambda row: fitted.of(row.gpu)) for name, group in groups]
    return [*found, residual("all", mine, lambda row: fitted.of(row.gpu))]


def held_out(rows: Sequence[Observation], kernels: Mapping[str, KernelShares], by: str) -> list[Residual]:
    """Each GPU (or model) predicted by a fit that never saw an engine on it. For a GPU that only older engines were
    timed on, theirs with overheads that were fitted on the other GPUs."""
    found = []
    for name, group in _grouped(rows, lambda row: str(getattr(row, by))):
        engine = ENGINE if any(row.engine == ENGINE for row in group) else "vllm-2023"
        judged = [row for row in group if row.engine == engine]
        rest = [row for row in rows if getattr(row, by) != name]
        if not judged or not any(row.engine == engine for row in rest) or len({r.gpu for r in rest}) < 2:
            continue
        fitted = fit(rest, kernels)
        label = name if engine == ENGINE else f"{name} ({engine})"
        found.append(residual(label, judged, lambda row, f=fitted, e=engine: f.of(row.gpu, e)))  # type: ignore[misc]
    return found


@dataclass(frozen=True, slots=True)
class Corrected:
    """Models held out, with the online correction (policy/perfbias.py) by model, GPU and dtype: median absolute error
    before it and from the `after`-th measurement on, and the shares that stay under p50 and p90."""

    group: str
    n: int
    before: float
    median: float
    under_p50: float
    under_p90: float


def corrected(
    rows: Sequence[Observation], kernels: Mapping[str, KernelShares], *, after: int = 5, seed: int = 1
) -> list[Corrected]:
    """Of each held-out model of the engine; its measurements come in random order, a correction for each pair."""
    found = []
    for name, group in _grouped([r for r in rows if r.engine == ENGINE], lambda row: row.model):
        fitted = fit([row for row in rows if row.model != name], kernels)
        group = random.Random(seed).sample(group, len(group))
        corrections, n_seen = Corrections(), Counter[tuple[str, ...]]()
        raw, errors, p50, p90 = [], [], 0, 0
        for row in group:
            ratio = _error(row, fitted.of(row.gpu)) + 1  # predicted over observed
            likely = corrections.likely(row.pair, ratio)
            if n_seen[row.pair] >= after:
                raw.append(abs(ratio - 1))
                errors.append(abs(likely.p50_s - 1))
                p50 += likely.p50_s >= 1
                p90 += likely.p90_s >= 1
            corrections.observe(row.pair, ratio, 1.0)
            n_seen[row.pair] += 1
        if errors:
            n = len(errors)
            before, after_it = (round(float(np.median(values)), 4) for values in (raw, errors))
            found.append(Corrected(name, n, before, after_it, round(p50 / n, 3), round(p90 / n, 3)))
    return found


def _error(row: Observation, efficiency: Efficiency) -> float:
    step = step_model(model(row.model).with_dtype(row.dtype), gpu(row.gpu), row.tp, efficiency)
    return predicted_s(row, step) / row.seconds - 1


def _grouped(
    rows: Iterable[Observation], key: Callable[[Observation], str]
) -> list[tuple[str, list[Observation]]]:
    groups: dict[str, list[Observation]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return sorted(groups.items())
