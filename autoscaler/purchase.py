"""Which machines to buy for a whole cell: a mixed-integer programme with a time limit, the greedy plan as fallback.

Chance constraints over scenarios: of the likeliest outcomes of the spot market, a need may miss those that together
stay within 1 - availability, what the scenarios leave out counted as missed. HiGHS, one thread, fixed seed; a plan that
was not stopped by the clock is the same every time. Called by planners and the simulator's buyer. The plan is checked
by the exact tail of policy/tail.py and never dearer than the greedy one. The bound is the programme's own: a plan that
holds only thanks to outcomes that no scenario names may cost less.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import highspy
import numpy as np

from autoscaler.policy.diversify import Need, Plan, Solver, describe, greedy
from autoscaler.policy.tail import Event, Offer, Scenario, scenarios

MAX_SCENARIOS: Final = 300  # per need
# Of the allowed probability, what scenarios may leave out. It counts as missed, so less makes cheaper plans; more makes
# the programme small enough to be solved for a whole cell.
RESIDUAL: Final = 0.25
SPARE: Final = 0.95  # of the time limit: the solver looks at the clock between steps
GAP: Final = 1e-3  # relative: a plan this close to the bound counts as the cheapest


def plan(
    needs: Sequence[Need], offers: Sequence[Offer], events: Sequence[Event], *, time_limit_s: float = 10.0
) -> Plan:
    """The cheapest plan, or the best that `time_limit_s` of solving gave, or the greedy one; it says which.

    The limit covers all of it; the solver gets what the greedy plan and the scenarios leave, a twentieth at least.
    """
    began_s = time.monotonic()
    if time_limit_s <= 0:
        raise ValueError(f"time_limit_s = {time_limit_s}: set more than 0")
    fallback = greedy(needs, offers, events)
    if fallback.unmet:
        return describe(
            fallback.machines,
            needs,
            offers,
            events,
            reasons=(f"not enough machines for {', '.join(fallback.unmet)}",),
        )
    programme = _Programme(needs, offers, events)
    left_s = time_limit_s * SPARE - (time.monotonic() - began_s)
    status, machines, bound = programme.solve(fallback, max(left_s, time_limit_s / 20))
    if machines is None and status != highspy.HighsModelStatus.kTimeLimit:
        why = f"the solver gave no plan ({status.name}); greedy"
        return describe(fallback.machines, needs, offers, events, reasons=(why,))
    is_done = status == highspy.HighsModelStatus.kOptimal
    solver = Solver.OPTIMAL if is_done else Solver.LIMIT
    found = describe(machines or fallback.machines, needs, offers, events, solver)
    if found.unmet or found.usd_per_h > fallback.usd_per_h + 1e-9:
        found = fallback
    bound = min(bound, found.usd_per_h)
    over = f"at most {found.usd_per_h / bound - 1:.2%} above the cheapest" if bound > 0 else "no bound shown"
    head = f"{'optimal' if is_done else f'stopped after {time_limit_s:g} s'}, {over}"
    if found.machines == fallback.machines:
        head += "; the greedy plan"
    return describe(found.machines, needs, offers, events, solver, bound, (head,))


class _Programme:
    """Columns: machines by (need, offer), then a binary per (need, scenario) that may be missed."""

    def __init__(self, needs: Sequence[Need], offers: Sequence[Offer], events: Sequence[Event]) -> None:
        self.needs = sorted(needs, key=lambda n: n.name)
        self.offers = {o.name: o for o in sorted(offers, key=lambda o: o.name)}
        self.cost: list[float] = []
        self.upper: list[float] = []
        self.at: dict[tuple[str, str], int] = {}
        self._rows: list[tuple[list[int], list[float], float, float]] = []
        for need in self.needs:
            for name in sorted(need.units):
                if name in self.offers:
                    self.at[need.name, name] = len(self.cost)
                    self.cost.append(self.offers[name].usd_per_h)
                    self.upper.append(self.offers[name].n_most)
        self.n_counts = len(self.cost)
        inf = highspy.kHighsInf
        for offer in self.offers.values():
            columns = [c for (_, name), c in self.at.items() if name == offer.name]
            if len(columns) > 1:
                self._rows.append((columns, [1.0] * len(columns), -inf, float(offer.n_most)))
        for need in self.needs:
            self._tail(need, events)

    def _tail(self, need: Need, events: Sequence[Event]) -> None:
        """n_units in every scenario but those that may be missed."""
        mine = [
            Event(e.probability, e.offers & need.units.keys()) for e in events if e.offers & need.units.keys()
        ]
        allowed = 1 - need.availability
        outcomes, rest = scenarios(tuple(mine), allowed * RESIDUAL, MAX_SCENARIOS)
        inf = highspy.kHighsInf
        missable: dict[frozenset[str], int] = {}
        budget: tuple[list[int], list[float]] = ([], [])
        for outcome in outcomes:
            columns, values = self._survivors(need, outcome)
            if outcome.probability <= allowed - rest:
                column = len(self.cost)
                self.cost.append(0.0)
                self.upper.append(1.0)
                missable[outcome.lost] = column
                columns, values = [*columns, column], [*values, float(need.n_units)]
                budget[0].append(column)
                budget[1].append(outcome.probability / allowed)
            self._rows.append((columns, values, float(need.n_units), inf))
        if budget[0]:
            self._rows.append((*budget, -inf, max(1 - rest / allowed, 0.0)))
        for lost, column in missable.items():  # who survives the loss of more survives the loss of less
            for name in lost:
                fewer = missable.get(lost - {name})
                if fewer is not None:
                    self._rows.append(([fewer, column], [1.0, -1.0], -inf, 0.0))

    def _survivors(self, need: Need, outcome: Scenario) -> tuple[list[int], list[float]]:
        columns, values = [], []
        for name, each in sorted(need.units.items()):
            if name in self.offers and name not in outcome.lost:
                columns.append(self.at[need.name, name])
                values.append(float(min(each, need.n_units)))
        return columns, values

    def solve(self, start: Plan, time_limit_s: float) -> tuple[Any, dict[str, dict[str, int]] | None, float]:
        """(status, machines by need and offer or None, lower bound of the price)."""
        lp = highspy.HighsLp()
        n = len(self.cost)
        lp.num_col_, lp.num_row_ = n, len(self._rows)
        lp.col_cost_, lp.col_lower_ = np.array(self.cost), np.zeros(n)
        lp.col_upper_ = np.array(self.upper, dtype=float)
        lp.integrality_ = [highspy.HighsVarType.kInteger] * n
        lp.row_lower_ = np.array([row[2] for row in self._rows])
        lp.row_upper_ = np.array([row[3] for row in self._rows])
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.cumsum([0, *(len(row[0]) for row in self._rows)])
        lp.a_matrix_.index_ = np.array([c for row in self._rows for c in row[0]])
        lp.a_matrix_.value_ = np.array([v for row in self._rows for v in row[1]])
        solver: Any = highspy.Highs()  # type: ignore[no-untyped-call]
        for option, value in (
            ("output_flag", False),
            ("threads", 1),
            ("random_seed", 0),
            ("mip_rel_gap", GAP),
            ("time_limit", time_limit_s),
        ):
            solver.setOptionValue(option, value)
        solver.passModel(lp)
        given = highspy.HighsSolution()
        given.col_value = self._columns_of(start)
        solver.setSolution(given)
        solver.run()
        info = solver.getInfo()
        bound = max(float(info.mip_dual_bound), 0.0)
        if info.primal_solution_status != 2:  # no feasible point
            return solver.getModelStatus(), None, bound
        values = solver.getSolution().col_value
        machines: dict[str, dict[str, int]] = {need.name: {} for need in self.needs}
        for (need_name, offer_name), column in self.at.items():
            machines[need_name][offer_name] = round(values[column])
        return solver.getModelStatus(), machines, bound

    def _columns_of(self, start: Plan) -> list[float]:
        """The greedy plan as a point of the programme: a scenario it does not survive is missed."""
        values = [0.0] * len(self.cost)
        for (need_name, offer_name), column in self.at.items():
            values[column] = float(start.machines.get(need_name, {}).get(offer_name, 0))
        for columns, coefficients, low, _ in self._rows:
            if low > 0 and columns[-1] >= self.n_counts:
                held = sum(v * values[c] for c, v in zip(columns[:-1], coefficients[:-1], strict=True))
                values[columns[-1]] = 0.0 if held >= low else 1.0
        return values
