"""`manage.py export_organization SLUG --to FILE|-`: everything that belongs to a tenant, as JSON lines without secrets.

Runs as operator. An owner does the same through the API (`POST /api/v1/organization/exports`).
"""

import os
import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from controlplane.lifecycle import belongings
from controlplane.tenants.models import Organization


class Command(BaseCommand):
    help = "Writes everything that belongs to an organization as JSON lines, without secrets."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("slug")
        parser.add_argument(
            "--to", required=True, metavar="FILE", help="a new file, or - for standard output"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        found = Organization.objects.filter(slug=options["slug"]).first()
        if found is None:
            raise CommandError(f"there is no organization with the slug {options['slug']!r}")
        lines = belongings.everything(found.id)
        if options["to"] == "-":
            for line in lines:
                self.stdout.write(line)
            return
        n = 0
        try:
            descriptor = os.open(options["to"], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise CommandError(
                f"--to {options['to']}: {error.strerror}; name a file that does not exist yet"
            ) from error
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            for line in lines:
                file.write(line + "\n")
                n += 1
        print(f"{n} rows of {found.slug} in {options['to']}", file=sys.stderr)
