"""`manage.py create_organization SLUG --owner EMAIL`: a tenant with a first project, from the command line.

Runs as operator. May run twice: what is there stays, the owner becomes a member. A new owner gets a random password
that is printed once.
"""

import json
import secrets
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from controlplane import ids
from controlplane.errors import CorralError
from controlplane.tenants import limit_services, services
from controlplane.tenants.models import User


class Command(BaseCommand):
    help = "Creates an organization with a first project, and its owner where nobody has that address."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("slug")
        parser.add_argument("--name", help="for people (default: the slug)")
        parser.add_argument("--owner", required=True, metavar="EMAIL")
        parser.add_argument(
            "--project", default="main", help="slug of its first project (default: %(default)s)"
        )
        parser.add_argument("--weight", type=int, help="share of a full queue; 100 is ordinary")
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        password = None
        try:
            owner = User.objects.filter(email=options["owner"]).first()
            if owner is None:
                password = secrets.token_urlsafe(12)
                owner = services.create_user(email=options["owner"], password=password, name="")
            organization = services.ensure_organization(
                name=options["name"] or options["slug"], slug=options["slug"], owner=owner
            )
            services.ensure_project(
                organization_id=organization.id, name=options["project"].title(), slug=options["project"]
            )
            if options["weight"] is not None:
                limit_services.set_weight(organization_id=organization.id, weight=options["weight"])
        except CorralError as error:
            raise CommandError(str(error)) from error
        facts = {
            "id": ids.to_text(ids.Prefix.ORGANIZATION, organization.id),
            "slug": organization.slug,
            "project": options["project"],
            "owner": owner.email,
            "password": password,
        }
        shown = "" if password is None else f"  {owner.email} / {password}"
        self.stdout.write(json.dumps(facts) if options["json"] else f"{facts['id']}  {facts['slug']}{shown}")
