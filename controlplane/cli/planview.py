"""Plans of the API (`?plan=true`) for people: what changes, what it costs, whom it disrupts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from controlplane.cli.failures import Failure
from controlplane.cli.output import money

_SIGNS = {"create": ("+", "green"), "update": ("~", "yellow"), "delete": ("-", "red")}


def lines(plan: dict[str, Any]) -> Iterator[str]:
    """The plan of one call, indented under its headline."""
    for change in plan["changes"]:
        if change["action"] == "create" and change["kind"] == "operation":
            continue  # how it is done, not what
        for field in change["fields"]:
            before, after = (_value(field["field"], field[side]) for side in ("before", "after"))
            if change["action"] == "create":
                yield f"      {field['field']}: {click.style(after, fg='green')}"
            elif change["action"] == "update":
                yield f"      {field['field']}: {click.style(before, fg='red')} → {click.style(after, fg='green')}"
    cost = plan["cost"]
    if cost and cost["machine_nano_per_h"]:
        most, least = cost["most_nano_per_h"], cost["least_nano_per_h"]
        was = f"{money(least['before'])} to {money(most['before'])}"
        becomes = f"{money(least['after'])} to {money(most['after'])}"
        yield f"    {click.style('$', fg='cyan', bold=True)} machines: {was} an hour → {becomes}"
    for sentence in plan["disrupts"]["summary"]:
        yield f"    {click.style('!', fg='yellow', bold=True)} {sentence}"


def headline(action: str, what: str, note: str = "") -> str:
    sign, colour = _SIGNS.get(action, ("=", "bright_black"))
    return click.style(f"  {sign} {what}", fg=colour, bold=action in _SIGNS) + (f"  {note}" if note else "")


def confirm(plan: dict[str, Any], *, yes: bool, question: str = "Go on?") -> None:
    """Show whom it disrupts and ask. Raises Failure where nobody can be asked, Abort for no."""
    for line in lines(plan):
        click.echo(line, err=True)
    ask(question, yes=yes)


def ask(question: str, *, yes: bool) -> None:
    import sys

    if yes:
        return
    if not sys.stdin.isatty():
        raise Failure("nobody is here to be asked: add --yes to go on")
    click.confirm(question, abort=True, err=True)


def _value(name: str, value: Any) -> str:
    if name.endswith("_nano") and isinstance(value, int):
        return money(value)
    if isinstance(value, str):
        return value or '""'
    if value is None:
        return "none"
    return json.dumps(value, ensure_ascii=False)
