"""The reserve of stopped machines as rows: which machines belong to it, where each is, how many lie ready to start.

Read by pool.py (its turn), market.py (a purchase), observe.py and reconcile.py, which leave to the pool's turn what is
in reserve. A machine belongs to it by its `reserve_place`, unique among those that exist, so that none is bought twice;
it never holds one of the pool's places. Reads only: policy/reserve.py decides, launch.py buys, stopping.py starts and
stops.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from django.db.models import Count, Q

from autoscaler.models import AWAKE_PHASES, Machine, MachineState
from autoscaler.policy.reserve import Member, Where
from autoscaler.policy.sizes import Scale

# What a stopped machine's row says after its zone had no room to start it, and for how long it is not asked again.
NO_ROOM: Final = "no room in its zone: "
AGAIN_AFTER: Final = timedelta(seconds=60)

# Bought for the reserve and never stopped yet: nothing is placed on it.
FILLING_Q: Final = Q(reserve_place__isnull=False, rest_at=None)
_DOWN: Final = (MachineState.STOPPING, MachineState.STOPPED)
_WHERE: Final = {
    MachineState.STOPPING: Where.STOPPING,
    MachineState.STOPPED: Where.STOPPED,
    MachineState.DRAINING: Where.LEAVING,
    MachineState.PENDING: Where.COMING,
    MachineState.ENROLLED: Where.COMING,
    MachineState.RESUMING: Where.LEAVING,  # on its way up: left alone as one on its way down is
}


def refused_lately(now: datetime) -> Q:
    """Stopped machines whose zone had no room for them a moment ago."""
    return Q(reason__startswith=NO_ROOM, rest_at__gt=now - AGAIN_AFTER)


def is_member(row: Machine, n: int) -> bool:
    """Of a reserve of `n`: it lies down when nothing runs on it, where others end."""
    return row.reserve_place is not None and row.reserve_place < n


def is_filling(row: Machine) -> bool:
    return row.reserve_place is not None and row.rest_at is None


def rows(cell: str, provider: str) -> list[Machine]:
    """All that exist, those too many included, by place; with `n_live` replicas that serve there."""
    found = Machine.objects.filter(cell=cell, provider=provider, reserve_place__isnull=False)
    return list(
        found.exclude(state=MachineState.GONE)
        .annotate(n_live=Count("replicas", filter=Q(replicas__phase__in=AWAKE_PHASES)))
        .order_by("reserve_place")
    )


def member(row: Machine, is_filled: bool, now: datetime) -> Member:
    """One of `rows` as the policy sees it."""
    up = Where.FILLING if row.rest_at is None else Where.SERVING
    return Member(
        row.id.hex,
        row.reserve_place or 0,
        _WHERE.get(MachineState(row.state), up),
        is_filled,
        row.n_live,  # type: ignore[attr-defined]
        0.0 if row.ready_at is None else (now - row.ready_at).total_seconds(),
    )


def startable(cell: str, provider: str, n: int, now: datetime) -> list[Machine]:
    """Those of a reserve of `n` that lie stopped where there was room a moment ago, by place."""
    found = Machine.objects.filter(
        cell=cell, provider=provider, state=MachineState.STOPPED, reserve_place__lt=n
    )
    return list(found.exclude(refused_lately(now)).order_by("reserve_place"))


def n_stopped(cell: str, provider: str, n: int, scale: Scale, now: datetime) -> int:
    """What lies there, in units of the scale: what is on its way down can be started in a minute."""
    found = Machine.objects.filter(cell=cell, provider=provider, state__in=_DOWN, reserve_place__lt=n)
    return sum(scale.units(row.offering) for row in found.exclude(refused_lately(now)))
