"""`corral deployments`: what is served, and how much of it."""

from __future__ import annotations

import time
from typing import Any

import click

from controlplane.cli.commands.get import show, show_one
from controlplane.cli.failures import Failure
from controlplane.cli.kinds import find, kind_of, listed
from controlplane.cli.main import Session, shown_as
from controlplane.cli.planview import confirm

POLL_S = 2.0


@click.group()
def deployments() -> None:
    """What is served, under which name, by how many replicas."""


@deployments.command("list")
@click.option("--project", default="", help="Slug or id: only its deployments.")
@shown_as
@click.pass_obj
def list_deployments(session: Session, project: str) -> None:
    """Deployments, newest first."""
    params = {"project_id": find(session.api, "projects", project)["id"]} if project else {}
    show(session, "deployments", listed(session.api, kind_of("deployments")[1], **params))


@deployments.command("show")
@click.argument("deployment")
@shown_as
@click.pass_obj
def show_deployment(session: Session, deployment: str) -> None:
    """One deployment and its live replicas."""
    row = find(session.api, "deployments", deployment)
    show_one(session, row)
    if session.form == "table":
        click.echo()
        replicas = listed(session.api, kind_of("replicas")[1], deployment_id=row["id"], live="true")
        show(session, "replicas", replicas)


@deployments.command()
@click.argument("deployment")
@click.option("--min", "least", type=click.IntRange(0), default=None, help="Replicas that are kept.")
@click.option("--max", "most", type=click.IntRange(1), default=None, help="Replicas that load may bring.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--wait", is_flag=True, help="Until what runs is what is wanted.")
@click.pass_obj
def scale(
    session: Session, deployment: str, least: int | None, most: int | None, yes: bool, wait: bool
) -> None:
    """Change how many replicas serve DEPLOYMENT (id or name)."""
    body = {k: v for k, v in (("min_replicas", least), ("max_replicas", most)) if v is not None}
    if not body:
        raise Failure("say --min, --max or both")
    row = find(session.api, "deployments", deployment)
    path = f"/deployments/{row['id']}"
    plan = session.api.call("PATCH", path, body, plan=True)
    if not plan["changes"]:
        click.echo("It is so already.")
        return
    confirm(plan, yes=yes)
    session.api.call("PATCH", path, body)
    click.echo(f"Changed {row['name']}")
    if wait:
        follow(session, row["id"])


@deployments.command()
@click.argument("deployment")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def delete(session: Session, deployment: str, yes: bool) -> None:
    """Stop serving DEPLOYMENT (id or name): its replicas are drained."""
    row = find(session.api, "deployments", deployment)
    path = f"/deployments/{row['id']}"
    confirm(session.api.call("DELETE", path, plan=True), yes=yes)
    session.api.call("DELETE", path)
    click.echo(f"Deleted {row['name']} ({row['id']})")


@deployments.command()
@click.argument("thing")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--wait", is_flag=True, help="Until it has ended.")
@click.pass_obj
def drain(session: Session, thing: str, yes: bool, wait: bool) -> None:
    """Let THING, the id of a replica (rep_…) or machine (mch_…), finish what it runs, then end it."""
    kind = {"rep": "replicas", "mch": "machines"}.get(thing.partition("_")[0])
    if kind is None:
        raise Failure(f"{thing!r}: give the id of a replica (rep_…) or machine (mch_…)")
    path = f"/{kind}/{thing}/drain"
    confirm(session.api.call("POST", path, plan=True), yes=yes)
    begun = session.api.call("POST", path)
    click.echo(f"Draining {thing}: {begun['id']}")
    if wait:
        follow(session, thing)


def follow(session: Session, subject: str, max_s: float = 3600) -> None:
    """The newest operation about `subject`, until it ends. Raises Failure where it fails or takes too long."""
    said, give_up_s = "", time.monotonic() + max_s
    while time.monotonic() < give_up_s:
        found: list[dict[str, Any]] = list(session.api.pages("/operations", limit=1, subject=subject))
        if not found:
            return
        row = found[0]
        line = f"{row['progress']:3d} %  {row['message'] or row['state']}"
        if line != said:
            click.echo(line, err=True)
            said = line
        if row["state"] == "succeeded":
            return
        if row["state"] == "failed":
            raise Failure(f"{row['kind']} failed: {row['error']['detail']} ({row['error']['code']})")
        time.sleep(POLL_S)
    raise Failure(f"not done after {max_s:.0f} s; it goes on: `corral get operations -f subject={subject}`")
