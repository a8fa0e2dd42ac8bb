"""`manage.py status`: what of the local stack runs, where, and since when.

Exit status 0: all of it runs; 1: some does not; 3: none does. Thin over infra/local/stack.py; must not
touch the ORM.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from infra.local import stack
from infra.local.replicas import ReplicaSlots, read_slots
from infra.local.stackconfig import StackConfig, StackConfigError


class Command(BaseCommand):
    help = "Shows what of the local stack runs. Exit status: 0 all, 1 not all, 3 nothing."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            config = StackConfig.read(os.environ)
            status = stack.status(config)
        except StackConfigError as error:
            raise CommandError(str(error)) from error
        slots = read_slots(config.var) if status.phase != "down" else []
        facts = {**_as_json(status), "replicas": [asdict(replica) for replica in slots]}
        self.stdout.write(json.dumps(facts, indent=1) if options["json"] else _as_text(status, slots))
        if not status.healthy:
            sys.exit(3 if status.phase == "down" else 1)


def _as_json(status: stack.StackStatus) -> dict[str, Any]:
    record = status.record if status.phase != "down" else None
    return {
        "phase": status.phase,
        "healthy": status.healthy,
        "pid": record.supervisor.pid if record else None,
        "started_at": record.started_at if record else None,
        **(record.facts if record else {}),
        "processes": [
            {
                "name": p.name,
                "phase": p.phase,
                "pid": p.pid,
                "n_restarts": p.n_restarts,
                "detail": p.detail,
                "log": p.log,
            }
            for p in (record.processes if record else ())
        ],
        "machines": [
            {"machine_id": m.machine_id, "n_processes": m.n_processes, "log": str(m.log)}
            for m in status.machines
        ],
    }


def _as_text(status: stack.StackStatus, slots: Sequence[ReplicaSlots] = ()) -> str:
    record = status.record
    if status.phase == "down" or record is None:
        lines = ["down (`manage.py up` starts it)"]
    else:
        lines = [
            f"{status.phase} since {record.started_at} (pid {record.supervisor.pid})",
            f"  engine    {record.facts['engine']}",
            f"  gateway   {record.facts['gateway_url']}/v1",
            f"  console   {record.facts['console_url']}",
            "",
        ]
        for p in record.processes:
            pid = f"pid {p.pid}" if p.pid else ""
            notes = [p.detail.splitlines()[0]] if p.detail and not p.detail.startswith("pid ") else []
            if p.n_restarts:
                notes.append(f"{p.n_restarts} restart{'s' if p.n_restarts > 1 else ''}")
            lines.append(f"  {p.name:<11} {p.phase:<12} {pid:<12} {', '.join(notes)}".rstrip())
    lines += [f"  machine     {m.machine_id} ({m.n_processes} processes)" for m in status.machines]
    for replica in slots:
        why = f"; {replica.why}" if replica.why else ""
        used = f"{replica.used} of {replica.given} slots used, engine batches {replica.ceiling}"
        lines.append(f"  replica     {replica.replica[-8:]} ({used}{why})")
    return "\n".join(lines)
