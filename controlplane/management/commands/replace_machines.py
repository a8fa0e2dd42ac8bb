"""`manage.py replace_machines`: every machine of the cell, one after another; its successor serves before it drains."""

from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from autoscaler.house import build_cell
from autoscaler.replacing import NotReplacedError, replace_all

WITHIN_S = 600.0


class Command(BaseCommand):
    help = "Replaces the cell's machines one by one, for a new image or version. Streams go on elsewhere."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        add_within(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            n = replace_all(
                build_cell(),
                settings.AUTOSCALER.provider,
                settings.ENV.var,
                within_s=options["within_s"],
                say=lambda text: self.stderr.write(f"  {text}"),
            )
        except NotReplacedError as error:
            raise CommandError(str(error)) from error
        self.stdout.write(f"{n} machines replaced" if n != 1 else "1 machine replaced")


def add_within(parser: CommandParser) -> None:
    """The option that `upgrade` has, too."""
    parser.add_argument(
        "--within-s",
        type=float,
        default=WITHIN_S,
        metavar="S",
        help="what a machine's streams have to end or move, once its successor is ordered (default: %(default)g)",
    )
