"""How far the fitted model is from what was measured: on what it saw, and on GPUs and models it did not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from controlplane.policy.gpus import gpu
from controlplane.policy.models import model
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
