"""`manage.py set_quota KIND LIMIT [--organization SLUG | --cell NAME]`: a ceiling of the house. Runs as operator."""

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from controlplane.errors import CorralError
from controlplane.quotas import services
from controlplane.quotas.models import QuotaKind
from controlplane.tenants.models import Organization


class Command(BaseCommand):
    help = "Sets what an organization, a cell or the whole house may have of machines at most; - lifts it."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("kind", choices=QuotaKind.values)
        parser.add_argument("limit", help="a whole number (spend_rate: nano-dollars an hour), or - for none")
        parser.add_argument("--organization", metavar="SLUG")
        parser.add_argument("--cell", default="", metavar="NAME")

    def handle(self, *args: Any, **options: Any) -> None:
        text = options["limit"]
        if text != "-" and not text.isdigit():
            raise CommandError(f"{text!r} is no limit: give a whole number, or - for none")
        organization = None
        if options["organization"] is not None:
            organization = Organization.objects.filter(slug=options["organization"]).first()
            if organization is None:
                raise CommandError(f"there is no organization with the slug {options['organization']!r}")
            if options["cell"]:
                raise CommandError("--cell is for the house's own: an organization's holds over all cells")
        try:
            services.set_ceiling(
                organization_id=organization.id if organization else None,
                kind=QuotaKind(options["kind"]),
                limit=None if text == "-" else int(text),
                cell=options["cell"],
            )
        except CorralError as error:
            raise CommandError(error.message) from error
        whom = organization.slug if organization else options["cell"] or "the house"
        self.stdout.write(
            f"{whom}: {options['kind']} {'unlimited' if text == '-' else f'at most {int(text):,}'}"
        )
