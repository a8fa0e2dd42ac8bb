"""`corral apply -f FILE`: plan, show, ask, do."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import click

from controlplane.cli import documents as files
from controlplane.cli.failures import Failure, Refused
from controlplane.cli.main import Session, shown_as
from controlplane.cli.output import emit
from controlplane.cli.planview import ask, headline, lines
from controlplane.cli.reconcile import field_in_file, steps
from controlplane.cli.steps import Call, Step


@click.command()
@click.option("-f", "--file", "paths", multiple=True, required=True, help="YAML file; `-` is standard input.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Show the plan and change nothing.")
@click.option(
    "--prune", is_flag=True, help="End keys and deployments of the named projects that no document names."
)
@click.option(
    "--renew-secrets",
    "renew",
    is_flag=True,
    help="Send keys and headers of upstreams although they have some.",
)
@shown_as
@click.pass_obj
def apply(
    session: Session, paths: tuple[str, ...], yes: bool, dry_run: bool, prune: bool, renew: bool
) -> None:
    """Make the organization look like the documents of FILE, after showing what would change.

    Applying the same file again changes nothing. What a document leaves out stays as it is.

    \b
      kind: Project
      name: research
      spec: {weight: 200, limits: {rpm: 600, budget_usd: 25}}
      ---
      kind: Deployment
      name: chat
      project: research
      spec: {model: smollm2-135m, min_replicas: 1, max_replicas: 4}
      ---
      kind: Key
      name: web
      project: research
    """
    documents = [document for path in paths for document in files.read(path)]
    _refuse_twins(documents)
    found = steps(session.api, documents, prune=prune, renew=renew)
    plans = [_plan(session, step) for step in found]
    changing = [step for step in found if step.calls]
    if session.form == "table":
        _show(found, plans)
    if dry_run or not changing:
        if session.form != "table":
            emit([_told(step, plan) for step, plan in zip(found, plans, strict=True)], session.form)
        return
    ask("Apply?", yes=yes)
    _do(session, changing)


def _plan(session: Session, step: Step) -> list[dict[str, Any]]:
    """The API's own plan of each call, as far as it names nothing that an earlier step makes first."""
    return [_send(session, step, call, plan=True) for call in step.calls if not call.waits]


def _send(session: Session, step: Step, call: Call, *, plan: bool = False) -> Any:
    """Raises Failure that names file, line and field of what the API refused."""
    try:
        answer = session.api.call(call.method, call.path(), call.body(), plan=plan)
    except Refused as error:
        if step.document is None:
            raise
        told = [
            f"{step.document.at(path)}: {path}: {message.removeprefix(f'{field}: ')}"
            for field, message in error.errors
            for path in [field_in_file(call, field)]
        ]
        where = "\n".join(told) or f"{step.document.at('')}: {step.title}: {error.detail}"
        raise Failure(where, error.exit_code) from None
    if not plan:
        call.keeps(answer)
    return answer


def _show(found: list[Step], plans: list[list[dict[str, Any]]]) -> None:
    for step, told in zip(found, plans, strict=True):
        note = step.note or ("" if step.calls else "as it should be")
        click.echo(headline(step.action, step.title, click.style(note, fg="bright_black") if note else ""))
        for plan in told:
            for line in lines(plan):
                click.echo(line)
        if step.document and any(call.waits for call in step.calls):
            for name, value in step.document.spec.items():
                click.echo(f"      {name}: {click.style(json.dumps(value, ensure_ascii=False), fg='green')}")
            click.echo(click.style("      planned in full once its project is there", fg="bright_black"))
    n = Counter(step.action for step in found)
    click.echo(
        f"{n['create']} to create, {n['update']} to change, {n['delete']} to end, {n['same']} as they should be"
    )


def _do(session: Session, changing: list[Step]) -> None:
    secrets: list[dict[str, Any]] = []
    for n, step in enumerate(changing):
        try:
            for call in step.calls:
                answer = _send(session, step, call)
                if isinstance(answer, dict) and "key" in answer:
                    secrets.append({"name": answer["name"], "id": answer["id"], "key": answer["key"]})
                elif isinstance(answer, dict) and "secret" in answer:
                    secrets.append({"url": answer["url"], "id": answer["id"], "secret": answer["secret"]})
        except Failure as error:
            _hand_out(session, secrets)
            done = f"\n{n} of {len(changing)} were applied; apply again when this is right" if n else ""
            raise Failure(error.message + done, error.exit_code) from None
        click.echo(f"{click.style('✓', fg='green')} {step.title}", err=True)
    _hand_out(session, secrets)


def _hand_out(session: Session, secrets: list[dict[str, Any]]) -> None:
    """Also after a failure: they are stored nowhere."""
    if not secrets:
        return
    if session.form != "table":
        of = {"keys": "key", "webhooks": "secret"}
        emit({word: [s for s in secrets if name in s] for word, name in of.items()}, session.form)
        return
    click.echo("Keys and secrets, shown this once:", err=True)
    for secret in secrets:
        click.echo(f"{secret.get('name') or secret['url']}  {secret.get('key') or secret['secret']}")


def _told(step: Step, plans: list[dict[str, Any]]) -> dict[str, Any]:
    kind = step.document.kind if step.document else step.title.split()[0].capitalize()
    return {"kind": kind, "title": step.title, "action": step.action, "plans": plans}


def _refuse_twins(documents: list[files.Document]) -> None:
    seen: dict[tuple[str, str], files.Document] = {}
    for document in documents:
        if document.kind == "Limits":
            continue
        first = seen.setdefault((document.kind, document.title), document)
        if first is not document:
            raise document.wrong("", f"{document.title} is in {first.at('')} already")
