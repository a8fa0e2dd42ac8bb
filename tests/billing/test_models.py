"""Usage events across partitions, and prices in force."""

from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.db import DatabaseError, IntegrityError, connection, transaction
from django.utils import timezone

from billing.models import PriceVersion, UsageEvent, Witness
from billing.money import NanoPerMillion, Rates
from billing.prices import create_price_version, price_in_force
from controlplane import ids
from controlplane.errors import ConflictError, InvalidInputError
from controlplane.tenants.context import tenant
from tests.world import World


def uuid7_at(at: datetime, n: int = 1) -> UUID:
    return UUID(int=(int(at.timestamp() * 1000) << 80) | (7 << 76) | (2 << 62) | n)


def event(world: World, request_id: UUID, **values: Any) -> UsageEvent:
    now = timezone.now()
    defaults: dict[str, Any] = {
        "day": ids.day_of(request_id) if request_id.version == 7 else now.date(),
        "request_id": request_id,
        "organization_id": world.organization.id,
        "project_id": world.project.id,
        "api_key_id": ids.new_id(),
        "deployment_id": ids.new_id(),
        "model": "toy-chat",
        "n_prompt_tokens": 10,
        "n_cached_tokens": 0,
        "n_completion_tokens": 5,
        "attempts": 1,
        "finish_reason": "stop",
        "status": 200,
        "admitted_at": now,
        "duration_ms": 100,
        "price_version_id": ids.new_id(),
        "cost_nano": 3000,
        "witness": Witness.STREAM,
        "received_at": now,
    }
    return UsageEvent(**(defaults | values))


def partition_of(request_id: UUID) -> str:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT tableoid::regclass::text FROM billing_usageevent WHERE request_id = %s", [request_id]
        )
        ((name,),) = cursor.fetchall()
    return str(name)


def ensure_partitions(days_ahead: int) -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT corral_ensure_usage_partitions(%s)", [days_ahead])
        return int(cursor.fetchone()[0])


def test_an_event_lands_in_the_partition_of_its_day(world: World, as_operator) -> None:
    with as_operator():
        today = event(world, ids.new_id())
        today.save(force_insert=True)
        assert partition_of(today.request_id) == f"billing_usageevent_p{today.day:%Y%m%d}"
        old = event(world, uuid7_at(datetime(2020, 1, 1, tzinfo=UTC)))
        old.save(force_insert=True)
        assert partition_of(old.request_id) == "billing_usageevent_default"


def test_a_request_is_there_once_whatever_day_its_witness_claims(world: World, as_operator) -> None:
    request_id = ids.new_id()
    with as_operator():
        event(world, request_id).save(force_insert=True)
        with pytest.raises(IntegrityError, match="pkey"), transaction.atomic():
            event(world, request_id).save(force_insert=True)
        for days in (-1, 1, 400):
            with pytest.raises(IntegrityError, match="day_is_of_request"), transaction.atomic():
                event(world, request_id, day=ids.day_of(request_id) + timedelta(days)).save(force_insert=True)
        assert UsageEvent.objects.count() == 1


def test_an_id_without_a_time_is_refused(world: World, as_operator) -> None:
    with as_operator(), pytest.raises(IntegrityError, match="day_is_of_request"), transaction.atomic():
        event(world, uuid4(), day=date(2026, 11, 20)).save(force_insert=True)


def test_the_tenant_reads_its_events_and_writes_none(world: World, as_operator) -> None:
    with as_operator():
        event(world, ids.new_id()).save(force_insert=True)
    with tenant(world.organization.id):
        assert UsageEvent.objects.count() == 1
        with pytest.raises(DatabaseError, match="permission denied"), transaction.atomic():
            event(world, ids.new_id()).save(force_insert=True)
    with tenant(world.other_organization.id):
        assert UsageEvent.objects.count() == 0


def test_not_even_the_house_changes_or_deletes_an_event(world: World, as_operator) -> None:
    with as_operator():
        event(world, ids.new_id()).save(force_insert=True)
        with pytest.raises(DatabaseError, match="permission denied"), transaction.atomic():
            UsageEvent.objects.update(cost_nano=0)
        with (
            pytest.raises(DatabaseError, match="permission denied"),
            transaction.atomic(),
            connection.cursor() as c,
        ):
            c.execute("DELETE FROM billing_usageevent")


def test_partitions_are_made_ahead_once_and_take_over_what_came_before_them(
    world: World, as_operator
) -> None:
    request_id = uuid7_at(timezone.now() + timedelta(days=12))
    with as_operator():
        event(world, request_id).save(force_insert=True)
        assert partition_of(request_id) == "billing_usageevent_default"
        with connection.cursor() as cursor:
            cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
        assert ensure_partitions(12) == 5
        assert ensure_partitions(12) == 0
        assert partition_of(request_id) == f"billing_usageevent_p{ids.day_of(request_id):%Y%m%d}"
        assert UsageEvent.objects.count() == 1
        with pytest.raises(IntegrityError, match="pkey"), transaction.atomic():
            event(world, request_id).save(force_insert=True)


def test_partitions_far_ahead_are_refused(db: None, as_operator) -> None:
    with as_operator(), pytest.raises(DatabaseError, match="from 0 to 60"), transaction.atomic():
        ensure_partitions(61)


@pytest.mark.django_db
def test_the_table_is_what_the_model_says() -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT attname, format_type(atttypid, atttypmod), NOT attnotnull FROM pg_attribute "
            "WHERE attrelid = 'billing_usageevent'::regclass AND attnum > 0 AND NOT attisdropped"
        )
        table = {name: (kind, nullable) for name, kind, nullable in cursor.fetchall()}
        constraints = connection.introspection.get_constraints(cursor, "billing_usageevent")
    model = {}
    for field in UsageEvent._meta.concrete_fields:
        if field.column is not None:  # the composite key has no column of its own
            kind = field.db_type(connection).replace("varchar", "character varying")
            model[field.column] = (
                kind.replace("timestamp with time zone", "timestamp with time zone"),
                field.null,
            )
    assert table == model
    expected = {item.name for item in [*UsageEvent._meta.constraints, *UsageEvent._meta.indexes]}
    assert expected <= constraints.keys()
    (primary,) = [c for c in constraints.values() if c["primary_key"]]
    assert primary["columns"] == ["day", "request_id"]


def test_the_newest_price_in_force_is_taken_and_the_tenants_own_goes_first(world: World, as_operator) -> None:
    now = timezone.now()
    cheap, cheaper = (Rates(*map(NanoPerMillion, (n, n, n))) for n in (2, 1))
    with as_operator():
        newer = create_price_version(name="standard", rates=cheap, valid_from=now - timedelta(hours=1))
        create_price_version(name="standard", rates=cheaper, valid_from=now + timedelta(hours=1))
        own = create_price_version(
            name="standard",
            rates=cheaper,
            valid_from=now - timedelta(days=9),
            organization_id=world.organization.id,
        )
        with pytest.raises(ConflictError):
            create_price_version(name="standard", rates=cheap, valid_from=newer.valid_from)
    with tenant(world.other_organization.id):
        assert price_in_force(organization_id=world.other_organization.id, at=now).id == newer.id
        assert not PriceVersion.objects.filter(id=own.id).exists()
    with tenant(world.organization.id):
        assert price_in_force(organization_id=world.organization.id, at=now).id == own.id
        with pytest.raises(InvalidInputError, match="bargain"):
            price_in_force(organization_id=world.organization.id, at=now, name="bargain")


def test_a_tenant_cannot_set_a_price(world: World) -> None:
    with (
        tenant(world.organization.id),
        pytest.raises(DatabaseError, match="permission denied"),
        transaction.atomic(),
    ):
        create_price_version(
            name="mine",
            rates=Rates(NanoPerMillion(0), NanoPerMillion(0), NanoPerMillion(0)),
            valid_from=timezone.now(),
            organization_id=world.organization.id,
        )
