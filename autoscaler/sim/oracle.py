"""What a buyer who knows the future would pay: the lower bound in every spot table.

A linear programme over the ticks of the market (HiGHS): machines of each zone and on-demand that are held at each
tick, and how many are newly ordered. A machine serves once it has been held for the boot time, within capacity from
the order on; shortage is allowed for exactly the share of wanted machine time that the availability target leaves.
Fractions of machines are allowed, which only lowers the bound.

With `covered` it knows the future as well, but must at every tick hold enough without any one zone, as a buyer must who
is not told in time which zone goes next: the least that such cover costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np

from autoscaler.sim.fleet import GRACE_S
from autoscaler.sim.market import Steps, Zone
from autoscaler.sim.scenario import Setting


@dataclass(frozen=True, slots=True)
class Bound:
    """Least cost in USD, and the share of it paid for on-demand."""

    usd: float
    on_demand_share: float
    solve_s: float


class OracleError(RuntimeError):
    """The solver found no optimum in time; says so."""


def bound_of(
    setting: Setting, demand: Steps, availability: float, tick_s: float = 0.0, *, covered: bool = False
) -> Bound:
    """The bound for a run's own demand, as its availability counts it: what has been wanted for a start's duration. Of
    each tick only the least counts, and what a start takes is free at the very beginning: both lower the bound."""
    due_s = setting.terms.boot_s + GRACE_S
    tick_s = tick_s or max(zone.gap_s for zone in setting.zones)
    until_s = min(setting.until_s, *(zone.end_s for zone in setting.zones))
    return cheapest(
        setting.zones,
        lambda now_s: demand.least(now_s - due_s, now_s + tick_s),
        until_s,
        boot_s=setting.terms.boot_s,
        on_demand_usd_per_h=setting.terms.on_demand_usd_per_h,
        availability=availability,
        tick_s=tick_s,
        covered=covered,
    )


def cheapest(
    zones: tuple[Zone, ...],
    wanted: Callable[[float], int],
    until_s: float,
    *,
    boot_s: float,
    on_demand_usd_per_h: float,
    availability: float,
    tick_s: float = 195.0,
    time_limit_s: float = 120.0,
    covered: bool = False,
) -> Bound:
    """The bound. Booting takes whole ticks, rounded down (again in the oracle's favour); each start is paid besides for
    what was rounded away."""
    n = math.floor(until_s / tick_s)
    n_boot = math.floor(boot_s / tick_s)
    rest_h = (boot_s - n_boot * tick_s) / 3600
    tick_h = tick_s / 3600
    need = np.array([wanted(i * tick_s) for i in range(n)], dtype=float)
    offers = [*zones, None]
    k = len(offers)
    # Columns: held[offer][tick], ordered[offer][tick], short[tick].
    n_columns = 2 * k * n + n
    cost = np.zeros(n_columns)
    upper = np.full(n_columns, highspy.kHighsInf)
    for j, zone in enumerate(offers):
        usd_per_h = on_demand_usd_per_h if zone is None else zone.usd_per_h
        cost[j * n : (j + 1) * n] = usd_per_h * tick_h
        cost[(k + j) * n : (k + j + 1) * n] = usd_per_h * rest_h
        if zone is not None:
            # The most that could be held at its beginning or end: exact where ticks are the recording's.
            upper[j * n : (j + 1) * n] = [
                max(zone.at(i * tick_s), zone.at((i + 1) * tick_s - 1e-6)) for i in range(n)
            ]
    upper[2 * k * n :] = need
    starts, index, value, low, high = [0], [], [], [], []

    def row(columns: list[int], values: list[float], lowest: float, highest: float) -> None:
        index.extend(columns)
        value.extend(values)
        starts.append(len(index))
        low.append(lowest)
        high.append(highest)

    inf = highspy.kHighsInf
    for j in range(k):
        for i in range(1, n):  # held grows by what is ordered; the first tick is given
            row([j * n + i, j * n + i - 1, (k + j) * n + i], [1, -1, -1], -inf, 0)
    for i in range(n):  # serving: held now and not ordered within the boot time
        for without in range(k - 1) if covered else (-1,):
            columns, values = [2 * k * n + i], [1.0]
            for j in range(k):
                if j == without:
                    continue
                columns.append(j * n + i)
                values.append(1.0)
                for back in range(n_boot):
                    if i - back >= 1:
                        columns.append((k + j) * n + i - back)
                        values.append(-1.0)
            row(columns, values, float(need[i]), inf)
    row(list(range(2 * k * n, n_columns)), [1.0] * n, -inf, float((1 - availability) * need.sum()))

    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = n_columns, len(low)
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = cost, np.zeros(n_columns), upper
    lp.row_lower_, lp.row_upper_ = np.array(low), np.array(high)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.array(starts)
    lp.a_matrix_.index_ = np.array(index)
    lp.a_matrix_.value_ = np.array(value, dtype=float)
    solver: Any = highspy.Highs()  # type: ignore[no-untyped-call]
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("time_limit", time_limit_s)
    solver.setOptionValue("threads", 1)
    solver.passModel(lp)
    solver.run()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        raise OracleError(f"the oracle found no optimum within {time_limit_s:g} s: {solver.getModelStatus()}")
    solution = np.array(solver.getSolution().col_value)
    paid = solution * cost
    on_demand = paid[(k - 1) * n : k * n].sum() + paid[(2 * k - 1) * n : 2 * k * n].sum()
    total = float(paid.sum())
    return Bound(total, float(on_demand) / max(total, 1e-12), solver.getRunTime())
