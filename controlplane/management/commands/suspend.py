"""`manage.py suspend SLUG --reason …`: stop everything an organization does; `--lift` ends it. Runs as operator.

Only the house may: no role of a tenant and no management token can suspend an organization or lift it.
"""

import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from controlplane.errors import CorralError
from controlplane.lifecycle import suspension
from controlplane.tenants.models import Organization


class Command(BaseCommand):
    help = "Suspends an organization: its keys are refused, its console is read-only, its replicas end after a grace."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("slug")
        parser.add_argument("--reason", default="", help="told to its members")
        parser.add_argument("--lift", action="store_true", help="end the suspension")
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        found = Organization.objects.filter(slug=options["slug"]).first()
        if found is None:
            raise CommandError(f"there is no organization with the slug {options['slug']!r}")
        if options["lift"] and options["reason"]:
            raise CommandError("--reason: only for a suspension, leave it out with --lift")
        try:
            if options["lift"]:
                suspension.lift(organization_id=found.id)
            else:
                suspension.suspend(organization_id=found.id, reason=options["reason"])
        except CorralError as error:
            raise CommandError(error.message) from error
        found.refresh_from_db()
        since = found.suspended_at.isoformat() if found.suspended_at else None
        if options["json"]:
            self.stdout.write(json.dumps({"organization": found.slug, "suspended_at": since}))
        elif since:
            self.stdout.write(f"{found.slug} is suspended since {since}; --lift ends it")
        else:
            self.stdout.write(f"{found.slug} may work again; its deployments start with their next request")
