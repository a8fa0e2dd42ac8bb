"""`corral keys`: API keys, whose secrets are shown once."""

from __future__ import annotations

from typing import Any

import click

from controlplane.cli.commands.get import show
from controlplane.cli.kinds import find, kind_of, listed
from controlplane.cli.main import Session, shown_as
from controlplane.cli.output import emit
from controlplane.cli.planview import confirm


@click.group()
def keys() -> None:
    """API keys: what programs call /v1 with."""


@keys.command("list")
@click.option("--project", default="", help="Slug or id: only its keys.")
@click.option("--all", "with_revoked", is_flag=True, help="Revoked ones too.")
@shown_as
@click.pass_obj
def list_keys(session: Session, project: str, with_revoked: bool) -> None:
    """Keys, newest first."""
    params = {"project_id": find(session.api, "projects", project)["id"]} if project else {}
    rows = listed(session.api, kind_of("keys")[1], **params)
    show(session, "keys", [row for row in rows if with_revoked or not row["revoked_at"]])


@keys.command()
@click.argument("name")
@click.option("--project", required=True, help="Slug or id.")
@click.option("--rpm", type=click.IntRange(0), help="Requests per minute.")
@click.option("--budget", type=float, help="Dollars that it may spend.")
@click.option("--expires", default=None, help="When it ends, as 2027-01-31T00:00:00Z.")
@shown_as
@click.pass_obj
def create(
    session: Session, name: str, project: str, rpm: int | None, budget: float | None, expires: str | None
) -> None:
    """Create a key and print it: it is shown once and stored nowhere."""
    limits: dict[str, Any] = {"rpm": rpm, "budget_nano": None if budget is None else round(budget * 1e9)}
    body = {
        "project_id": find(session.api, "projects", project)["id"],
        "name": name,
        "limits": limits,
        "expires_at": expires,
    }
    _show_secret(session, session.api.call("POST", "/keys", body))


@keys.command()
@click.argument("key")
@click.option(
    "--overlap-s", type=click.IntRange(0), default=3600, show_default=True, help="Both work so long."
)
@shown_as
@click.pass_obj
def rotate(session: Session, key: str, overlap_s: int) -> None:
    """Make a successor of KEY (id or name) with the same project, limits and weight, and print it."""
    found = find(session.api, "keys", key)
    _show_secret(session, session.api.call("POST", f"/keys/{found['id']}/rotate", {"overlap_s": overlap_s}))


@keys.command()
@click.argument("key")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def revoke(session: Session, key: str, yes: bool) -> None:
    """End KEY (id or name) for good, in every gateway at once."""
    found = find(session.api, "keys", key)
    path = f"/keys/{found['id']}"
    confirm(session.api.call("DELETE", path, plan=True), yes=yes)
    session.api.call("DELETE", path)
    click.echo(f"Revoked {found['name']} ({found['id']})")


def _show_secret(session: Session, made: dict[str, Any]) -> None:
    if session.form != "table":
        emit(made, session.form)
        return
    click.echo(f"Key {made['name']} ({made['id']}). Keep it now: it is not shown again.", err=True)
    click.echo(made["key"])
