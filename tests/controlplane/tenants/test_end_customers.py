"""Usage by the tenant's own customers: from what a program sends to what the API sums, without anybody's name."""

from __future__ import annotations

from pathlib import Path

import pytest
from django.conf import settings

from billing.models import UsageEvent
from controlplane.tenants.end_customers import SHAPE, pseudonym
from controlplane.tenants.models import Role
from tests.booked import book_usage
from tests.controlplane.api.caller import Api, token_of
from tests.controlplane.gateway.fronted import fronted
from tests.controlplane.gateway.harness import CHAT, PEPPER, until
from tests.world import World
from workers.contract import decode_usage

SECRET = b"s" * 32


def test_a_pseudonym_tells_nothing_and_differs_by_organization_and_secret() -> None:
    found = pseudonym(SECRET, "a" * 32, "jane@example.org")
    assert SHAPE.match(found)
    assert found == pseudonym(SECRET, "a" * 32, "jane@example.org")
    others = [
        (SECRET, "b" * 32, "jane@example.org"),
        (b"t" * 32, "a" * 32, "jane@example.org"),
        (SECRET, "a" * 32, ""),
    ]
    assert found not in [pseudonym(*other) for other in others]
    assert not SHAPE.match("jane")
    assert SHAPE.match("")


async def test_what_a_program_sends_reaches_the_usage_event(redis_url: str, tmp_path: Path) -> None:
    """The header wins over safety_identifier, that over user; the id itself is in no key and no value of Redis."""
    body = {**CHAT, "max_tokens": 2}
    cases = [
        ({}, {}, ""),
        ({"user": "cust-user"}, {}, "cust-user"),
        ({"user": "cust-user", "safety_identifier": "cust-safety"}, {}, "cust-safety"),
        ({"user": "cust-user"}, {"x-corral-end-customer": "cust-header"}, "cust-header"),
    ]
    async with fronted(redis_url, tmp_path) as (gw, front):
        for extra, headers, _ in cases:
            assert (await gw.post({**body, **extra}, **headers)).status_code == 200
        stream = front.config.keys.usage

        async def events() -> list[bytes]:
            return [entry[b"u"] for _, entry in await gw.redis.xrange(stream)]

        async def all_there() -> bool:
            return len(await events()) == len(cases)

        await until(all_there)
        seen = [decode_usage(payload).end_customer for payload in await events()]
        assert seen == [pseudonym(PEPPER, "0" * 32, named) if named else "" for _, _, named in cases]
        assert not any(b"cust-" in payload for payload in await events())


def test_the_api_sums_and_finds_by_the_tenants_own_id(world: World) -> None:
    api, stranger = (
        Api(token_of(each.id, Role.OWNER)) for each in (world.organization, world.other_organization)
    )
    secret, organization = settings.ENV.digest_secret, world.organization.id.hex
    jane = pseudonym(secret, organization, "jane")
    for end_customer in (jane, jane, pseudonym(secret, organization, "joe"), ""):
        book_usage(world, end_customer=end_customer)
    rows = api.get("/usage?group_by=end_customer").body["data"]
    assert {row["group"]: row["n_requests"] for row in rows}[jane] == 2
    assert sum(row["n_requests"] for row in rows) == 4
    assert api.get("/usage?end_customer=jane").body["data"][0]["n_requests"] == 2
    assert len(api.get("/requests?end_customer=joe").body["data"]) == 1
    assert api.get("/usage?end_customer=nobody").body["data"] == []
    assert stranger.get("/usage?end_customer=jane").body["data"] == []


@pytest.mark.django_db
def test_a_machine_cannot_put_text_there() -> None:
    from datetime import UTC, datetime

    from billing.vetting import Delivery, Refusal, vet
    from tests.billing.usage import Tenant, event

    machine = "f" * 32
    told = event(Tenant(), machine, end_customer="jane@example.org")
    assert vet(Delivery(machine, "1-0", b""), told, None, datetime.now(UTC)) is Refusal.OUT_OF_RANGE
    assert not UsageEvent.objects.exists()
