"""Visitors of the console, and something for them to see. Imports late: this is read before Django is up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

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

    from tests.booked import book_usage

    return partial(book_usage, world)


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
