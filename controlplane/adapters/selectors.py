"""Reads about adapters, scoped by organization; and what machines of this cell are told of them, for the house."""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

from django.db.models import QuerySet

from controlplane.adapters.models import Adapter, AdapterState
from controlplane.deployments.models import Deployment
from controlplane.errors import NotFoundError


def adapters(*, organization_id: UUID) -> QuerySet[Adapter]:
    """All of them, with deployment and model version."""
    return Adapter.objects.filter(organization_id=organization_id).select_related("deployment__model_version")


def adapter(*, organization_id: UUID, adapter_id: UUID) -> Adapter:
    """One adapter. Raises NotFoundError, also for another tenant's."""
    found = adapters(organization_id=organization_id).filter(id=adapter_id).first()
    if found is None:
        raise NotFoundError("no such adapter", field="adapter")
    return found


def why_not_served(row: Adapter) -> str:
    """Empty for one that answers requests; else what is in its way, and the remedy."""
    deployment = row.deployment
    if row.state != AdapterState.READY:
        return row.error_message or f"it is {row.state}"
    if deployment.deleted_at is not None:
        return f"the deployment {deployment.name} was deleted: register it for another one"
    if deployment.model_version.digest != row.base_digest:
        return f"{deployment.name} serves another model version by now: train and register it for that one"
    max_loras, max_rank = lora_room(deployment)
    if not max_loras:
        return f"{deployment.name} takes no adapters any more: set max_loras in its engine profile"
    if row.rank is not None and row.rank > max_rank:
        return f"its rank {row.rank} is above max_lora_rank {max_rank} of {deployment.name}: raise that"
    return ""


def lora_room(deployment: Deployment) -> tuple[int, int]:
    """(adapters in memory at once, highest rank) by its engine profile."""
    profile = deployment.engine_profile
    return int(profile.get("max_loras") or 0), int(profile.get("max_lora_rank") or 16)


def served(deployment: Deployment) -> list[Adapter]:
    """Those that its replicas may be asked for, as operator or within the tenant."""
    max_loras, max_rank = lora_room(deployment)
    if not max_loras or deployment.deleted_at is not None:
        return []
    found = Adapter.objects.filter(
        organization_id=deployment.organization_id,
        deployment_id=deployment.id,
        state=AdapterState.READY,
        base_digest=deployment.model_version.digest,
        rank__lte=max_rank,
    )
    return list(found.order_by("id"))


def digests_in_use(digests: Iterable[str]) -> set[str]:
    """Of these, those that an adapter which is not purged has: equal files lie in one place. As operator."""
    rows = Adapter.objects.filter(digest__in=list(digests), purged_at=None, state__in=[AdapterState.READY])
    return set(rows.values_list("digest", flat=True))
