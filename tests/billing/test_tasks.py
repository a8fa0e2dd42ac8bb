"""The task as the control worker runs it: finds machines itself, and outlives servers that are away."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import redis
from django.db import connections
from django.test import override_settings
from prometheus_client import REGISTRY

from autoscaler.models import Machine, MachineState
from billing import tasks
from billing.models import UsageEvent as Row
from infra.local.ports import free_port
from tests.billing.usage import KEYS, Tenant, deliver, event
from tests.database import acting_as

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "operator"])


@pytest.fixture(autouse=True)
def fresh_runner() -> Iterator[None]:
    """Each test has a runner of its own, with connections of its own."""
    tasks._local.__dict__.clear()
    tasks._walk = tasks._Walk()
    yield
    tasks._local.__dict__.clear()
    connections["operator"].close()


@pytest.fixture
def machine() -> str:
    """A machine's row, committed."""
    with acting_as("corral_operator"):
        row = Machine.objects.create(
            provider="test",
            command_id=uuid.uuid4(),
            enroll_proof_digest=b"x" * 32,
            cell="c0",
            state=MachineState.READY,
        )
    return row.id.hex


def booked(tenant: Tenant) -> int:
    return Row.objects.using("operator").filter(organization_id=uuid.UUID(tenant.org)).count()


def failures(cause: str) -> float:
    return REGISTRY.get_sample_value("corral_intake_failures_total", {"cause": cause}) or 0.0


@contextmanager
def redis_away() -> Iterator[None]:
    """The runner made in here talks to a port where nobody listens."""
    tasks._local.__dict__.clear()
    environment = tasks.settings.ENV
    url = f"redis://127.0.0.1:{free_port()}/0"
    with override_settings(ENV=type(environment)(**{**vars(environment), "redis_url": url})):
        yield
    tasks._local.__dict__.clear()


def test_it_books_what_known_machines_delivered(client: redis.Redis, machine: str) -> None:
    tenant = Tenant()
    tasks._runner().machines()  # the walk through the keys is done: what comes now is found by its row
    deliver(client, machine, event(tenant, machine))
    tasks.intake()
    assert booked(tenant) == 1


def test_it_finds_the_stream_of_a_machine_nobody_knows(client: redis.Redis) -> None:
    tenant, stranger = Tenant(), uuid.uuid4().hex
    deliver(client, stranger, event(tenant, stranger))
    assert tasks.run_intake().n_booked == 1
    assert booked(tenant) == 1


def test_the_threads_of_a_process_share_one_walk_through_the_keys(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: list[int] = []
    monkeypatch.setattr(
        tasks.UsageStreams, "find_machines", lambda _: {"stranger"} if walks.append(1) is None else None
    )
    assert tasks._runner().machines() == ["stranger"]
    tasks._local.__dict__.clear()  # as another thread finds it
    assert tasks._runner().machines() == ["stranger"]
    assert len(walks) == 1


def test_redis_away_is_counted_and_the_next_run_books(client: redis.Redis, machine: str) -> None:
    tenant = Tenant()
    deliver(client, machine, event(tenant, machine))
    before = failures("redis")
    with redis_away():
        assert tasks.run_intake().n_booked == 0
    assert failures("redis") == before + 1
    assert tasks.run_intake().n_booked == 1


def test_postgres_away_acknowledges_nothing_and_the_next_run_books(
    client: redis.Redis, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = Tenant()
    usage = event(tenant, machine)
    deliver(client, machine, usage)
    tasks._runner().machines()
    before = failures("postgres")
    connection = connections["operator"]
    connection.close()
    with monkeypatch.context() as patched:
        patched.setitem(connection.settings_dict, "PORT", str(free_port()))
        assert tasks.run_intake().n_booked == 0
    assert failures("postgres") == before + 1
    assert client.llen(KEYS.machine(machine).ack(usage.replica)) == 0
    assert client.xlen(KEYS.machine(machine).usage) == 1
    assert tasks.run_intake().n_booked == 1
    assert booked(tenant) == 1


def test_a_connection_that_died_is_replaced(client: redis.Redis, machine: str) -> None:
    tenant = Tenant()
    deliver(client, machine, event(tenant, machine))
    tasks.run_intake()
    connections["operator"].connection.close()  # under Django's feet
    deliver(client, machine, event(tenant, machine))
    tasks.run_intake()
    tasks.run_intake()
    assert booked(tenant) == 2


def test_while_another_process_books_this_one_waits(client: redis.Redis, machine: str) -> None:
    tenant = Tenant()
    deliver(client, machine, event(tenant, machine))
    other = client.lock(KEYS.intake_lock, timeout=30, blocking=False)
    assert other.acquire()
    assert tasks.run_intake().n_booked == 0
    other.release()
    assert tasks.run_intake().n_booked == 1
    assert not client.exists(KEYS.intake_lock)


def test_a_run_that_outlives_its_lock_has_booked_all_the_same(
    client: redis.Redis, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = Tenant()
    deliver(client, machine, event(tenant, machine))
    monkeypatch.setattr(tasks._Runner, "machines", lambda _: client.delete(KEYS.intake_lock) and [machine])
    assert tasks.run_intake().n_booked == 1


def test_partitions_are_made_ahead() -> None:
    tasks.ensure_partitions()
    with connections["operator"].cursor() as cursor:
        cursor.execute("SELECT to_char(now() AT TIME ZONE 'UTC' + interval '7 days', 'YYYYMMDD')")
        name = f"billing_usageevent_p{cursor.fetchone()[0]}"
        cursor.execute("SELECT to_regclass(%s)", [name])
        assert cursor.fetchone()[0] is not None
