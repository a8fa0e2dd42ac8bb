"""`corral explain ID`: why a request, a decision or an operation went as it did."""

from __future__ import annotations

from typing import Any

import click

from controlplane.cli.failures import Failure
from controlplane.cli.main import Session, shown_as
from controlplane.cli.output import emit, facts, money, when

_PATHS = {"req": "/requests", "dec": "/decisions", "opn": "/operations"}


@click.command()
@click.argument("thing")
@shown_as
@click.pass_obj
def explain(session: Session, thing: str) -> None:
    """Explain THING: the id of a request (req_…), a decision (dec_…) or an operation (opn_…)."""
    path = _PATHS.get(thing.partition("_")[0])
    if path is None:
        raise Failure(f"{thing!r}: give the id of a request (req_…), decision (dec_…) or operation (opn_…)")
    row = session.api.get(f"{path}/{thing}")
    if session.form != "table":
        emit(row, session.form)
        return
    if path == "/requests":  # told in sentences; the facts behind them: -o json
        click.echo(f"{row['id']}  {row['stage']}")
        for sentence in row["words"]:
            click.echo(f"  {sentence}")
        return
    facts((name.replace("_", " "), _told(name, value)) for name, value in row.items())


def _told(name: str, value: Any) -> Any:
    if name.endswith("_nano"):
        return money(value)
    if name.endswith("_at") or name == "at":
        return when(value)
    if isinstance(value, list):
        return [
            ", ".join(f"{k} {v}" for k, v in each.items()) if isinstance(each, dict) else each
            for each in value
        ]
    return value
