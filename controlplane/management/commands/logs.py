"""`manage.py logs [NAME] [-f]`: the logs of the local stack, each line with the process it is from.

Thin over infra/local/logfile.py; must not touch the ORM.
"""

import os
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from infra.local.logfile import follow
from infra.local.stackconfig import StackConfig, StackConfigError


class Command(BaseCommand):
    help = "Shows the logs of the local stack: of all its processes, or of one."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "name", nargs="?", help="a process of `manage.py status`, or a machine's id or its start"
        )
        parser.add_argument("-f", "--follow", action="store_true", help="go on until Ctrl-C")
        parser.add_argument(
            "-n", "--lines", type=int, default=20, help="last lines of each (default: %(default)s)"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            config = StackConfig.read(os.environ)
        except StackConfigError as error:
            raise CommandError(str(error)) from error
        name, n_lines = options["name"], options["lines"]
        if not 0 <= n_lines <= 100_000:
            raise CommandError(f"--lines {n_lines}: give 0 to 100000")
        known = _log_files(config.var)
        chosen = {
            key: path
            for key, path in known.items()
            if not name or key == name or key.startswith(f"machine-{name}")
        }
        if not chosen:
            listed = ", ".join(known) or "none yet"
            raise CommandError(f"no log {name!r}: there are {listed}" if name else f"no logs in {config.var}")
        width = max(map(len, chosen))
        try:
            for source, line in follow(chosen, n_lines=n_lines, stop=lambda: not options["follow"]):
                self.stdout.write(f"{source:<{width}} | {line}" if len(chosen) > 1 else line)
        except KeyboardInterrupt:
            self.stdout.write("")


def _log_files(var: Path) -> dict[str, Path]:
    """Name → file: the stack's processes, then machines of the local provider."""
    found = {path.stem: path for path in sorted((var / "log").glob("*.log"))}
    for path in sorted((var / "machines").glob("*/agent.log")):
        found[f"machine-{path.parent.name}"] = path
    return found
