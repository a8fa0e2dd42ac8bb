"""`manage.py set_weight WEIGHT --organization SLUG`: what a tenant gets of a full queue. Runs as operator.

Of an organization, of one of its projects (--project) or of one of its keys (--key, by id). 100 is ordinary: with
200 it is served twice as much as its neighbours of the same level while all of them wait.
"""

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from controlplane import ids
from controlplane.errors import CorralError
from controlplane.tenants import limit_services
from controlplane.tenants.models import Organization, Project


class Command(BaseCommand):
    help = "Sets the weight of an organization, a project or a key in the fair queue."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("weight", type=int, help="1 to 10000; 100 is ordinary")
        parser.add_argument("--organization", default="acme", help="slug (default: %(default)s)")
        parser.add_argument("--project", help="slug: of this project")
        parser.add_argument("--key", metavar="ID", help="key_...: of this key")

    def handle(self, *args: Any, **options: Any) -> None:
        organization = Organization.objects.filter(slug=options["organization"]).first()
        if organization is None:
            raise CommandError(f"no organization {options['organization']!r}: check the slug")
        project_id = None
        if options["project"] is not None:
            project = Project.objects.filter(organization=organization, slug=options["project"]).first()
            if project is None:
                raise CommandError(
                    f"no project {options['organization']}/{options['project']}: check the slugs"
                )
            project_id = project.id
        try:
            key_id = None if options["key"] is None else ids.from_text(ids.Prefix.API_KEY, options["key"])
            limit_services.set_weight(
                organization_id=organization.id,
                weight=options["weight"],
                project_id=project_id,
                key_id=key_id,
            )
        except (CorralError, ValueError) as error:
            raise CommandError(str(error)) from error
        self.stdout.write(f"weight {options['weight']}")
