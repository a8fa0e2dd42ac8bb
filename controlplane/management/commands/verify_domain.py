"""`manage.py verify_domain DOMAIN --organization SLUG`: the house proves a mail domain by other means. As operator.

For networks without public DNS. Otherwise an organization proves its domains itself (docs/sign-in.md).
"""

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from controlplane.errors import CorralError
from controlplane.identity import domains
from controlplane.identity.models import Domain
from controlplane.tenants.models import Organization


class Command(BaseCommand):
    help = "Marks a mail domain of an organization as proven."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("domain", help="for example example.org")
        parser.add_argument("--organization", required=True, help="slug")

    def handle(self, *args: Any, **options: Any) -> None:
        organization = Organization.objects.filter(slug=options["organization"]).first()
        if organization is None:
            raise CommandError(f"no organization {options['organization']!r}: check the slug")
        name = options["domain"].strip().lower()
        try:
            row = Domain.objects.filter(organization_id=organization.id, name=name).first()
            row = row or domains.claim(organization_id=organization.id, name=name)
            domains.mark_verified(organization_id=organization.id, domain_id=row.id)
        except CorralError as error:
            raise CommandError(error.message) from error
        self.stdout.write(f"{name} is {options['organization']}'s")
