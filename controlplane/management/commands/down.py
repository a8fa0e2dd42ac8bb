"""`manage.py down`: stop the local stack, whoever started it, and what a killed one left behind.

Thin over infra/local/stack.py; must not touch the ORM.
"""

import os
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from infra.local import stack
from infra.local.stackconfig import StackConfig, StackConfigError


class Command(BaseCommand):
    help = "Stops the local stack. Data in var/ stays."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            config = StackConfig.read(os.environ)
        except StackConfigError as error:
            raise CommandError(str(error)) from error
        ran = stack.down(config, self.stdout.write)
        self.stdout.write("down" if ran else "nothing was running")
