"""`manage.py explain req_…`: why a request was refused, why it waits, why it went where it went."""

from __future__ import annotations

import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from controlplane.decisions import selectors
from controlplane.decisions.words import explain
from controlplane.errors import CorralError
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Organization


class Command(BaseCommand):
    help = (
        "Explain one request, by the id that its answer or refusal carried (x-request-id). Runs as operator."
    )
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("request", help="req_…")
        parser.add_argument("--organization", default="acme", help="slug (default: %(default)s)")
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        organization = _organization(options["organization"])
        try:
            with tenant(organization.id):
                found = selectors.request(
                    organization_id=organization.id, request_id=selectors.request_of(options["request"])
                )
                words = explain(found)
                facts = [row.facts | {"outcome": row.outcome, "code": row.code} for row in found.decisions]
        except CorralError as error:
            raise CommandError(str(error)) from error
        if options["json"]:
            self.stdout.write(json.dumps({"stage": found.stage, "words": words, "decisions": facts}))
            return
        self.stdout.write(f"{options['request']}  {found.stage}")
        for line in words:
            self.stdout.write(f"  {line}")


def _organization(slug: str) -> Organization:
    found = Organization.objects.filter(slug=slug).first()
    if found is None:
        raise CommandError(f"no organization {slug!r}: check the slug")
    return found
