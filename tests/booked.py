"""Booked usage events, as intake writes them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

from django.utils import timezone

from billing.models import UsageEvent, Witness
from controlplane import ids
from tests.database import acting_as
from tests.world import World


def book_usage(world: World, *, age_s: float = 5, key_id: UUID | None = None, **values: Any) -> UsageEvent:
    """A request of Acme that ended `age_s` ago, whatever else is said."""

    now = timezone.now()
    at = now - timedelta(seconds=age_s)
    request_id = UUID(int=(int(at.timestamp() * 1000) << 80) | (ids.new_id().int & ((1 << 80) - 1)))
    defaults: dict[str, Any] = {
        "day": ids.day_of(request_id),
        "request_id": request_id,
        "organization_id": world.organization.id,
        "project_id": world.project.id,
        "api_key_id": key_id or ids.new_id(),
        "deployment_id": ids.new_id(),
        "replica_id": ids.new_id(),
        "machine_id": ids.new_id(),
        "model": "toy-chat",
        "n_prompt_tokens": 100,
        "n_cached_tokens": 40,
        "n_completion_tokens": 20,
        "attempts": 1,
        "finish_reason": "stop",
        "status": 200,
        "admitted_at": at,
        "first_token_ms": 80,
        "duration_ms": 900,
        "price_version_id": ids.new_id(),
        "cost_nano": 15_000,
        "witness": Witness.STREAM,
        "received_at": now,
    }
    with acting_as("corral_operator"):
        return UsageEvent.objects.create(**(defaults | values))
