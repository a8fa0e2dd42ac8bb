"""Machines that a provider says centrally it will take away: noted as if their agents had said so.

Called by a task of the control worker. Whoever hears it first, agent or queue, orders the replacement; the other finds
it done. Each cell needs a queue of its own: what is about no machine of this one is taken and forgotten.
"""

from __future__ import annotations

from uuid import UUID

import structlog
from django.utils import timezone

from autoscaler import records
from autoscaler.models import Machine, MachineState
from autoscaler.tick import House

log = structlog.get_logger("corral.autoscaler")


def heed(house: House) -> set[UUID]:
    """Take what waits; the deployments to tick. Raises ProviderError when the provider cannot be asked."""
    touched: set[UUID] = set()
    for notice in house.provider.notices():
        machine = (
            Machine.objects.filter(
                provider=house.provider.name, cell=house.cell.keys.cell, provider_ref=notice.ref
            )
            .exclude(state=MachineState.GONE)
            .first()
        )
        if machine is not None:
            left_s = notice.ends_at_s - timezone.now().timestamp()
            log.warning(
                "machine.notice", machine=machine.id.hex, advice=notice.is_advice, left_s=round(left_s, 1)
            )
            touched.update(records.machine_leaves(machine.id, max(round(left_s * 1000), 0)))
        house.provider.heeded(notice)
    return touched
