"""Machines replaced one after another, as if each were to be taken away: its successor serves before it drains.

Called by `manage.py replace_machines` and `manage.py upgrade` for a new version of the product or of the image, as
operator and beside the control worker, which does all the work: it hears that a machine leaves, and orders.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from autoscaler import records
from autoscaler.cell import Cell
from autoscaler.models import Machine, MachineState
from infra.providers.local import give_notice

_POLL_S: Final = 0.2
_AFTERWARDS_S: Final = 90.0  # from its last moment until reconcile has given it back


class NotReplacedError(RuntimeError):
    """A machine is still there; the message says which, and where to look."""


def replace_all(cell: Cell, provider: str, var: Path, *, within_s: float, say: Callable[[str], None]) -> int:
    """Every machine that serves now; how many were replaced. Long streams move when their machine's `within_s` near
    their end, at the latest. Raises NotReplacedError; those before it have been replaced then.
    """
    serving = Machine.objects.filter(
        cell=cell.keys.cell, provider=provider, state__in=(MachineState.ENROLLED, MachineState.READY)
    )
    machines = list(serving.order_by("created_at"))
    for number, machine in enumerate(machines, 1):
        started_s = time.monotonic()
        leave(machine, cell, var, within_s)
        deadline_s = started_s + within_s + _AFTERWARDS_S
        while Machine.objects.filter(id=machine.id).exclude(state=MachineState.GONE).exists():
            if time.monotonic() > deadline_s:
                raise NotReplacedError(
                    f"machine {machine.id.hex} still runs: see `manage.py decisions` and `manage.py logs control`"
                )
            time.sleep(_POLL_S)
        took_s = time.monotonic() - started_s
        say(f"machine {machine.id.hex[:8]} replaced ({number} of {len(machines)}, {took_s:.0f} s)")
    return len(machines)


def leave(machine: Machine, cell: Cell, var: Path, within_s: float) -> None:
    """Note that it leaves, and wake whoever orders its successor. May be repeated."""
    if machine.provider == "local":  # whose pool is this computer: only what was told to leave makes room
        give_notice(var / "machines" / machine.id.hex, within_s)
    for deployment_id in records.machine_leaves(machine.id, round(within_s * 1000), "it is replaced"):
        cell.redis.publish(cell.keys.invalidate_channel, f"dep:{deployment_id.hex}")
