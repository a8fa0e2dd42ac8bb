"""`corral logs`: finished requests and the autoscaler's decisions, in order, and on as they come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from controlplane.cli.kinds import find
from controlplane.cli.main import Session, shown_as
from controlplane.cli.output import money
from controlplane.cli.spans import instant

POLL_S = 2.0
OVERLAP = timedelta(seconds=60)  # requests are booked seconds after they end, not in order
MAX_REMEMBERED = 20_000


@click.command()
@click.argument("deployment", default="")
@click.option("--project", default="", help="Slug or id.")
@click.option("--since", default="1h", show_default=True, help="As 15m, 2h, 7d or an instant.")
@click.option("-f", "--follow", is_flag=True, help="Go on as they come, until interrupted.")
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(1, 10_000),
    default=200,
    show_default=True,
    help="At most so many of each kind.",
)
@shown_as
@click.pass_obj
def logs(session: Session, deployment: str, project: str, since: str, follow: bool, limit: int) -> None:
    """What happened in DEPLOYMENT (id or name), in a project, or in the whole organization."""
    requests: dict[str, Any] = {}
    decisions: dict[str, Any] = {}
    if project:
        requests["project_id"] = find(session.api, "projects", project)["id"]
    if deployment:
        row = find(session.api, "deployments", deployment, **requests)
        requests["model"] = row["name"]
        decisions["deployment_id"] = row["id"]
    start, seen = instant(since), dict[str, None]()
    while True:
        events = [*_requests(session, start, limit, requests)]
        if deployment or not project:
            events += _decisions(session, start, limit, decisions)
        for at, row in sorted(events, key=lambda event: (event[0], event[1]["id"])):
            if row["id"] not in seen:
                seen[row["id"]] = None
                _print(session, at, row)
        if not follow:
            return
        while len(seen) > MAX_REMEMBERED:
            del seen[next(iter(seen))]
        start = max(start, datetime.now(UTC) - OVERLAP)
        time.sleep(POLL_S)


def _requests(
    session: Session, since: datetime, limit: int, params: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    for row in session.api.pages("/requests", limit=limit, since=since.isoformat(), **params):
        yield row["admitted_at"], row


def _decisions(
    session: Session, since: datetime, limit: int, params: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    for row in session.api.pages("/decisions", limit=limit, **params):
        if datetime.fromisoformat(row["at"]) < since:
            return
        yield row["at"], row


def _print(session: Session, at: str, row: dict[str, Any]) -> None:
    if session.form != "table":
        import json

        click.echo(json.dumps(row, ensure_ascii=False))  # one line each: a stream has no end to be a list
        return
    clock = datetime.fromisoformat(at).astimezone().strftime("%m-%d %H:%M:%S")
    if row["id"].startswith("dec_"):
        orders = (
            ", ".join(str(each.get("kind", "?")).replace("_", " ") for each in row["commands"]) or "noted"
        )
        click.echo(f"{clock}  {click.style('decision', fg='blue')}  {orders}: {'; '.join(row['reasons'])}")
        return
    status = click.style(str(row["status"]), fg="green" if row["status"] < 400 else "red")
    first = "" if row["first_token_ms"] is None else f", first token {row['first_token_ms']} ms"
    click.echo(
        f"{clock}  {status}  {row['model']}  {row['n_prompt_tokens']}→{row['n_completion_tokens']} tokens in "
        f"{row['duration_ms'] / 1000:.2f} s{first}, {money(row['cost_nano'])}  {row['finish_reason']}  "
        f"{click.style(row['id'], fg='bright_black')}"
    )
