"""`manage.py explain ID`: why a request (req_…) or a decision of the autoscaler (dec_…) went as it did.

For operators. A decision is decided again from what was stored, by the policy of now; the command says whether the
result is the same, and ends with 1 if it is not.
"""

from __future__ import annotations

import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from autoscaler import explaining, explainwords
from controlplane import ids
from controlplane.decisions import selectors
from controlplane.decisions.words import explain
from controlplane.errors import CorralError
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Organization

_KINDS = {"request": ids.Prefix.REQUEST, "decision": ids.Prefix.DECISION}


class Command(BaseCommand):
    help = (
        "Explain one request, by the id that its answer or refusal carried (x-request-id), or one decision of the "
        "autoscaler, which is decided again for it. Runs as operator."
    )
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "thing",
            nargs="+",
            metavar="ID",
            help="req_… or dec_…; the word `request` or `decision` may go first",
        )
        parser.add_argument(
            "--organization", default="acme", help="slug, of a request's owner (default: %(default)s)"
        )
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        kind, text = _thing(options["thing"])
        if kind is ids.Prefix.DECISION:
            self._decision(text, as_json=options["json"])
        else:
            self._request(text, options["organization"], as_json=options["json"])

    def _decision(self, text: str, *, as_json: bool) -> None:
        try:
            row = explaining.find(ids.from_text(ids.Prefix.DECISION, text))
        except ids.InvalidIdError as error:
            raise CommandError(str(error)) from error
        if row is None:
            raise CommandError(f"no decision {text}: they are kept for some days (CORRAL_DECISION_DAYS)")
        explained = explaining.explain(row)
        if as_json:
            self.stdout.write(json.dumps(explained.as_json()))
        else:
            for line in explainwords.lines(explained):
                self.stdout.write(line)
        if not explained.replayed.same:
            raise CommandError(explained.replayed.words)

    def _request(self, text: str, slug: str, *, as_json: bool) -> None:
        organization = _organization(slug)
        try:
            with tenant(organization.id):
                found = selectors.request(
                    organization_id=organization.id, request_id=selectors.request_of(text)
                )
                words = explain(found)
                facts = [row.facts | {"outcome": row.outcome, "code": row.code} for row in found.decisions]
        except CorralError as error:
            raise CommandError(str(error)) from error
        if as_json:
            self.stdout.write(json.dumps({"stage": found.stage, "words": words, "decisions": facts}))
            return
        self.stdout.write(f"{text}  {found.stage}")
        for line in words:
            self.stdout.write(f"  {line}")


def _thing(words: list[str]) -> tuple[ids.Prefix, str]:
    """What is to be explained, from `ID` or `decision ID`."""
    named = _KINDS.get(words[0]) if len(words) == 2 else None
    if len(words) > 2 or (len(words) == 2 and named is None):
        raise CommandError("give one id: manage.py explain req_…, or manage.py explain decision dec_…")
    text = words[-1]
    meant = ids.Prefix.DECISION if text.startswith(f"{ids.Prefix.DECISION}_") else ids.Prefix.REQUEST
    return named or meant, text


def _organization(slug: str) -> Organization:
    found = Organization.objects.filter(slug=slug).first()
    if found is None:
        raise CommandError(f"no organization {slug!r}: check the slug")
    return found
