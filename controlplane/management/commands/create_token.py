"""`manage.py create_token NAME`: a management token for /api/v1, from the command line. Runs as operator.

The first token of an organization comes from here; with it more can be made through the API.
"""

import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from controlplane import ids
from controlplane.errors import CorralError
from controlplane.tenants import service_accounts
from controlplane.tenants.models import Organization, Role, ServiceAccount


class Command(BaseCommand):
    help = "Creates a service account, or takes the one of this name, and prints a new token of it, once."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name", help="of the service account")
        parser.add_argument("--organization", default="acme", help="slug (default: %(default)s)")
        parser.add_argument("--role", choices=list(Role.values), default=Role.ADMIN.value)
        parser.add_argument("--scope", action="append", help="bind the token to a permission; repeatable")
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        organization = Organization.objects.filter(slug=options["organization"]).first()
        if organization is None:
            raise CommandError(f"no organization {options['organization']!r}: check the slug")
        account = ServiceAccount.objects.filter(
            organization=organization, name=options["name"], deleted_at=None
        ).first()
        if account is not None and account.role != options["role"]:
            raise CommandError(f"--role: {account.name} is there with the role {account.role}")
        try:
            account = account or service_accounts.create_service_account(
                organization_id=organization.id, name=options["name"], role=Role(options["role"])
            )
            token, plaintext = service_accounts.create_token(
                organization_id=organization.id,
                account_id=account.id,
                name=options["name"],
                scopes=options["scope"],
            )
        except CorralError as error:
            raise CommandError(str(error)) from error
        facts = {
            "id": ids.to_text(ids.Prefix.MANAGEMENT_TOKEN, token.id),
            "service_account": ids.to_text(ids.Prefix.SERVICE_ACCOUNT, account.id),
            "role": account.role,
            "token": plaintext,
        }
        self.stdout.write(json.dumps(facts) if options["json"] else f"{facts['id']}  {plaintext}")
