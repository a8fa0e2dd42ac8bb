"""What a study gives back, and how it is printed: assumptions, a table, goals that can be missed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from autoscaler.sim.statistics import Interval

Cell = str | int | float | Interval | None
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Column:
    """`form` formats a number ("{:.2f} s"); of an Interval the half width too."""

    title: str
    form: str = "{}"


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title!r}: {len(row)} cells under {len(self.columns)} columns")


@dataclass(frozen=True, slots=True)
class Goal:
    """A claim with its figure. `why` is for a goal that was missed: what stands in its way."""

    claim: str
    figure: str
    is_met: bool
    why: str = ""


@dataclass(frozen=True, slots=True)
class Study:
    """One experiment. `assumptions`: all that its figures depend on (zones, boot time, prices, GPU mapping, seeds)."""

    title: str
    assumptions: dict[str, str]
    tables: Sequence[Table]
    goals: Sequence[Goal] = field(default=())

    @property
    def all_met(self) -> bool:
        return all(goal.is_met for goal in self.goals)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def text(study: Study) -> str:
    """For a terminal."""
    lines = [study.title, ""]
    width = max((len(name) for name in study.assumptions), default=0)
    lines += [f"  {name:<{width}}  {value}" for name, value in study.assumptions.items()]
    for table in study.tables:
        cells = [[c.title for c in table.columns], *([*_cells(table, row)] for row in table.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
        lines += ["", table.title]
        for row in cells:
            first, rest = row[0].ljust(widths[0]), zip(row[1:], widths[1:], strict=True)
            lines.append("  " + "  ".join([first, *(cell.rjust(w) for cell, w in rest)]).rstrip())
    if study.goals:
        lines += ["", "Goals"]
        for goal in study.goals:
            lines.append(f"  {'met   ' if goal.is_met else 'MISSED'}  {goal.claim}: {goal.figure}")
            if goal.why:
                lines.append(f"          {goal.why}")
    return "\n".join(lines) + "\n"


def markdown(study: Study, command: str) -> str:
    """For docs/results/: the same, with the command that prints it."""
    lines = [f"# {study.title}", "", f"Written by `{command}`.", ""]
    lines += [f"- **{name}**: {value}" for name, value in study.assumptions.items()]
    for table in study.tables:
        lines += ["", f"## {table.title}", ""]
        lines.append("| " + " | ".join(c.title for c in table.columns) + " |")
        lines.append("|" + "---|" * len(table.columns))
        lines += ["| " + " | ".join(_cells(table, row)) + " |" for row in table.rows]
    if study.goals:
        lines += ["", "## Goals", "", "| goal | figure | |", "|---|---|---|"]
        for goal in study.goals:
            verdict = "met" if goal.is_met else "**missed**"
            lines.append(f"| {goal.claim} | {goal.figure} | {verdict}{': ' + goal.why if goal.why else ''} |")
    return "\n".join(lines) + "\n"


def _cells(table: Table, row: Sequence[Cell]) -> list[str]:
    return [_cell(cell, column.form) for cell, column in zip(row, table.columns, strict=True)]


def _cell(cell: Cell, form: str) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Interval):
        if not cell.half:
            return form.format(cell.mean)
        unit = form[form.rindex("}") + 1 :]
        return form.format(cell.mean).removesuffix(unit) + " ± " + form.format(cell.half)
    return form.format(cell)
