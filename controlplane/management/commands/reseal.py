"""`manage.py reseal`: what is sealed under a former CORRAL_SECRET_KEY is sealed under the present one. As operator.

`manage.py rotate` does it. With processes of your own: run it when all of them have the new key and the former one as
CORRAL_SECRET_KEY_PREVIOUS, and before that ends.
"""

import json
from dataclasses import asdict
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from controlplane.resealing import reseal


class Command(BaseCommand):
    help = "Seals secrets under the present secret key."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        done = reseal()
        if options["json"]:
            self.stdout.write(json.dumps(asdict(done)))
            return
        lost = f"; {done.n_lost} open under no key that we hold: make them anew" if done.n_lost else ""
        self.stdout.write(f"{done.n_renewed} secrets sealed anew{lost}")
