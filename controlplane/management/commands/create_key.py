"""`manage.py create_key NAME`: an API key for a project, with limits, from the command line. Runs as operator."""

import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from controlplane import ids
from controlplane.errors import CorralError
from controlplane.tenants import key_services, limit_services
from controlplane.tenants.limits import NO_LIMITS, Limits
from controlplane.tenants.models import Organization, Project

NANO_PER_DOLLAR = 1_000_000_000


class Command(BaseCommand):
    help = "Creates an API key and prints it, once."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name")
        parser.add_argument("--organization", default="acme", help="slug (default: %(default)s)")
        parser.add_argument("--project", default="demo", help="slug (default: %(default)s)")
        parser.add_argument("--rpm", type=int, help="requests per minute")
        parser.add_argument("--input-tpm", type=int, help="prompt tokens per minute")
        parser.add_argument("--output-tpm", type=int, help="completion tokens per minute")
        parser.add_argument("--max-concurrency", type=int, help="requests in flight")
        parser.add_argument(
            "--weight", type=int, default=100, help="share of a full queue (default: %(default)s)"
        )
        parser.add_argument("--budget", type=int, metavar="DOLLARS", help="money this key may spend")
        parser.add_argument("--budget-nano", type=int, metavar="N", help="the same in nano-dollars")
        parser.add_argument(
            "--limits-on",
            choices=("key", "project", "organization"),
            help="set the limits there, and take away those of the other two levels",
        )
        parser.add_argument(
            "--limit-all",
            action="store_true",
            help="set the same limits on the project and the organization too",
        )
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        organization = Organization.objects.filter(slug=options["organization"]).first()
        project = Project.objects.filter(organization=organization, slug=options["project"]).first()
        if organization is None or project is None:
            raise CommandError(f"no project {options['organization']}/{options['project']}: check the slugs")
        budget = None if options["budget"] is None else options["budget"] * NANO_PER_DOLLAR
        if options["budget_nano"] is not None:
            budget = options["budget_nano"]
        limits = Limits(
            rpm=options["rpm"],
            input_tpm=options["input_tpm"],
            output_tpm=options["output_tpm"],
            max_concurrency=options["max_concurrency"],
            budget_nano=budget,
        )
        levels = dict.fromkeys(("key", "project", "organization"), limits if options["limit_all"] else None)
        if options["limits_on"]:
            levels = dict.fromkeys(levels, NO_LIMITS) | {options["limits_on"]: limits}
        try:
            if levels["organization"] is not None:
                limit_services.set_organization_limits(
                    organization_id=organization.id, limits=levels["organization"]
                )
            if levels["project"] is not None:
                limit_services.set_project_limits(
                    organization_id=organization.id, project_id=project.id, limits=levels["project"]
                )
            key, plaintext = key_services.create_api_key(
                organization_id=organization.id,
                project_id=project.id,
                name=options["name"],
                weight=options["weight"],
                limits=limits if levels["key"] is None else levels["key"],
            )
        except CorralError as error:
            raise CommandError(str(error)) from error
        facts = {"id": ids.to_text(ids.Prefix.API_KEY, key.id), "name": key.name, "api_key": plaintext}
        self.stdout.write(json.dumps(facts) if options["json"] else f"{facts['id']}  {plaintext}")
