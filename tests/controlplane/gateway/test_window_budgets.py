"""Budgets with windows through the gateway: exact to the token, and a refusal that says when and who."""

import asyncio
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from controlplane.gateway.directory import BudgetRow
from controlplane.gateway.windows import of
from controlplane.policy.periods import Period
from tests.controlplane.gateway.fronted import fronted
from tests.controlplane.gateway.harness import CHAT, KEYS, Machine, Running, until
from tests.controlplane.gateway.test_shared_credit import OUT_NANO, _chat, _cost, _streamed

DAY_MS = 86_400_000


@pytest.mark.parametrize("period", [Period.DAY, Period.ROLLING])
async def test_32_streams_share_the_last_credit_of_a_window_to_the_token(
    redis_url: str, tmp_path: Path, period: Period
) -> None:
    async with fronted(redis_url, tmp_path) as (gw, _):
        gw.key = gw.directory.add_key()
        hours = 24 if period is Period.ROLLING else None
        budget = gw.directory.add_budget(gw.key, limit_nano=3_001, period=period, rolling_hours=hours)
        ended = await asyncio.gather(*(_streamed(gw, _chat(n, 400)) for n in range(32)))

        async def quiet() -> dict[bytes, bytes]:
            found = await gw.redis.hgetall(KEYS.budget(budget))
            return found if found.get(b"n") == b"0" else {}

        counters = await until(quiet)
    assert {finish for finish, _ in ended} == {"budget"}
    spent = sum(_cost(usage) for _, usage in ended)
    assert int(counters[b"spent"]) == spent
    assert counters[b"held"] == counters[b"ask"] == b"0"
    assert 3_001 - OUT_NANO < spent <= 3_001


async def test_a_refusal_names_the_budget_the_reset_and_who_can_raise_it(
    gw: Running, machine: Machine
) -> None:
    gw.key = gw.directory.add_key()
    budget = gw.directory.add_budget(gw.key, limit_nano=100, period=Period.DAY, name="team chat", scope="prj")
    gw.directory.in_window[budget] = {"0": 100}
    response = await gw.post(CHAT)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (
        429,
        "insufficient_quota",
        "insufficient_quota",
    )
    assert f"bud_{budget}" in error["message"] and "'team chat'" in error["message"]
    assert "project" in error["message"] and "owner, admin or billing" in error["message"]
    left_s = (DAY_MS - int(time.time() * 1000) % DAY_MS) / 1000
    assert abs(int(response.headers["retry-after"]) - left_s) < 30
    assert response.headers["x-should-retry"] == "false"
    reset = datetime.fromisoformat(response.headers["x-corral-budget-reset"])
    assert (reset.astimezone(UTC).hour, reset.minute) in ((0, 0), (23, 59))
    assert response.headers["x-corral-budget"] == f"bud_{budget}"


async def test_a_budget_of_one_model_leaves_the_others_alone(gw: Running, machine: Machine) -> None:
    gw.key = gw.directory.add_key(names=("tiny", "other"))
    budget = gw.directory.add_budget(gw.key, limit_nano=0, period=Period.MONTH, model="other")
    assert (await gw.post(CHAT)).status_code == 200
    assert not await gw.redis.exists(KEYS.budget(budget))
    assert (await gw.post(CHAT | {"model": "other"})).status_code == 429


async def test_several_budgets_are_each_seeded_from_the_ledger(gw: Running, machine: Machine) -> None:
    gw.key = gw.directory.add_key()
    week = gw.directory.add_budget(gw.key, limit_nano=10**9, period=Period.WEEK)
    month = gw.directory.add_budget(gw.key, limit_nano=10**9, period=Period.MONTH, scope="org")
    total = gw.directory.add_budget(gw.key, limit_nano=10**9, period=Period.TOTAL, scope="prj")
    for n, budget in enumerate((week, month, total)):
        gw.directory.in_window[budget] = {"0": 1_000 * n}
    assert (await gw.post(CHAT)).status_code == 200

    async def settled() -> bool:
        return all([await gw.redis.hget(KEYS.budget(budget), "n") == b"0" for budget in (week, month, total)])

    await until(settled)
    spent = [int(await gw.redis.hget(KEYS.budget(budget), "spent")) for budget in (week, month, total)]
    assert spent[0] > 0 and [s - spent[0] for s in spent] == [0, 1_000, 2_000]
    gw.directory.up = False  # from here on nothing is asked of Postgres
    assert (await gw.post(CHAT)).status_code == 200


async def test_without_the_ledger_an_unknown_window_is_a_503(gw: Running, machine: Machine) -> None:
    gw.key = gw.directory.add_key()
    gw.directory.add_budget(gw.key, limit_nano=10**9, period=Period.DAY)

    async def away(*_: object) -> dict[str, int]:
        from controlplane.gateway.directory import DirectoryUnavailable

        raise DirectoryUnavailable

    gw.directory.spent_in_window = away  # type: ignore[method-assign]
    response = await gw.post(CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "budget_unavailable")
    assert response.headers["retry-after"]


def test_a_rolling_refusal_says_how_far_it_reaches_back() -> None:
    (budget,) = of(
        [BudgetRow("b" * 32, "team", "key", 5 * 10**9, Period.ROLLING, "Europe/Berlin", rolling_hours=24)]
    )
    message = budget.refusal(7_200_000, 5 * 10**9).message
    assert "$5.00 in 24 hours" in message and "has money again" in message
    assert "run now" in budget.refusal(1_000, 5).message
