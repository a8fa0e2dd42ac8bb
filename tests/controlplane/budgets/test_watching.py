"""Thresholds are told once per window, by whoever notices first; counters learn what only the ledger knows."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import redis
from django.core import mail
from django.utils import timezone

from controlplane.budgets import selectors, services, watching
from controlplane.budgets.models import Budget, BudgetAlert
from controlplane.policy.periods import Period
from controlplane.tenants.context import tenant
from controlplane.webhooks import sending
from controlplane.webhooks import services as webhooks
from controlplane.webhooks.models import Delivery, Event
from tests.booked import book_usage
from tests.controlplane.budgets.test_budgets import make_budget
from tests.database import acting_as
from tests.world import World
from workers.keys import CellKeys

KEYS = CellKeys("c0")


def look(now: datetime | None = None, **values: object) -> int:
    with acting_as("corral_operator"):
        return watching.watch(now or timezone.now(), **values)  # type: ignore[arg-type]


def told(world: World) -> list[tuple[str, int]]:
    with tenant(world.organization.id):
        return [(event.kind, event.data["threshold"]) for event in Event.objects.order_by("id")]


def test_each_threshold_is_told_once_per_window(world: World) -> None:
    webhooks.create_endpoint(organization_id=world.organization.id, url="https://example.org/", events=[])
    make_budget(world, limit_nano=100_000, hard=False)
    assert look() == 0
    book_usage(world, cost_nano=49_999)
    assert look() == 0
    book_usage(world, cost_nano=1)
    assert (look(), look()) == (1, 0)
    book_usage(world, cost_nano=60_000)
    assert (look(), look()) == (2, 0)
    assert told(world) == [("budget.threshold", 50), ("budget.threshold", 80), ("budget.exhausted", 100)]
    tomorrow = timezone.now() + timedelta(days=1)
    book_usage(world, cost_nano=55_000, admitted_at=tomorrow)
    assert look(tomorrow) == 1
    with tenant(world.organization.id):
        receivers = Delivery.objects.filter(event__kind="budget.exhausted").values_list(
            "endpoint_id", "email"
        )
        assert len(receivers) == 2


def test_the_same_alert_of_two_workers_is_one(world: World) -> None:
    """Both have seen that it is not there; the row decides."""
    budget = make_budget(world, limit_nano=10)
    book_usage(world, cost_nano=10)
    with acting_as("corral_operator"):
        standing = selectors.standing(
            Budget.objects.select_related("organization").get(id=budget.id), timezone.now()
        )
        assert watching.alert(standing) == 3
        BudgetAlert.objects.filter(threshold=80).delete()
        assert watching.alert(standing) == 1
        assert watching.alert(standing) == 0
        assert Event.objects.filter(kind="budget.threshold").count() == 3


def test_owners_and_billing_are_mailed_readable_amounts(world: World) -> None:
    make_budget(world, name="team chat", limit_nano=2_000_000_000, thresholds=[80])
    book_usage(world, cost_nano=1_700_000_000)
    look()
    with acting_as("corral_operator"):
        sending.send_due()
    (message,) = mail.outbox
    assert message.to == ["alice@example.org"] and "budget.threshold" in message.subject
    assert "$1.70" in message.body and "$2.00" in message.body and "team chat" in message.body


def test_a_raised_limit_makes_alerts_possible_again(world: World) -> None:
    budget = make_budget(world, limit_nano=100, thresholds=[50, 100])
    book_usage(world, cost_nano=100)
    assert look() == 2
    services.update_budget(organization_id=world.organization.id, budget_id=budget.id, limit_nano=200)
    assert look() == 0, "50 percent of 200 is still reached, and was told"
    book_usage(world, cost_nano=100)
    assert look() == 1


def test_only_those_who_spent_lately_are_looked_at_but_now_and_then_all(world: World) -> None:
    make_budget(world, limit_nano=100, period=Period.TOTAL)
    book_usage(world, cost_nano=100, admitted_at=timezone.now() - timedelta(hours=3))
    assert look() == 0
    assert look(everything=True) == 3


def test_a_counter_learns_what_the_ledger_knows(world: World, redis_url: str) -> None:
    """A budget made while requests run: they end without having been held."""
    budget = make_budget(world, limit_nano=100_000)
    book_usage(world, cost_nano=40_000)
    now = timezone.now()
    start = int(now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0).timestamp() * 1000)
    with redis.Redis.from_url(redis_url) as client:
        look(client=client, cell="c0")
        assert not client.exists(KEYS.budget(budget.id.hex)), "what was never seen is seeded by a gateway"
        counter = {"win": start, "end": start + 86_400_000, "spent": 10_000, "held": 25_000}
        client.hset(KEYS.budget(budget.id.hex), mapping=counter)
        look(client=client, cell="c0")
        assert client.hget(KEYS.budget(budget.id.hex), "spent") == b"15000"
        look(client=client, cell="c0")
        assert client.hget(KEYS.budget(budget.id.hex), "spent") == b"15000"
