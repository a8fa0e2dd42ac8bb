"""`manage.py decisions [DEPLOYMENT] [--replay dec_…]`: why the autoscaler did what it did, and whether it would again.

For operators. Lists a deployment's newest decisions, or decides one of them anew from what it was made of and says
if the orders are the same. Changes nothing.
"""

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from autoscaler.models import Decision
from autoscaler.tick import replay, stored_commands
from autoscaler.types import Command as Order
from controlplane import ids


class Command(BaseCommand):
    help = "Shows the autoscaler's decisions, or replays one."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("deployment", nargs="?", help="name of a deployment (default: all)")
        parser.add_argument("--replay", metavar="ID", help="decide this one again: dec_…")
        parser.add_argument("--limit", type=int, default=20)

    def handle(self, *args: Any, **options: Any) -> None:
        if options["replay"]:
            self._replay(options["replay"])
            return
        found = Decision.objects.order_by("-at", "-id")
        if options["deployment"]:
            found = found.filter(deployment__name=options["deployment"])
        for row in reversed(found.select_related("deployment")[: max(options["limit"], 1)]):
            self.stdout.write(f"{row.at:%Y-%m-%d %H:%M:%S}  {row}  {row.deployment.name}")
            self._show(row.reasons, stored_commands(row))

    def _replay(self, text: str) -> None:
        try:
            decision_id = ids.from_text(ids.Prefix.DECISION, text)
        except ids.InvalidIdError as error:
            raise CommandError(str(error)) from error
        row = Decision.objects.filter(id=decision_id).first()
        if row is None:
            raise CommandError(f"no decision {text}: they are kept for some days (CORRAL_DECISION_DAYS)")
        again = replay(row).commands
        self._show(row.reasons, again)
        if again != stored_commands(row):
            raise CommandError("the present policy orders something else than was ordered then")
        self.stdout.write("replayed: the same orders")

    def _show(self, reasons: list[str], orders: tuple[Order, ...]) -> None:
        for reason in reasons:
            self.stdout.write(f"    because {reason}")
        for order in orders:
            self.stdout.write(f"    order   {order.KIND}")
