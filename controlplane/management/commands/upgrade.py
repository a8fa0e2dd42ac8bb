"""`manage.py upgrade`: the running local stack goes over to the code that lies here now, without an interruption.

Migrations first (they only add), then gateways one by one, web, control worker and beat, then the machines. Processes
of the two versions run beside each other meanwhile; what may differ between them is in docs/operations.md.
"""

import os
import subprocess
import sys
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from autoscaler.house import build_cell
from autoscaler.replacing import NotReplacedError, replace_all
from controlplane.management.commands.replace_machines import add_within
from infra.local import environment
from infra.local.rolling import restart_all
from infra.local.stackconfig import ROOT

_MIGRATE_WITHIN_S = 600.0


class Command(BaseCommand):
    help = "Takes the running local stack over to the code that lies here now, process by process."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        add_within(parser)
        parser.add_argument("--no-machines", action="store_true", help="leave the machines as they are")

    def handle(self, *args: Any, **options: Any) -> None:
        var = settings.ENV.var
        try:
            self._migrate()
            restart_all(var, self._say)
            if not options["no_machines"]:
                provider = settings.AUTOSCALER.provider
                replace_all(build_cell(), provider, var, within_s=options["within_s"], say=self._say)
        except (RuntimeError, NotReplacedError) as error:
            raise CommandError(str(error)) from error
        self.stdout.write("the stack runs this version now")

    def _migrate(self) -> None:
        """As the stack does at its start, with the owner's role. RuntimeError with what it said."""
        var = settings.ENV.var
        env = environment.process_environment("migrate", environment.load(var), os.environ)
        done = subprocess.run(
            [sys.executable, "manage.py", "migrate", "--no-input"],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=_MIGRATE_WITHIN_S,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"migrate: {done.stderr.strip()[-1000:]}")
        applied = [line.strip() for line in done.stdout.splitlines() if line.strip().startswith("Applying")]
        self._say(f"{len(applied)} migrations applied")

    def _say(self, text: str) -> None:
        self.stderr.write(f"  {text}")
        self.stderr.flush()
