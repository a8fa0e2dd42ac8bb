"""`corral get RESOURCE [ID]`."""

from __future__ import annotations

from typing import Any

import click

from controlplane.cli.failures import Failure
from controlplane.cli.kinds import KINDS, find, kind_of, listed
from controlplane.cli.main import Session, shown_as
from controlplane.cli.output import emit, facts, table
from controlplane.cli.written import documents_of


def show(session: Session, name: str, rows: list[dict[str, Any]]) -> None:
    """Rows of a kind, in the form asked for."""
    _, kind = kind_of(name)
    if session.form != "table":
        emit(rows, session.form)
        return
    table(
        list(kind.columns),
        [
            [column(row) if callable(column) else row.get(column) for column in kind.columns.values()]
            for row in rows
        ],
    )


def show_one(session: Session, row: dict[str, Any]) -> None:
    if session.form == "table":
        facts(row.items())
    else:
        emit(row, session.form)


def filters_of(pairs: tuple[str, ...]) -> dict[str, str]:
    """`name=value` as parameters of the query; the API knows which there are."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise Failure(f"--filter {pair}: give name=value, for example phase=ready")
        found[name] = value
    return found


@click.command()
@click.argument("resource", shell_complete=lambda _c, _p, text: [k for k in KINDS if k.startswith(text)])
@click.argument("name", default="")
@click.option(
    "-f", "--filter", "pairs", multiple=True, help="name=value, as the API has it; may be repeated."
)
@click.option("-n", "--limit", type=click.IntRange(1, 100_000), default=None, help="At most so many.")
@click.option("--documents", "as_documents", is_flag=True, help="As a file that `corral apply` takes.")
@shown_as
@click.pass_obj
def get(
    session: Session,
    resource: str,
    name: str,
    pairs: tuple[str, ...],
    limit: int | None,
    as_documents: bool,
) -> None:
    """Show resources of a kind, or one by its id or name.

    \b
      corral get deployments
      corral get key web -o yaml
      corral get replicas -f live=true
      corral get upstreams --documents > upstreams.yaml
    """
    word, kind = kind_of(resource)
    filters = filters_of(pairs)
    if as_documents:
        _show_documents(session, word, name, limit, filters)
    elif kind.single:
        show_one(session, session.api.get(kind.path))
    elif name:
        show_one(session, find(session.api, word, name, **filters))
    else:
        # Of what grows without end a screenful is meant; everything else is shown whole.
        if limit is None and word in ("requests", "audit", "decisions"):
            limit = 50
        show(session, word, listed(session.api, kind, limit, **filters))


def _show_documents(
    session: Session, word: str, name: str, limit: int | None, filters: dict[str, str]
) -> None:
    """What is there as `corral apply` takes it: applying it at once changes nothing."""
    import yaml

    kind = KINDS[word]
    if kind.single:
        rows = [session.api.get(kind.path)]
    elif name:
        rows = [find(session.api, word, name, **filters)]
    else:
        rows = listed(session.api, kind, limit, **filters)
    found = list(documents_of(session.api, word, rows))
    if session.form == "json":
        emit(found, "json")
        return
    click.echo(yaml.safe_dump_all(found, sort_keys=False, allow_unicode=True), nl=False)
