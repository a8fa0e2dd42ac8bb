"""Celery tasks of lifecycle. Run by the control worker as operator, scheduled in controlplane/celery.py.

May run twice.
"""

import redis
import structlog
from celery import shared_task
from django.utils import timezone

from controlplane.lifecycle import erasure, exports
from infra.objectstore import ObjectStoreError

log = structlog.get_logger("corral.lifecycle")


@shared_task(name="lifecycle.erase_due")  # type: ignore[untyped-decorator]
def erase_due() -> None:
    """Go on with every erasure that is due. One that fails does not keep the others."""
    for organization_id in erasure.due(timezone.now()):
        try:
            erasure.advance(organization_id)
        except redis.RedisError as error:
            log.warning(
                "erasure.waits_for_redis", organization=organization_id.hex, error=type(error).__name__
            )
        except ObjectStoreError as error:
            log.warning("erasure.waits_for_files", organization=organization_id.hex, error=str(error))


@shared_task(name="lifecycle.forget_exports")  # type: ignore[untyped-decorator]
def forget_exports() -> None:
    """Delete exports that have expired."""
    n = exports.forget_expired()
    if n:
        log.info("exports.expired", n=n)
