"""What people and programs are shown: tables, JSON, YAML; money and times in the words of people."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import click

_COLOURS: Final = {
    "ready": "green",
    "active": "green",
    "succeeded": "green",
    "failed": "red",
    "revoked": "red",
    "starting": "yellow",
    "loading": "yellow",
    "draining": "yellow",
    "pending": "yellow",
    "running": "yellow",
    "waking": "yellow",
    "resuming": "yellow",
    "stopping": "yellow",
    "sleeping": "blue",
    "idle": "blue",
}


def emit(value: Any, form: str) -> None:
    """JSON or YAML, as the API said it."""
    if form == "json":
        click.echo(json.dumps(value, indent=2, ensure_ascii=False))
    else:
        import yaml

        click.echo(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), nl=False)


def table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Columns as wide as they must be; on a terminal the widest of text is cut so that a row stays on one line."""
    cells = [[_cell(value) for value in row] for row in rows]
    if not cells:
        click.echo("nothing here", err=True)
        return
    widths = [max(_width(row[n]) for row in [list(titles), *cells]) for n in range(len(titles))]
    room = shutil.get_terminal_size((160, 24)).columns
    while sum(widths) + 2 * (len(widths) - 1) > room and max(widths) > 24:
        widths[widths.index(max(widths))] -= 1
    widths[-1] = -widths[-1]  # the last column is cut, never padded
    click.echo(_line([click.style(_fit(t, w), bold=True) for t, w in zip(titles, widths, strict=True)]))
    for row in cells:
        click.echo(_line([_coloured(_fit(cell, width)) for cell, width in zip(row, widths, strict=True)]))


def facts(pairs: Iterable[tuple[str, Any]]) -> None:
    """One thing, a line for each fact; what it holds within is indented."""
    known = [(name, value) for name, value in pairs]
    width = max((len(name) for name, _ in known), default=0)
    for name, value in known:
        if isinstance(value, dict) and value:
            click.echo(f"{name}:")
            for key, inner in value.items():
                click.echo(f"  {key}: {_cell(inner)}")
        elif isinstance(value, list) and value:
            click.echo(f"{name}:")
            for each in value:
                click.echo(f"  - {_cell(each)}")
        else:
            click.echo(f"{(name + ':').ljust(width + 2)}{_coloured(_cell(value))}")


def money(nano: Any) -> str:
    """Nano-dollars as dollars, with as many digits as say something."""
    if nano is None:
        return "-"
    dollars = int(nano) / 1e9
    if dollars == 0:
        return "$0"
    return f"${dollars:,.2f}" if abs(dollars) >= 0.1 else f"${dollars:.6f}".rstrip("0")


def when(text: Any) -> str:
    """An instant in local time, to the second."""
    if not text:
        return "-"
    return _instant(str(text)).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def ago(text: Any, now: datetime | None = None) -> str:
    """How long since (or until)."""
    if not text:
        return "-"
    seconds = ((now or datetime.now(UTC)) - _instant(str(text))).total_seconds()
    size = abs(seconds)
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60)):
        if size >= length:
            return f"{int(size // length)}{unit}" if seconds > 0 else f"in {int(size // length)}{unit}"
    return f"{int(size)}s" if seconds > 0 else f"in {int(size)}s"


def _instant(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False) if value else "-"
    # What tenants wrote could move the cursor or colour the terminal.
    return "".join(c if c.isprintable() else "�" for c in str(value))


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _fit(text: str, width: int) -> str:
    room = abs(width)
    if _width(text) > room:
        while text and _width(text) > room - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - _width(text))  # none for a negative width


def _line(cells: Sequence[str]) -> str:
    return "  ".join(cells).rstrip()


def _coloured(cell: str) -> str:
    colour = _COLOURS.get(cell.strip())
    return click.style(cell, fg=colour) if colour else cell
