"""Clients that try to get more than their share, on the real scripts in virtual time: none gains 5 % of service over
an honest tenant of the same weight. `pytest -s tests/workers/test_fair_gaming.py` prints the gains."""

from collections.abc import Iterator

import pytest
import redis

from tests.queueing import CellQueue, Tenant, World

MINUTE_MS = 60_000
HONEST = Tenant("honest", n_outstanding=60)
CHEATS = {
    "behaves as the other does": Tenant("other", n_outstanding=60),
    "ten times the load, long prompts": Tenant("other", n_outstanding=200, n_prompt=(1_000, 4_000)),
    "cancels after the prefill": Tenant("other", n_outstanding=60, cancels_at_first_token=True),
    "cancels after long prefills": Tenant(
        "other", n_outstanding=60, n_prompt=(1_000, 4_000), cancels_at_first_token=True
    ),
    "twenty keys": Tenant("other", n_outstanding=120, n_keys=20),
    "max_tokens far too low, in pieces": Tenant("other", n_outstanding=90, n_output=(300, 300), max_tokens=8),
    "max_tokens far too high": Tenant("other", n_outstanding=60, max_tokens=8_000),
    "answers far longer than predicted": Tenant("other", n_outstanding=60, n_output=(600, 1_500)),
}


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.mark.parametrize("cheat", CHEATS)
def test_cheating_gains_at_most_five_percent_of_service(client: redis.Redis, cheat: str) -> None:
    world = World(CellQueue(client), [HONEST, CHEATS[cheat]], {"r1": 4, "r2": 4})
    minutes = 8 if "longer" in cheat else 2
    world.run((1 + minutes) * MINUTE_MS, warm_up_ms=MINUTE_MS)
    gain = world.ratio("other", "honest") - 1
    print(f"{cheat}: gains {gain:+.1%} in {minutes} minutes")
    assert gain <= 0.05
    assert gain >= -0.05, "and who happens to be like that loses nothing either"
    assert world.idle_while_waiting == 0
    assert world.service["honest"] > 0


def test_two_backlogged_tenants_are_served_by_weight_within_a_minute(client: redis.Redis) -> None:
    one, other = (
        Tenant("one", weight=200, n_outstanding=60),
        Tenant("other", n_outstanding=60, n_prompt=(500, 2_000)),
    )
    world = World(CellQueue(client), [one, other], {"r1": 4, "r2": 4}).run(
        2 * MINUTE_MS, warm_up_ms=MINUTE_MS
    )
    assert world.ratio("one", "other") == pytest.approx(2.0, rel=0.05)
