"""`corral rollouts` and `corral profile`: trying a new profile or model version, and why a deployment runs so."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import click

from controlplane.cli.commands.deployments import follow
from controlplane.cli.commands.get import show_one
from controlplane.cli.failures import Failure
from controlplane.cli.kinds import find
from controlplane.cli.main import Session, shown_as
from controlplane.cli.output import ago, emit, table
from controlplane.cli.planview import confirm

_WIDTH = 100


@click.group()
def rollouts() -> None:
    """New profiles and model versions of a deployment, tried on a share of its requests."""


@rollouts.command("list")
@click.argument("deployment")
@shown_as
@click.pass_obj
def list_rollouts(session: Session, deployment: str) -> None:
    """Rollouts of DEPLOYMENT (id or name), newest first."""
    row = find(session.api, "deployments", deployment)
    rows = list(session.api.pages(f"/deployments/{row['id']}/rollouts", limit=50))
    if session.form != "table":
        emit(rows, session.form)
        return
    titles = ("ID", "PROFILE", "STATE", "SHARE", "AGE", "WHY")
    table(
        titles,
        [
            (
                each["id"],
                each["profile_number"],
                f"{each['state']}{' (paused)' if each['paused'] else ''}",
                f"{each['share_ppm'] / 10_000:g} %",
                ago(each["created_at"]),
                each["verdict"],
            )
            for each in rows
        ],
    )


@rollouts.command("begin")
@click.argument("deployment")
@click.option("--model-version", default="", help="Id of the model version to try.")
@click.option(
    "--set", "settings", multiple=True, metavar="KNOB=VALUE", help="A setting to insist on; repeatable."
)
@click.option(
    "--share", "shares", type=click.FloatRange(0.0001, 50), multiple=True, help="Per cent; one per step."
)
@click.option("--reason", default="", help="Why, for whoever reads it later.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--wait", is_flag=True, help="Until it is promoted or rolled back.")
@click.pass_obj
def begin(
    session: Session,
    deployment: str,
    model_version: str,
    settings: tuple[str, ...],
    shares: tuple[float, ...],
    reason: str,
    yes: bool,
    wait: bool,
) -> None:
    """Try another profile or model version of DEPLOYMENT (id or name)."""
    row = find(session.api, "deployments", deployment)
    body: dict[str, Any] = {"reason": reason}
    if model_version:
        body["model_version_id"] = model_version
    if settings:
        body["engine_profile"] = dict(_setting(text) for text in settings)
        body["profile_reasons"] = {name: reason for name in body["engine_profile"] if reason}
    if shares:
        body["steps_ppm"] = [round(share * 10_000) for share in shares]
    path = f"/deployments/{row['id']}/rollouts"
    confirm(session.api.call("POST", path, body, plan=True), yes=yes)
    made = session.api.call("POST", path, body)
    click.echo(f"Trying profile {made['profile_number']} of {row['name']}: {made['id']}")
    if wait:
        follow(session, made["id"], max_s=7 * 86_400)


@rollouts.command("show")
@click.argument("deployment")
@click.argument("rollout", default="")
@shown_as
@click.pass_obj
def show_rollout(session: Session, deployment: str, rollout: str) -> None:
    """One rollout of DEPLOYMENT (the newest), with what it decided and why."""
    _, found = _rollout(session, deployment, rollout)
    show_one(session, found)


@rollouts.command()
@click.argument("deployment")
@click.argument("rollout", default="")
@click.pass_obj
def pause(session: Session, deployment: str, rollout: str) -> None:
    """Keep the share as it is; a regression still rolls it back."""
    _order(session, deployment, rollout, {"paused": True})


@rollouts.command()
@click.argument("deployment")
@click.argument("rollout", default="")
@click.pass_obj
def resume(session: Session, deployment: str, rollout: str) -> None:
    """Let a paused rollout go on."""
    _order(session, deployment, rollout, {"paused": False})


@rollouts.command()
@click.argument("deployment")
@click.argument("rollout", default="")
@click.pass_obj
def promote(session: Session, deployment: str, rollout: str) -> None:
    """Give it all of the traffic, whatever the evidence."""
    _order(session, deployment, rollout, {"wanted": "promote"})


@rollouts.command()
@click.argument("deployment")
@click.argument("rollout", default="")
@click.pass_obj
def abort(session: Session, deployment: str, rollout: str) -> None:
    """Roll it back."""
    _order(session, deployment, rollout, {"wanted": "abort"})


@click.command()
@click.argument("deployment")
@click.option("--number", type=click.IntRange(1), default=None, help="An earlier profile, by its number.")
@shown_as
@click.pass_obj
def profile(session: Session, deployment: str, number: int | None) -> None:
    """How DEPLOYMENT (id or name) runs its model: every setting with its reason."""
    row = find(session.api, "deployments", deployment)
    path = f"/deployments/{row['id']}/profiles"
    if number is None:
        rows = list(session.api.pages(path, limit=100))
        found = next((each for each in rows if each["is_current"]), None)
        if found is None:
            raise Failure(
                f"{row['name']} was last changed before profiles were kept: change it, or give --number"
            )
    else:
        found = session.api.call("GET", f"{path}/{number}")
    if session.form != "table":
        show_one(session, found)
        return
    click.echo(
        f"{row['name']}: profile {found['number']} on {found['hardware']}, class {found['slo_class']}\n"
    )
    shown = {each["name"]: json.dumps(each["value"]).strip('"') for each in found["settings"]}
    name_width, value_width = max(map(len, shown)), max(map(len, shown.values()))
    for each in found["settings"]:
        mark = "*" if each["overridden"] else " "
        head = f"  {each['name']:<{name_width}}  {shown[each['name']]:>{value_width}}{mark} "
        first, *rest = textwrap.wrap(each["reason"], max(_WIDTH - len(head), 30)) or [""]
        click.echo(head + first)
        for line in rest:
            click.echo(" " * len(head) + line)
    for warning in found["warnings"]:
        click.echo(f"Warning: {warning}")


def _setting(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise Failure(f"--set {text!r}: give KNOB=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _rollout(session: Session, deployment: str, rollout: str) -> tuple[str, dict[str, Any]]:
    row = find(session.api, "deployments", deployment)
    path = f"/deployments/{row['id']}/rollouts"
    if rollout:
        return f"{path}/{rollout}", session.api.call("GET", f"{path}/{rollout}")
    newest = next(iter(session.api.pages(path, limit=1)), None)
    if newest is None:
        raise Failure(f"{row['name']} has had no rollout")
    return f"{path}/{newest['id']}", newest


def _order(session: Session, deployment: str, rollout: str, body: dict[str, Any]) -> None:
    path, _ = _rollout(session, deployment, rollout)
    found = session.api.call("PATCH", path, body)
    click.echo(
        f"{found['id']}: {found['state']}, {found['share_ppm'] / 10_000:g} % of the requests; {found['verdict']}"
    )
