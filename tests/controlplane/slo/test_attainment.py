"""Attainment from booking to budget: counted once, by whose it is, kept for so long, alerted on."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
import redis
from django.db import connection

from billing.booking import Books
from billing.intake import Intake
from billing.usage_streams import UsageStreams
from controlplane import ids
from controlplane.policy.attained import Counts, burn_rate
from controlplane.slo import alerting, attainment, rollup, tasks
from controlplane.slo.attainment import Scope
from controlplane.slo.models import SloAlert, SloWindow
from controlplane.tenants.context import tenant
from controlplane.webhooks.models import Event
from tests.billing.usage import KEYS, Tenant, deliver, event, new_hex
from tests.database import acting_as
from tests.world import World
from workers.contract import Slo

INTERACTIVE = Slo("interactive", 1_000, 100, 300, 990_000)
MACHINE = new_hex()
NOW = datetime(2026, 11, 20, 12, 0, 30, tzinfo=UTC)


@pytest.fixture
def client(redis_url: str) -> Any:
    with redis.Redis.from_url(redis_url, socket_timeout=5) as found:
        yield found


def book(client: redis.Redis, *usages: Any) -> None:
    for usage in usages:
        deliver(client, MACHINE, usage)
    with acting_as("corral_operator"):
        Intake(UsageStreams(client, KEYS), Books(connection)).run([MACHINE], budget_s=5)


def windows(organization: str, width_s: int) -> list[tuple[int, ...]]:
    with acting_as("corral_operator"):
        rows = SloWindow.objects.filter(organization_id=UUID(organization), width_s=width_s)
        return [
            (r.n, r.n_good, r.n_ttft, r.n_itl, r.n_deadline, r.n_failed, r.n_refused, r.allowed_ppm)
            for r in rows
        ]


@pytest.mark.django_db
def test_what_is_booked_is_counted_once_in_its_minute_and_hour(client: redis.Redis) -> None:
    whose = Tenant()
    request = new_hex()
    good = event(whose, MACHINE, slo=INTERACTIVE, request_id=request)
    late = event(whose, MACHINE, slo=INTERACTIVE, first_token_ms=1_001, duration_ms=1_200)
    slow = event(whose, MACHINE, slo=INTERACTIVE, first_token_ms=100, duration_ms=5_000)
    book(client, good, late, slow, event(whose, MACHINE))  # the last: of a gateway that did not say
    book(client, good)  # the second witness
    assert sum(row[0] for row in windows(whose.org, 60)) == 3
    [hour] = windows(whose.org, 3600)
    assert hour == (3, 1, 1, 1, 0, 0, 0, 30_000)


@pytest.mark.django_db
@pytest.mark.parametrize(
    "slo",
    [
        Slo("gold", 1_000, 100, 300, 990_000),
        Slo("x" * 40, 1_000, 100, 300, 990_000),
        Slo("interactive", 0, 100, 300, 990_000),
        Slo("interactive", 1_000, 100, 300, 5_000_000),
    ],
)
def test_a_machine_cannot_make_up_series_nor_stop_the_bill(client: redis.Redis, slo: Slo) -> None:
    whose = Tenant()
    book(client, event(whose, MACHINE, slo=slo))
    from billing.models import UsageEvent

    with acting_as("corral_operator"):
        assert UsageEvent.objects.filter(organization_id=UUID(whose.org)).count() == 1
    assert windows(whose.org, 60) == []


def fill(
    world: World, *, n: int, n_bad: int, ago_s: float, slo_class: str = "interactive", now: datetime = NOW
) -> None:
    """So many requests of Acme that ended so long ago."""
    whose = rollup.Whose(world.organization.id, world.project.id, ids.new_id(), slo_class)
    slo = Slo(slo_class, 1_000, 100, 300, 990_000)
    at = now - timedelta(seconds=ago_s)
    done = [rollup.Finished(whose, slo, at, 200 if i >= n_bad else 500, 10, 20, 1, 1) for i in range(n)]
    with acting_as("corral_operator"):
        rollup.add(connection, done)


@pytest.mark.django_db
def test_windows_hold_what_ended_in_them(world: World) -> None:
    fill(world, n=100, n_bad=1, ago_s=60)
    fill(world, n=100, n_bad=50, ago_s=40 * 60)
    fill(world, n=100, n_bad=0, ago_s=3 * 3600, slo_class="batch")
    with tenant(world.organization.id):
        found = attainment.rates(Scope(world.organization.id), now=NOW)
        assert {name: (c.n, c.n_bad) for name, c in found["interactive"].items()} == {
            "5m": (100, 1), "30m": (100, 1), "1h": (200, 51), "6h": (200, 51), "3d": (200, 51),
        }  # fmt: skip
        assert burn_rate(found["interactive"]["1h"]) == pytest.approx(25.5)
        assert set(found["batch"]) == {"6h", "3d"}
        month = attainment.attained(
            Scope(world.organization.id, slo_class="interactive"), since=NOW - timedelta(days=30), until=NOW
        )
        assert [(row.counts.n, row.misses["failed"]) for row in month] == [(200, 51)]
        hours = attainment.hours(Scope(world.organization.id), since=NOW - timedelta(hours=5), until=NOW)
        assert [(h.at.hour, h.n, h.n_good) for h in hours] == [(9, 100, 100), (11, 200, 149)]


@pytest.mark.django_db
def test_a_stranger_sees_nothing_of_it(world: World) -> None:
    fill(world, n=10, n_bad=1, ago_s=60)
    with tenant(world.other_organization.id):
        assert attainment.rates(Scope(world.organization.id), now=NOW) == {}
        assert attainment.rates(Scope(world.other_organization.id), now=NOW) == {}


@pytest.mark.django_db
def test_an_alert_begins_once_and_ends_once(world: World) -> None:
    told: list[tuple[str, dict[str, Any]]] = []

    def tell(organization_id: UUID, name: str, data: dict[str, Any]) -> None:
        assert organization_id == world.organization.id
        told.append((name, data))
        tasks.tell(organization_id, name, data)  # what it says fits the catalogue

    def look(after_s: float) -> int:
        with acting_as("corral_operator"):
            return alerting.look(now=NOW + timedelta(seconds=after_s), tell=tell, using="default")

    fill(world, n=100, n_bad=20, ago_s=90)
    assert (look(0), look(30)) == (1, 0)
    ((name, data),) = told
    assert (name, data["state"], data["severity"], data["window"]) == ("slo.burn", "burning", "page", "1h")
    assert data["burn_rate"] == 20.0
    with tenant(world.organization.id):
        (row,) = attainment.alerts(Scope(world.organization.id))
        assert (row.severity, row.ended_at) == ("page", None)
    assert look(600) == 0, "the last five minutes are quiet, the last thirty are not"
    assert look(45 * 60) == 2, "a page becomes a ticket"
    assert [(data["state"], data["severity"]) for _, data in told[1:]] == [
        ("ended", "page"),
        ("burning", "ticket"),
    ]
    assert look(46 * 60) == 0
    assert look(7 * 3600) == 1, "six quiet hours"
    assert told[-1][1]["state"] == "ended"
    assert look(7 * 3600 + 30) == 0
    with tenant(world.other_organization.id):
        assert not SloAlert.objects.exists()
    with tenant(world.organization.id):
        assert [event.data["state"] for event in Event.objects.filter(kind="slo.burn").order_by("id")] == [
            data["state"] for _, data in told
        ]


@pytest.mark.django_db
def test_windows_are_forgotten_in_time(world: World) -> None:
    fill(world, n=1, n_bad=0, ago_s=5 * 86_400)
    fill(world, n=1, n_bad=0, ago_s=101 * 86_400)
    fill(world, n=1, n_bad=0, ago_s=60)
    with acting_as("corral_operator"):
        alerting.prune(now=NOW, using="default")
        left = {(w.width_s, (NOW - w.at).days) for w in SloWindow.objects.all()}
    assert left == {(60, 0), (3600, 0), (3600, 5)}


def test_counts_add_up() -> None:
    assert Counts(10, 7, 100_000).n_bad == 3
