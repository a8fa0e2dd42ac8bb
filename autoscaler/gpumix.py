"""The cheapest fleet for a mix of request sizes: a small mixed-integer programme with a time limit.

Replicas by kind are whole, shares of a bucket are not: routing sends them by weight. (Mélange cuts buckets into slices
instead; shares leave nothing to choose about the slices' number.) HiGHS, one thread, fixed seed; the greedy plan of
policy/gpumix.py is the fallback and never cheaper. Called by `manage.py gpu_mix` and the study.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import highspy
import numpy as np

from autoscaler.policy.gpumix import Fleet, Kind, describe, greedy


def cheapest(
    kinds: Sequence[Kind], table: Sequence[Sequence[float]], *, time_limit_s: float = 5.0
) -> Fleet | None:
    """The cheapest fleet, or the best found within the limit, or the greedy one; its reason says which. None when some
    bucket can be served by no kind or there are too few replicas of those that can. `table`: policy.gpumix.loads."""
    if time_limit_s <= 0:
        raise ValueError(f"time_limit_s = {time_limit_s}: set more than 0")
    fallback = greedy(kinds, table)
    if any(not any(math.isfinite(value) for value in row) for row in table):
        return None
    status, shares, bound = _solve(kinds, table, time_limit_s)
    if shares is not None:
        is_done = status == highspy.HighsModelStatus.kOptimal
        why = "optimal" if is_done else f"stopped after {time_limit_s:g} s"
        found = describe(kinds, table, shares, bound, why)
        if found is not None and (fallback is None or found.usd_per_h <= fallback.usd_per_h + 1e-9):
            return found
    return fallback


def _solve(
    kinds: Sequence[Kind], table: Sequence[Sequence[float]], time_limit_s: float
) -> tuple[Any, list[dict[str, float]] | None, float]:
    """(status, shares by bucket or None, lower bound). Columns: replicas by kind, then shares by bucket and kind."""
    k = len(kinds)
    n = k + k * len(table)
    upper = np.ones(n)
    upper[:k] = [kind.n_most for kind in kinds]
    rows: list[tuple[list[int], list[float], float, float]] = []
    for b, row in enumerate(table):
        at = range(k + b * k, k + b * k + k)
        rows.append((list(at), [1.0] * k, 1.0, 1.0))
        for g, value in enumerate(row):
            if not math.isfinite(value):
                upper[k + b * k + g] = 0.0
    for g in range(k):
        used = [b for b, row in enumerate(table) if math.isfinite(row[g])]
        rows.append(
            (
                [*(k + b * k + g for b in used), g],
                [*(table[b][g] for b in used), -1.0],
                -highspy.kHighsInf,
                0.0,
            )
        )
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = n, len(rows)
    lp.col_cost_ = np.array([*(kind.usd_per_h for kind in kinds), *([0.0] * (n - k))])
    lp.col_lower_, lp.col_upper_ = np.zeros(n), upper
    whole, part = highspy.HighsVarType.kInteger, highspy.HighsVarType.kContinuous
    lp.integrality_ = [whole] * k + [part] * (n - k)
    lp.row_lower_, lp.row_upper_ = np.array([r[2] for r in rows]), np.array([r[3] for r in rows])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.cumsum([0, *(len(r[0]) for r in rows)])
    lp.a_matrix_.index_ = np.array([c for r in rows for c in r[0]])
    lp.a_matrix_.value_ = np.array([v for r in rows for v in r[1]])
    solver: Any = highspy.Highs()  # type: ignore[no-untyped-call]
    for option, value in (
        ("output_flag", False),
        ("threads", 1),
        ("random_seed", 0),
        ("time_limit", time_limit_s),
    ):
        solver.setOptionValue(option, value)
    solver.passModel(lp)
    solver.run()
    info = solver.getInfo()
    bound = max(float(info.mip_dual_bound), 0.0)
    if info.primal_solution_status != 2:  # no feasible point
        return solver.getModelStatus(), None, bound
    values = solver.getSolution().col_value
    shares = [
        {
            kind.name: float(values[k + b * k + g])
            for g, kind in enumerate(kinds)
            if values[k + b * k + g] > 1e-9
        }
        for b in range(len(table))
    ]
    return solver.getModelStatus(), shares, bound
