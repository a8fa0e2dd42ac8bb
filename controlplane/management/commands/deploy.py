"""`manage.py deploy NAME --model SOURCE`: serve a model under a name, from the command line.

For the local stack and for operators; the REST API does the same for tenants. Runs as operator.
"""

import json
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from controlplane import ids
from controlplane.deployments import importing, services
from controlplane.errors import CorralError
from controlplane.tenants.models import Organization, Project


class Command(BaseCommand):
    help = "Creates or changes a deployment of a project."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name", help="the `model` that programs will send")
        parser.add_argument("--model", required=True, help=importing.SOURCES)
        parser.add_argument("--organization", default="acme", help="slug (default: %(default)s)")
        parser.add_argument("--project", default="demo", help="slug (default: %(default)s)")
        parser.add_argument("--min", type=int, default=0, dest="min_replicas", metavar="N")
        parser.add_argument("--max", type=int, default=1, dest="max_replicas", metavar="N")
        parser.add_argument("--idle-timeout-s", type=int, default=300, metavar="S")
        parser.add_argument("--slo", metavar="CLASS", help="interactive (default), standard, batch or flex")
        parser.add_argument(
            "--admission", metavar="HOW", help="auto (default: as the class), predicted or bounded"
        )
        parser.add_argument(
            "--queue-order", metavar="ORDER", help="of the requests of one key: edf (default), sjf or fcfs"
        )
        parser.add_argument(
            "--locality-window-tokens",
            type=int,
            metavar="N",
            help="fairness given up for cached prompts (2000)",
        )
        parser.add_argument(
            "--profile",
            action="append",
            default=[],
            metavar="KNOB=VALUE",
            help="engine profile, e.g. max_num_seqs=64",
        )
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        organization = Organization.objects.filter(slug=options["organization"]).first()
        project = Project.objects.filter(organization=organization, slug=options["project"]).first()
        if organization is None or project is None:
            raise CommandError(f"no project {options['organization']}/{options['project']}: check the slugs")
        profile = dict(_knob(text) for text in options["profile"])
        if options["model"] == "toy":
            profile.setdefault("engine", "toy")
        try:
            version = importing.register(
                organization_id=organization.id,
                source=options["model"],
                var=settings.ENV.var,
                progress=lambda text: None if options["json"] else self.stdout.write(text),
            )
            deployment = services.ensure_deployment(
                organization_id=organization.id,
                project_id=project.id,
                name=options["name"],
                model_version_id=version.id,
                engine_profile=profile,
                min_replicas=options["min_replicas"],
                max_replicas=options["max_replicas"],
                idle_timeout_s=options["idle_timeout_s"],
                slo_class=options["slo"],
                admission=options["admission"],
                queue_order=options["queue_order"],
                locality_window_tokens=options["locality_window_tokens"],
            )
        except CorralError as error:
            raise CommandError(str(error)) from error
        facts = {
            "id": ids.to_text(ids.Prefix.DEPLOYMENT, deployment.id),
            "name": deployment.name,
            "generation": deployment.generation,
            "model_digest": version.digest,
            "engine_profile": deployment.engine_profile,
        }
        self.stdout.write(
            json.dumps(facts)
            if options["json"]
            else f"{facts['name']}  {facts['id']}  generation {facts['generation']}"
        )


def _knob(text: str) -> tuple[str, object]:
    name, separator, value = text.partition("=")
    if not separator:
        raise CommandError(f"--profile {text!r}: give KNOB=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
