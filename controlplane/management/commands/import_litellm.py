"""`manage.py import_litellm`: move from a LiteLLM proxy, keys and all. Runs as operator; may run again and again."""

import json
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import IntegrityError

from controlplane.errors import CorralError
from controlplane.litellm import carry, proxyconfig, report
from controlplane.litellm.plan import plan
from controlplane.litellm.proxyconfig import ProxyConfig
from controlplane.litellm.source import SourceError, from_database, from_dump
from controlplane.tenants.models import User


class Command(BaseCommand):
    help = (
        "Imports organizations, teams, budgets, limits and keys of a LiteLLM proxy. Keys keep working as they are: "
        "their SHA-256 is stored under a keyed hash, and replaced by an ordinary digest at their first use. All or "
        "nothing, in one transaction; what is there already stays as it is."
    )
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        source = parser.add_mutually_exclusive_group(required=True)
        source.add_argument("--database-url", metavar="DSN", help="Postgres of the proxy; read only")
        source.add_argument("--dump", type=Path, metavar="FILE", help="pg_dump --data-only of it (also .gz)")
        parser.add_argument("--config", type=Path, metavar="FILE", help="the proxy's config.yaml")
        parser.add_argument(
            "--organization",
            default="litellm",
            metavar="SLUG",
            help="where what has no organization there goes; made if missing (default: %(default)s)",
        )
        parser.add_argument("--owner", metavar="EMAIL", help="who owns organizations that are made")
        parser.add_argument(
            "--shared-by",
            default="",
            metavar="SLUG",
            help="organization that shares the models: keys find SLUG/NAME under the old NAME",
        )
        parser.add_argument("--plan", action="store_true", help="only say what would be done")
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            config = proxyconfig.read(options["config"]) if options["config"] else ProxyConfig()
            source = from_dump(options["dump"]) if options["dump"] else from_database(options["database_url"])
            slug = options["organization"]
            planned = plan(source, config, carry.existing(slug), carry.options(slug, options["shared_by"]))
            carry.carry_out(planned, owner=self._owner(options["owner"]), is_dry=options["plan"])
        except (SourceError, CorralError) as error:
            raise CommandError(f"{error}; nothing was imported") from None
        except IntegrityError as error:
            reason = str(error).splitlines()[0]
            raise CommandError(
                f"the database refused it ({reason}); nothing was imported: try again"
            ) from None
        from django.conf import settings

        base_url = f"{settings.ENV.gateway_url}/v1"
        self.stdout.write(
            json.dumps(report.as_json(planned, is_dry=options["plan"]), indent=2)
            if options["json"]
            else report.as_text(planned, is_dry=options["plan"], base_url=base_url)
        )

    @staticmethod
    def _owner(email: str | None) -> User | None:
        if email is None:
            return None
        found = User.objects.filter(email=email.strip().lower()).first()
        if found is None:
            raise CommandError(f"--owner: there is no user {email!r}: create one first, or check the address")
        return found
