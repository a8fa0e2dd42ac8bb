"""`manage.py study NAME`: the experiments behind docs/results/, on the public traces. Reads files only.

The exit status is 1 when a goal is missed.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from autoscaler.sim import studies
from autoscaler.sim.checkers import InvariantError
from autoscaler.sim.market import MarketError
from autoscaler.sim.studies.base import markdown, text
from autoscaler.sim.workload import WorkloadError


class Command(BaseCommand):
    help = "Runs one of the experiments behind docs/results/ and prints its tables and goals."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        choice = parser.add_subparsers(dest="study", required=True, metavar="NAME")
        for name, module in _modules().items():
            study = choice.add_parser(name, help=module.HELP, description=module.HELP)
            study.add_argument(
                "--traces",
                type=Path,
                default=os.environ.get("CORRAL_TRACES"),
                help="folder of public traces, with requests/, spot/ and so on (default: $CORRAL_TRACES)",
            )
            study.add_argument("--seeds", type=int, default=10, help="runs per row (default 10)")
            study.add_argument("--json", action="store_true")
            study.add_argument("--write", type=Path, help="also write the tables to this Markdown file")
            module.add_arguments(study)

    def handle(self, *args: Any, **options: Any) -> None:
        name = options["study"]
        traces = options["traces"]
        if traces is None or not Path(traces).is_dir():
            raise CommandError(
                f"--traces: {traces or 'not given'}; name the folder that holds requests/ and spot/"
            )
        options["traces"] = Path(traces)
        if options["seeds"] < 1:
            raise CommandError("--seeds: at least 1")
        try:
            study = _modules()[name].run(options, lambda line: self.stderr.write(f"  {line}"))
        except (WorkloadError, MarketError, InvariantError, FileNotFoundError, ValueError) as error:
            raise CommandError(f"{name}: {error}") from error
        if options["write"]:
            options["write"].write_text(markdown(study, _command(options)))
        self.stdout.write(json.dumps(study.as_json(), indent=2) if options["json"] else text(study))
        if not study.all_met:
            sys.exit(1)


def _modules() -> dict[str, ModuleType]:
    """By name; underscores of file names are hyphens."""
    names = sorted(
        m.name for m in pkgutil.iter_modules(studies.__path__) if m.name != "base" and m.name[0] != "_"
    )
    return {n.replace("_", "-"): importlib.import_module(f"{studies.__name__}.{n}") for n in names}


def _command(options: dict[str, Any]) -> str:
    """What was asked, without where this machine keeps its files."""
    words, given = [], iter(sys.argv[2:])
    for word in given:
        if word == "--write" or word == "--traces":
            next(given, None)
        elif not word.startswith(("--write=", "--traces=")):
            words.append(word)
    return f"manage.py study {' '.join(words)} --traces DIR"
