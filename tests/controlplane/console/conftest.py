"""Visitors of the console, and something for them to see. Imports late: this is read before Django is up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest

from tests.database import acting_as
from tests.world import PASSWORD, World

if TYPE_CHECKING:
    from django.test import Client

    from autoscaler.models import Replica
    from billing.models import UsageEvent
    from controlplane.deployments.models import Deployment


@pytest.fixture(autouse=True)
def _redis(redis_url: str) -> str:
    """Every page reads live figures."""
    return redis_url


@pytest.fixture
def anonymous() -> Client:
    from django.test import Client

    return Client()


@pytest.fixture
def owner(world: World) -> Client:
    return signed_in(world.alice)


@pytest.fixture
def developer(world: World) -> Client:
    return signed_in(world.bob)


@pytest.fixture
def viewer(world: World) -> Client:
    """A teammate who may look and nothing else."""
    from controlplane.tenants import services
    from controlplane.tenants.models import Role

    user = services.create_user(email="vera@example.org", password=PASSWORD)
    services.add_member(organization_id=world.organization.id, user=user, role=Role.VIEWER)
    return signed_in(user)


@pytest.fixture
def stranger(world: World) -> Client:
    return signed_in(world.charlie)


def signed_in(user: Any) -> Client:
    from django.test import Client

    client = Client()
    client.force_login(user)
    return client


@pytest.fixture
def usage_event(world: World) -> Callable[..., UsageEvent]:
    """Books a request of Acme that ended `age_s` ago, whatever else is said."""

    def book(*, age_s: float = 5, key_id: UUID | None = None, **values: Any) -> UsageEvent:
        from django.utils import timezone

        from billing.models import UsageEvent, Witness
        from controlplane import ids

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

    return book


@pytest.fixture
def replica(world: World, deployment: Deployment) -> Replica:
    """A ready replica of Acme's `toy-chat`."""
    from autoscaler.models import Machine, MachineState, Replica, ReplicaPhase
    from controlplane import ids

    with acting_as("corral_operator"):
        machine = Machine.objects.create(
            provider="test",
            command_id=ids.new_id(),
            enroll_proof_digest=b"x" * 32,
            cell="c0",
            state=MachineState.READY,
        )
        return Replica.objects.create(
            organization=world.organization,
            deployment=deployment,
            machine=machine,
            phase=ReplicaPhase.READY,
            generation=1,
            slots=8,
        )


@pytest.fixture
def redis_away(settings: Any) -> Iterator[None]:
    """The console talks to a port where nobody listens."""
    from controlplane.console import live
    from infra.local.ports import free_port

    environment = settings.ENV
    url = f"redis://127.0.0.1:{free_port()}/0"
    settings.ENV = type(environment)(**{**vars(environment), "redis_url": url})
    live._client.cache_clear()
    yield
    live._client.cache_clear()
