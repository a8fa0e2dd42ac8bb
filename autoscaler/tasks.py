"""Celery entry points of the autoscaler: what happens by the clock. What happens by event is watch/.

Each takes ids, may run twice and twice at once, and does one thing. The schedule is in controlplane/celery.py.
"""

from __future__ import annotations

from uuid import UUID

import structlog
from celery import shared_task
from django.db import OperationalError
from django.db.models import Q

from autoscaler import (
    external,
    health,
    longoperations,  # noqa: F401 - registers its handlers
    market,
    notices,
    pool,
    renewal,
)
from autoscaler import tick as ticking
from autoscaler.house import build_external_house, build_house
from autoscaler.models import LIVE_PHASES, Machine, MachineState, Replica
from autoscaler.reconcile import reconcile as run_reconcile
from controlplane.deployments.models import Deployment
from infra.providers.base import ProviderError

log = structlog.get_logger("corral.autoscaler")


@shared_task(name="autoscaler.tick_deployment")  # type: ignore[untyped-decorator]
def tick_deployment(deployment_id: str) -> None:
    """One tick; somebody else holding the lease is as good."""
    ticking.tick(UUID(hex=deployment_id), build_house())


@shared_task(name="autoscaler.tick_all")  # type: ignore[untyped-decorator]
def tick_all() -> int:
    """One tick of every deployment of this cell that is served or has replicas left; how many failed."""
    has_replicas = Replica.objects.filter(phase__in=LIVE_PHASES).values("deployment_id")
    house = build_house()
    wanted = Deployment.objects.filter(Q(deleted_at=None) | Q(id__in=has_replicas), cell=house.cell.keys.cell)
    n_failed = 0
    for deployment_id in list(wanted.order_by("id").values_list("id", flat=True)):
        try:
            ticking.tick(deployment_id, house)
        except OperationalError:
            raise  # Postgres is away: the others would fail alike
        except Exception:
            n_failed += 1
            log.exception("autoscaler.tick_failed", deployment=deployment_id.hex)
    return n_failed


@shared_task(name="autoscaler.reconcile")  # type: ignore[untyped-decorator]
def reconcile() -> None:
    """One pass over machines, rows and Redis; deployments that lost replicas are ticked at once."""
    house = build_house()
    for deployment_id in sorted(run_reconcile(house).deployments):
        ticking.tick(deployment_id, house)
    if Machine.objects.filter(provider=external.PROVIDER).exclude(state=MachineState.GONE).exists():
        run_reconcile(build_external_house())


@shared_task(name="autoscaler.keep_upstreams")  # type: ignore[untyped-decorator]
def keep_upstreams() -> None:
    """A replica for each endpoint elsewhere that is attached; nothing where there is none."""
    external.keep(build_external_house())


@shared_task(name="autoscaler.tend_pool")  # type: ignore[untyped-decorator]
def tend_pool() -> None:
    """One turn of the pool; deployments whose machine is given up are ticked at once."""
    house = build_house()
    try:
        touched = pool.turn(house)
    except ProviderError as error:
        log.warning("pool.not_tended", code=error.code, error=str(error))
        return
    for deployment_id in sorted(touched):
        ticking.tick(deployment_id, house)


@shared_task(name="autoscaler.refresh_market")  # type: ignore[untyped-decorator]
def refresh_market() -> int:
    """Prices of the pool's offers, as its provider says them now; how many."""
    house = build_house()
    try:
        return market.refresh(house.provider, house.cell.keys.cell)
    except ProviderError as error:
        log.warning("market.not_refreshed", code=error.code, error=str(error))
        return 0


@shared_task(name="autoscaler.renew_passwords")  # type: ignore[untyped-decorator]
def renew_passwords() -> None:
    """Machines' Redis passwords that are due, taken or over; what runs on a machine that took none moves at once."""
    house = build_house()
    touched = renewal.renew(house)
    renewal.renew(build_external_house())
    for deployment_id in sorted(touched):
        ticking.tick(deployment_id, house)


@shared_task(name="autoscaler.look_at_health")  # type: ignore[untyped-decorator]
def look_at_health() -> None:
    """Machines with a sick GPU leave; what they run is ticked at once, so that successors are ordered first."""
    house = build_house()
    for deployment_id in sorted(health.look(house)):
        ticking.tick(deployment_id, house)


@shared_task(name="autoscaler.heed_notices")  # type: ignore[untyped-decorator]
def heed_notices() -> None:
    """Machines whose provider says centrally that they will go; their deployments are ticked at once."""
    house = build_house()
    try:
        touched = notices.heed(house)
    except ProviderError as error:
        log.warning("notices.not_read", code=error.code, error=str(error))
        return
    for deployment_id in sorted(touched):
        ticking.tick(deployment_id, house)
