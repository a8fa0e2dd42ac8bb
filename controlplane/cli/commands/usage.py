"""`corral usage`: what was served and what it cost."""

from __future__ import annotations

import click

from controlplane.cli.kinds import find
from controlplane.cli.main import Session, shown_as
from controlplane.cli.output import emit, money, table, when
from controlplane.cli.spans import instant


@click.command()
@click.option("--by", type=click.Choice(["day", "project", "key", "model"]), default="day", show_default=True)
@click.option("--since", default="30d", show_default=True, help="As 15m, 2h, 7d or an instant.")
@click.option("--project", default="", help="Slug or id: only what its keys used.")
@click.option("--model", default=None, help="Only this model.")
@shown_as
@click.pass_obj
def usage(session: Session, by: str, since: str, project: str, model: str | None) -> None:
    """Requests, tokens and cost, summed by day, project, key or model."""
    params = {"project_id": find(session.api, "projects", project)["id"]} if project else {}
    found = session.api.get("/usage", group_by=by, since=instant(since).isoformat(), model=model, **params)
    if session.form != "table":
        emit(found, session.form)
        return
    rows = found["data"]
    names = {}
    if by in ("project", "key") and rows:  # people know names
        field = {"project": "slug", "key": "name"}[by]
        names = {row["id"]: row[field] for row in session.api.pages(f"/{by}s", limit=10_000)}
    sums = [sum(row[column] for row in rows) for column in _COLUMNS]
    lines = [
        _line(names.get(row["group"], row["group"]), [row[column] for column in _COLUMNS]) for row in rows
    ]
    if len(lines) > 1:
        lines.append(_line("together", sums))
    table([by.upper(), "REQUESTS", "FAILED", "PROMPT", "CACHED", "COMPLETION", "COST"], lines)
    click.echo(f"{when(found['since'])} to {when(found['until'])}", err=True)


_COLUMNS = (
    "n_requests",
    "n_failed",
    "n_prompt_tokens",
    "n_cached_tokens",
    "n_completion_tokens",
    "cost_nano",
)


def _line(name: str, sums: list[int]) -> list[str]:
    return [name, *(f"{n:,}" for n in sums[:-1]), money(sums[-1])]
