"""`corral login`, `logout`, `contexts`: who one is, and where."""

from __future__ import annotations

import sys

import click

from controlplane.cli import config
from controlplane.cli.failures import Failure
from controlplane.cli.main import Session, shown_as
from controlplane.cli.output import emit, table


@click.command()
@click.option("--url", default="", help=f"Address of the console; {config.DEFAULT_URL} if nothing is said.")
@click.option(
    "--context", "name", default="", help="Name under which to keep it; `default` if nothing is said."
)
@click.pass_obj
def login(session: Session, url: str, name: str) -> None:
    """Sign in with a management token, asked for without echo or read from standard input.

    \b
      corral login --url https://corral.example.org
      printf %s "$TOKEN" | corral login --context ci
      manage.py create_token me --role owner | corral login
    """
    from controlplane.cli.transport import Api

    url = url or session.url or config.DEFAULT_URL
    name = name or session.context_name or "default"
    if not url.startswith(("http://", "https://")):
        raise Failure(f"--url {url}: must begin with https:// or http://")
    if sys.stdin.isatty():
        token = click.prompt("Management token (mt-crl-…)", hide_input=True)
    else:
        token = sys.stdin.readline()
    # The line as `manage.py create_token` prints it will do: an id stands before the token.
    token = next((word for word in token.split() if word.startswith("mt-crl-")), "")
    if not token:
        raise Failure("a management token begins with mt-crl- (keys sk-crl-… are for /v1 only)")
    found = Api(config.Context(url, token, name)).get("/organization")
    known = config.read()
    known["contexts"][name] = {"url": url, "token": token, "organization": found["slug"]}
    known["current"] = name
    config.write(known)
    click.echo(f"Signed in to {found['name']} ({url}) as context {name!r}; kept in {config.path()}")


@click.command()
@click.argument("name", default="")
def logout(name: str) -> None:
    """Forget a context and its token (the current one if none is named). The token itself goes on: revoke it."""
    known = config.read()
    name = name or known["current"]
    if known["contexts"].pop(name, None) is None:
        raise Failure(f"there is no context {name!r}")
    if known["current"] == name:
        known["current"] = next(iter(known["contexts"]), "")
    config.write(known)
    click.echo(f"Forgot {name!r}; now {known['current'] or 'nowhere'}")


@click.command()
@click.argument("name", default="")
@shown_as
@click.pass_obj
def contexts(session: Session, name: str) -> None:
    """List contexts; with NAME, work in that one from now on."""
    known = config.read()
    if name:
        if name not in known["contexts"]:
            raise Failure(f"there is no context {name!r}; known: {', '.join(known['contexts']) or 'none'}")
        known["current"] = name
        config.write(known)
        click.echo(f"Now in {name!r}")
        return
    rows = [
        {
            "name": each,
            "url": at["url"],
            "organization": at.get("organization"),
            "current": each == known["current"],
        }
        for each, at in known["contexts"].items()
    ]
    if session.form != "table":
        emit(rows, session.form)
        return
    table(
        ["", "NAME", "ORGANIZATION", "URL"],
        [("*" if r["current"] else " ", r["name"], r["organization"], r["url"]) for r in rows],
    )
