"""`manage.py share NAME --with ORG[/PROJECT]`: let another tenant call a deployment; `--withdraw` takes it back.

With no `--with` it lists who may. Runs as operator.
"""

import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from controlplane.deployments import selectors, sharing
from controlplane.deployments.models import Deployment, Grant, this_cell
from controlplane.errors import CorralError
from controlplane.tenants.models import Organization, Project


class Command(BaseCommand):
    help = "Shares a deployment with another organization or project, which calls it as OWNER/NAME and pays for it."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name", help="the deployment")
        parser.add_argument("--organization", default="acme", help="its owner's slug (default: %(default)s)")
        parser.add_argument("--project", default="demo", help="its project's slug (default: %(default)s)")
        parser.add_argument("--with", dest="grantee", metavar="ORG[/PROJECT]", help="slugs: who may call it")
        parser.add_argument("--withdraw", action="store_true", help="take it back from them")
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        owner, project = _place(f"{options['organization']}/{options['project']}")
        deployment = Deployment.objects.filter(
            organization=owner, project=project, name=options["name"], cell=this_cell(), deleted_at=None
        ).first()
        if deployment is None:
            raise CommandError(
                f"no deployment {options['name']!r} in {owner.slug}: check --project and the name"
            )
        of = {"organization_id": owner.id, "deployment_id": deployment.id}
        try:
            if options["grantee"] is not None:
                grantee, only = _place(options["grantee"])
                if not options["withdraw"]:
                    sharing.grant(**of, grantee_id=grantee.id, project_id=None if only is None else only.id)
                else:
                    held = Grant.objects.filter(deployment=deployment, grantee=grantee, project=only).first()
                    if held is None:
                        raise CommandError(f"{options['name']} is not shared with {options['grantee']}")
                    sharing.withdraw(organization_id=owner.id, grant_id=held.id)
            elif options["withdraw"]:
                raise CommandError("--withdraw: say from whom, with --with ORG[/PROJECT]")
        except CorralError as error:
            raise CommandError(str(error)) from error
        grants = Grant.objects.filter(id__in=[each.id for each in selectors.grants_given(**of)])
        rows = [
            {"with": f"{each.grantee.slug}/{each.project.slug}" if each.project else each.grantee.slug,
             "model": each.name}
            for each in grants.select_related("grantee", "project").order_by("grantee__slug", "project__slug")
        ]  # fmt: skip
        if options["json"]:
            self.stdout.write(json.dumps({"deployment": deployment.name, "shared": rows}))
        else:
            for row in rows or [{"with": "nobody else", "model": deployment.name}]:
                self.stdout.write(f"{row['with']:<30} {row['model']}")


def _place(text: str) -> tuple[Organization, Project | None]:
    """`org` or `org/project` by slugs."""
    slug, _, rest = text.partition("/")
    organization = Organization.objects.filter(slug=slug).first()
    if organization is None:
        raise CommandError(f"no organization {slug!r}: check the slug")
    if not rest:
        return organization, None
    project = Project.objects.filter(organization=organization, slug=rest).first()
    if project is None:
        raise CommandError(f"no project {text}: check the slugs")
    return organization, project
