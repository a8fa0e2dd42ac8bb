"""`corral doctor`: is the control plane there, are we who we think we are, does the clock agree.

A check takes the session and answers (what, good, advice). More of them go into CHECKS.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime

import click

from controlplane.cli import config
from controlplane.cli.failures import Failure
from controlplane.cli.main import Session

Check = Callable[[Session], tuple[str, bool, str]]


def signed_in(session: Session) -> tuple[str, bool, str]:
    found = config.context(session.context_name, session.url)
    return f"context {found.name!r} at {found.url}", True, ""


def reachable(session: Session) -> tuple[str, bool, str]:
    began_s = time.monotonic()
    session.api.get("/organization")
    took_ms = (time.monotonic() - began_s) * 1000
    return f"the control plane answers in {took_ms:.0f} ms", took_ms < 2000, "it is slow: is it overloaded?"


def organization(session: Session) -> tuple[str, bool, str]:
    found = session.api.get("/organization")
    return f"the token works, for {found['name']} ({found['id']})", True, ""


def clock(session: Session) -> tuple[str, bool, str]:
    answer = session.api._client.get("/api/v1/openapi.json")
    date = answer.headers.get("Date")
    if not date:
        return "the control plane told no time", True, ""
    off_s = abs(parsedate_to_datetime(date).timestamp() - time.time())
    return (
        f"clocks agree within {off_s:.0f} s",
        off_s < 30,
        "set this computer's clock: expiries are compared with it",
    )


def serving(session: Session) -> tuple[str, bool, str]:
    rows = list(session.api.pages("/deployments", limit=1000))
    failed = [row for row in rows if row["phase"] == "failed"]
    advice = "; ".join(f"{row['name']}: {row['last_error']}" for row in failed)
    return f"{len(rows)} deployment{'s' * (len(rows) != 1)}, {len(failed)} failed", not failed, advice


CHECKS: tuple[Check, ...] = (signed_in, reachable, organization, clock, serving)


@click.command()
@click.pass_obj
def doctor(session: Session) -> None:
    """Check the way to the control plane, one line each. Exit status 1 if something is wrong."""
    bad = 0
    for check in CHECKS:
        try:
            what, good, advice = check(session)
        except Failure as error:
            click.echo(f"{click.style('✗', fg='red')} {check.__name__.replace('_', ' ')}: {error.message}")
            raise SystemExit(error.exit_code) from None
        mark = click.style("✓", fg="green") if good else click.style("✗", fg="red")
        click.echo(f"{mark} {what}{'' if good else f': {advice}'}")
        bad += not good
    raise SystemExit(1 if bad else 0)
