"""Limits on end customers through the gateway: of whom they count, what is told, and what they cost who has none."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.gateway.directory import EndCustomerRow, LeaseRow, LimitsRow
from controlplane.tenants.api_keys import lookup_of
from controlplane.tenants.end_customers import pseudonym
from tests.controlplane.gateway.fronted import fronted
from tests.controlplane.gateway.harness import CHAT, KEYS, PEPPER, Machine, Running, until
from tests.controlplane.gateway.test_shared_credit import OUT_NANO, _chat, _cost, _streamed

PROJECT = "1" * 32


def scope_of(named: str) -> str:
    return KEYS.limits("end", f"{PROJECT}.{pseudonym(PEPPER, '0' * 32, named)}")


def limited(gw: Running, **limits: Any) -> None:
    """Every customer of a new key's project."""
    gw.key = gw.directory.add_key()
    gw.directory.limit_ends(gw.key, EndCustomerRow(LimitsRow(**limits)))


async def test_each_customer_has_the_limit_for_itself(gw: Running, machine: Machine) -> None:
    limited(gw, rpm=1)
    for customer in ("ann", "bob"):
        assert (await gw.post(CHAT | {"user": customer})).status_code == 200
    refused = await gw.post(CHAT | {"user": "ann"})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (429, "rate_limit_exceeded")
    assert "requests per minute limit of this end customer (1)" in error["message"]
    assert (refused.headers["x-corral-scope"], refused.headers["x-ratelimit-limit-requests"]) == ("end", "1")
    assert int(refused.headers["retry-after"]) >= 50
    for _ in range(3):  # who names nobody is not limited
        assert (await gw.post(CHAT)).status_code == 200


async def test_a_customers_own_limits_replace_those_of_all(gw: Running, machine: Machine) -> None:
    gw.key = gw.directory.add_key()
    vip = pseudonym(PEPPER, "0" * 32, "vip")
    gw.directory.limit_ends(
        gw.key, EndCustomerRow(LimitsRow(rpm=0)), EndCustomerRow(LimitsRow(rpm=2), customer=vip)
    )
    said = [(await gw.post(CHAT | {"user": name})).status_code for name in ("ann", "vip", "vip", "vip")]
    assert said == [429, 200, 200, 429]


async def test_only_one_at_a_time_and_its_place_is_given_back(gw: Running, machine: Machine) -> None:
    limited(gw, max_concurrency=1, input_tpm=10_000, output_tpm=10_000)
    assert (await gw.post(CHAT | {"user": "ann"})).status_code == 200

    async def settled() -> Any:
        found = await gw.redis.hgetall(scope_of("ann"))
        return found if found.get(b"conc") == b"0" else None

    found = await until(settled)
    assert float(found[b"out"]) > 9_000 and await gw.redis.pttl(scope_of("ann")) > 6 * 3_600_000
    await gw.redis.hset(scope_of("ann"), "conc", 1)
    refused = await gw.post(CHAT | {"user": "ann"})
    assert refused.headers["x-ratelimit-limit-concurrency"] == "1" and "end customer" in refused.text


@pytest.mark.parametrize("own", [True, False])
async def test_32_streams_share_a_customers_last_credit_to_the_token(
    redis_url: str, tmp_path: Path, own: bool
) -> None:
    """Seeded from the ledger, drawn down, topped up, exact; beside a budget of the key's that is larger."""
    async with fronted(redis_url, tmp_path) as (gw, _):
        limits = LimitsRow() if own else LimitsRow(budget_nano=10**9)
        gw.key = gw.directory.add_key(key_limits=limits)
        gw.directory.limit_ends(gw.key, EndCustomerRow(LimitsRow(budget_nano=4_001)))
        gw.directory.spent_for[scope_of("ann").partition("end:")[2]] = 1_000
        ended = await asyncio.gather(*(_streamed(gw, _chat(n, 400) | {"user": "ann"}) for n in range(32)))

        async def quiet() -> dict[bytes, bytes]:
            found = await gw.redis.hgetall(scope_of("ann"))
            return found if found.get(b"conc") == b"0" else {}

        counters = await until(quiet)
        refused = await gw.post(CHAT | {"user": "ann"})
    spent = sum(_cost(usage) for _, usage in ended)
    assert {finish for finish, _ in ended} == {"budget"}
    assert int(counters[b"spent"]) == 1_000 + spent and counters[b"held"] == b"0"
    assert 3_001 - OUT_NANO < spent <= 3_001
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")
    assert "the budget of this end customer is used up" in refused.text


async def test_customers_who_are_refused_leave_nothing_for_ever(gw: Running, machine: Machine) -> None:
    """There may be any number of them, and their money is read before anything else is known."""
    limited(gw, budget_nano=1_000)
    gw.directory.spent_for[scope_of("ann").partition("end:")[2]] = 1_000
    assert (await gw.post(CHAT | {"user": "ann"})).status_code == 429
    assert await gw.redis.hget(scope_of("ann"), "spent") == b"1000"
    assert await gw.redis.pttl(scope_of("ann")) > 6 * 3_600_000


def leased(gw: Running, customer: str, *, most: int, budget_nano: int) -> None:
    """Several cells: of a customer's money this one can have `most`."""
    limited(gw, budget_nano=budget_nano)
    lookup = lookup_of(gw.key)
    assert lookup
    records = gw.directory.records
    records[lookup] = replace(records[lookup], lease=LeaseRow(500_000, 60_000))
    gw.directory.end_leases[scope_of(customer).partition("end:")[2]] = most


@pytest.mark.parametrize("elsewhere", [0, 900])
async def test_a_refused_customer_hears_whether_its_money_is_with_another_cell(
    gw: Running, machine: Machine, elsewhere: int
) -> None:
    leased(gw, "ann", most=1, budget_nano=10**9)
    gw.directory.elsewhere = elsewhere
    for _ in range(4):
        refused = await gw.post(CHAT | {"user": "ann"})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (429, "insufficient_quota")
    assert refused.headers["x-corral-scope"] == "end"
    assert ("with another cell for the moment" in error["message"]) == bool(elsewhere)
    assert ("retry-after" in refused.headers) == bool(elsewhere)
    assert ("x-should-retry" in refused.headers) == (not elsewhere)
    assert gw.directory.n_leased == 1, "the others do not ask again so soon"


async def test_a_lease_is_asked_for_again_when_it_is_over_or_used_up(gw: Running, machine: Machine) -> None:
    leased(gw, "ann", most=10**9, budget_nano=10**9)
    for n, n_tokens in ((1, 100), (1, 100), (2, 1_000)):  # four times as much as the request needs, each time
        assert (await gw.post(CHAT | {"user": "ann", "max_tokens": n_tokens})).status_code == 200
        assert gw.directory.n_leased == n
    await gw.redis.hset(scope_of("ann"), mapping={"until": 1, "lease": 10**9})
    assert (await gw.post(CHAT | {"user": "ann"})).status_code == 200
    assert gw.directory.n_leased == 3
    gw.directory.lease_left_ms = 0  # no share of the tenant's limits any more
    await gw.redis.hset(scope_of("ann"), "until", 1)
    assert (await gw.post(CHAT | {"user": "ann"})).status_code == 503


async def test_32_streams_share_a_leased_credit_to_the_token(redis_url: str, tmp_path: Path) -> None:
    async with fronted(redis_url, tmp_path) as (gw, _):
        leased(gw, "ann", most=3_001, budget_nano=10**9)
        ended = await asyncio.gather(*(_streamed(gw, _chat(n, 400) | {"user": "ann"}) for n in range(32)))
    spent = sum(_cost(usage) for _, usage in ended)
    assert {finish for finish, _ in ended} == {"budget"}
    assert 3_001 - OUT_NANO < spent <= 3_001


async def test_what_runs_is_topped_up_from_a_lease_that_has_grown(redis_url: str, tmp_path: Path) -> None:
    async with fronted(redis_url, tmp_path) as (gw, _):
        leased(gw, "ann", most=400, budget_nano=10**9)
        long = asyncio.ensure_future(_streamed(gw, _chat(0, 400) | {"user": "ann"}))
        await until(lambda: gw.directory.n_leased)
        leases = gw.directory.end_leases
        leases |= dict.fromkeys(leases, 10**9)
        await until(lambda: gw.redis.hget(scope_of("ann"), "held"))
        await gw.redis.hset(scope_of("ann"), "dry", 0)
        assert (await gw.post(_chat(1, 300, stream=False) | {"user": "ann"})).status_code == 200
        finish, usage = await long
    assert (finish, usage["completion_tokens"]) == ("length", 400)


async def test_without_the_ledger_an_unknown_customers_money_is_a_503(gw: Running, machine: Machine) -> None:
    limited(gw, budget_nano=10**9)
    assert (await gw.post(CHAT | {"user": "ann"})).status_code == 200
    gw.directory.up = False
    assert (await gw.post(CHAT | {"user": "ann"})).status_code == 200
    response = await gw.post(CHAT | {"user": "new"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "budget_unavailable")


async def test_a_project_without_such_limits_writes_and_passes_nothing_of_them(
    gw: Running, machine: Machine
) -> None:
    assert (await gw.post(CHAT | {"user": "ann"})).status_code == 200
    assert not [key async for key in gw.redis.scan_iter(KEYS.limits("end", "*"))]
