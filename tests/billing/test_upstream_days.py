"""What an endpoint elsewhere served is summed by day as it is booked: once, at its own rates, beside what it earned."""

from __future__ import annotations

import redis

from billing.intake import Intake
from billing.models import UsageEvent as Row
from billing.rating import FREE
from controlplane import ids
from controlplane.upstreams.models import UpstreamDay, UpstreamReplica
from tests.billing.test_intake import COST, MACHINE
from tests.billing.usage import Tenant, deliver, event, new_hex
from tests.world import World


def test_each_request_counts_once_at_the_endpoints_rates(
    world: World, intake: Intake, client: redis.Redis
) -> None:
    tenant, replica, upstream_id = Tenant(), new_hex(), ids.new_id()
    UpstreamReplica.objects.create(
        replica_id=replica, organization=world.organization, upstream_id=upstream_id, deployment_id=ids.new_id(),
        input_nano_per_million=50_000_000, cached_nano_per_million=0, output_nano_per_million=200_000_001,
    )  # fmt: skip
    told = [
        event(tenant, MACHINE, replica=replica, counted_by="upstream"),
        event(tenant, MACHINE, replica=replica, counted_by="estimate", status=502),
        event(tenant, MACHINE, replica=new_hex(), counted_by="upstream"),  # of no endpoint that we know
        event(tenant, MACHINE),
    ]
    for _ in range(2):
        for usage in told:
            deliver(client, MACHINE, usage)
        intake.run([MACHINE], budget_s=5)
    [day] = UpstreamDay.objects.all()
    assert (day.upstream_id, day.n_requests, day.n_failed, day.n_counted_here) == (upstream_id, 2, 1, 1)
    assert (day.n_prompt_tokens, day.n_cached_tokens, day.n_completion_tokens) == (200, 80, 40)
    assert (day.cost_nano, day.revenue_nano) == (2 * (60 * 50 + 20 * 200), 2 * COST)
    assert sorted(Row.objects.values_list("counted_by", flat=True)) == [
        "",
        "estimate",
        "upstream",
        "upstream",
    ]


def test_a_copy_costs_its_owner_what_the_endpoint_takes_and_nothing_here(
    world: World, intake: Intake, client: redis.Redis
) -> None:
    tenant, replica, upstream_id = Tenant(), new_hex(), ids.new_id()
    UpstreamReplica.objects.create(
        replica_id=replica, organization=world.organization, upstream_id=upstream_id, deployment_id=ids.new_id(),
        input_nano_per_million=50_000_000, cached_nano_per_million=0, output_nano_per_million=200_000_001,
    )  # fmt: skip
    deliver(
        client,
        MACHINE,
        event(tenant, MACHINE, replica=replica, counted_by="upstream", price_version=FREE.hex),
    )
    assert intake.run([MACHINE], budget_s=5).n_booked == 1
    assert Row.objects.get().cost_nano == 0
    day = UpstreamDay.objects.get()
    assert (day.n_requests, day.cost_nano, day.revenue_nano) == (1, 60 * 50 + 20 * 200, 0)


def test_who_counted_is_one_of_few_words(intake: Intake, client: redis.Redis) -> None:
    deliver(client, MACHINE, event(Tenant(), MACHINE, counted_by="me"))
    assert intake.run([MACHINE], budget_s=5).n_refused == 1
