"""Tells gateways to forget what they cached about a key, project, organization or deployment.

Called by services after a change. Best effort and after commit only: the same change left a note in Postgres
(corral_changes_since), which gateways poll, so a lost message costs seconds and never correctness.
"""

from collections.abc import Iterable
from functools import lru_cache
from uuid import UUID

import redis
import structlog
from django.conf import settings
from django.db import transaction

from workers.keys import CellKeys

log = structlog.get_logger("corral.tenants")

# A console click must not hang on a Redis that is away.
TIMEOUT_S = 0.5


def key_ref(lookup: str) -> str:
    """One API key."""
    return f"key:{lookup}"


def project_ref(project_id: UUID) -> str:
    """All keys of a project, and the list of deployments they may use."""
    return f"prj:{project_id.hex}"


def organization_ref(organization_id: UUID) -> str:
    """All keys of an organization."""
    return f"org:{organization_id.hex}"


def deployment_ref(deployment_id: UUID) -> str:
    """One deployment, wherever it is cached."""
    return f"dep:{deployment_id.hex}"


def publish_after_commit(*refs: str) -> None:
    """Publish each ref once the surrounding transaction has committed; nothing if it rolls back."""
    transaction.on_commit(lambda: _publish(refs), robust=True)


def _publish(refs: Iterable[str]) -> None:
    channel = CellKeys(settings.ENV.cell).invalidate_channel
    try:
        with _client(settings.ENV.redis_url).pipeline(transaction=False) as pipeline:
            for ref in refs:
                pipeline.publish(channel, ref)
            pipeline.execute()
    except redis.RedisError as error:
        log.warning("invalidation.not_published", error=type(error).__name__)


@lru_cache(maxsize=2)
def _client(url: str) -> redis.Redis:
    return redis.Redis.from_url(
        url, socket_connect_timeout=TIMEOUT_S, socket_timeout=TIMEOUT_S, max_connections=8
    )
