"""`manage.py up`: the whole local stack on this machine, in the foreground or detached.

Thin over infra/local/stack.py. Runs before there is a database, so it must not touch the ORM.
"""

import os
import subprocess
import sys
import time
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from infra.local import stack
from infra.local.logfile import bound_log, follow
from infra.local.privatefile import make_traversable
from infra.local.stackconfig import ROOT, StackConfig, StackConfigError
from infra.local.stackstate import AlreadyRunningError

DETACHED_TIMEOUT_S = 600.0


class Command(BaseCommand):
    help = "Starts the local stack, asks a first question, prints the panel. Ctrl-C (or `down`) stops it."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--detach", action="store_true", help="return once it is up; `down` stops it")
        parser.add_argument("--no-question", action="store_true", help="do not set up the demo nor ask")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            config = StackConfig.read(os.environ)
            if options["detach"]:
                code = self._detached(config, options["no_question"])
            else:
                code = stack.up(config, ask=not options["no_question"])
        except (AlreadyRunningError, StackConfigError, RuntimeError) as error:
            raise CommandError(str(error)) from error
        if code:
            sys.exit(code)

    def _detached(self, config: StackConfig, no_question: bool) -> int:
        """Start ourselves in a session of its own, show its lines until all runs, then ask from here."""
        running = stack.status(config)
        if running.phase != "down" and running.record:
            raise AlreadyRunningError(
                f"already running (pid {running.record.supervisor.pid}): "
                "`manage.py status` shows it, `manage.py down` stops it"
            )
        log_path = config.var / "log" / "stack.log"
        make_traversable(log_path.parent)
        bound_log(log_path, max_bytes=0)
        with os.fdopen(os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as log:
            child = subprocess.Popen(
                [sys.executable, "manage.py", "up", "--no-question"],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + DETACHED_TIMEOUT_S
        over = is_up = False

        def _over() -> bool:
            nonlocal over, is_up
            if over:
                return True  # after one more round, for the last lines
            is_up = stack.is_up(config, child.pid)
            over = is_up or child.poll() is not None or time.monotonic() > deadline_s
            return False

        for _, line in follow({"stack": log_path}, n_lines=0, stop=_over):
            self.stdout.write(line)
        if not is_up:
            return 1
        return 0 if no_question else stack.first_question(config)
