"""`manage.py audit verify|export`: is the audit log whole, and the log itself. Runs as operator."""

import json
import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from controlplane.audit import sealing
from controlplane.tenants.models import Organization


class Command(BaseCommand):
    help = "Verifies the chain of an organization's audit log, or exports the log as JSON lines."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("what", choices=("verify", "export"))
        parser.add_argument("--organization", help="slug (default for verify: all)")
        parser.add_argument("--json", action="store_true", help="verify: as JSON")

    def handle(self, *args: Any, **options: Any) -> None:
        organizations = Organization.objects.order_by("slug")
        if options["organization"]:
            organizations = organizations.filter(slug=options["organization"])
        if not organizations:
            raise CommandError(f"--organization: there is none with the slug {options['organization']!r}")
        if options["what"] == "export":
            if not options["organization"]:
                raise CommandError("--organization: say whose log to export")
            for row in sealing.export(organizations[0].id):
                self.stdout.write(json.dumps(row))
            return
        n_broken = 0
        for organization in organizations:
            found = sealing.verify(organization.id)
            n_broken += bool(found.problem)
            facts = {
                "organization": organization.slug,
                "sealed": found.n_sealed,
                "unsealed": found.n_unsealed,
                "redacted": found.n_redacted,
                "head": found.head,
                "problem": found.problem,
            }
            verdict = f"BROKEN: {found.problem}" if found.problem else "whole"
            counts = f"{found.n_sealed} sealed, {found.n_unsealed} not yet, head {found.head[:16]}"
            counts += f", {found.n_redacted} redacted" if found.n_redacted else ""
            line = f"{organization.slug:<24} {verdict}  {counts}"
            self.stdout.write(json.dumps(facts) if options["json"] else line)
        if n_broken:
            sys.exit(1)
