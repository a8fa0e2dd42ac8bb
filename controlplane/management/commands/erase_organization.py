"""`manage.py erase_organization SLUG --confirm SLUG`: ask for a tenant's erasure in the house's name; `--cancel` takes
it back, `--now` leaves no time for that. Runs as operator.
"""

import json
from datetime import timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction

from controlplane.errors import CorralError
from controlplane.lifecycle import erasure
from controlplane.tenants.actor import act_as
from controlplane.tenants.models import Organization


class Command(BaseCommand):
    help = "Erases an organization and all that belongs to it, after a time in which that can be taken back."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("slug")
        parser.add_argument("--confirm", default="", metavar="SLUG", help="the slug once more")
        parser.add_argument(
            "--grace-days",
            type=int,
            default=erasure.GRACE.days,
            help="until then it can be cancelled (%(default)s)",
        )
        parser.add_argument(
            "--now",
            action="store_true",
            help="no grace; its replicas must have ended (manage.py suspend first)",
        )
        parser.add_argument("--cancel", action="store_true", help="take it back")
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        found = Organization.objects.filter(slug=options["slug"]).first()
        if found is None:
            raise CommandError(f"there is no organization with the slug {options['slug']!r}")
        try:
            if options["cancel"]:
                erasure.cancel(organization_id=found.id)
                self._say(options, f"{found.slug} stays", state="cancelled", due_at=None)
                return
            with transaction.atomic():
                act_as("operator")
                row = erasure.request(
                    organization_id=found.id,
                    confirm=options["confirm"],
                    grace=timedelta(0) if options["now"] else timedelta(days=options["grace_days"]),
                )
            if options["now"] and erasure.advance(found.id, quiet=timedelta(0)):
                self._say(options, f"{found.slug} is erased", state="erased", due_at=None)
                return
        except CorralError as error:
            raise CommandError(error.message) from error
        due = row.due_at.isoformat(timespec="minutes")
        self._say(
            options,
            f"{found.slug} will be erased after {due}; --cancel takes it back",
            state=row.state,
            due_at=due,
        )

    def _say(self, options: dict[str, Any], text: str, **facts: Any) -> None:
        self.stdout.write(json.dumps({"organization": options["slug"], **facts}) if options["json"] else text)
