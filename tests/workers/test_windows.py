"""Window budgets on the real scripts, on a virtual clock of Redis, against a plain model in Python.

Random histories over days with 23 and 25 hours: requests that begin in one window and end in another, top-ups, a Redis
that loses everything, a time zone that changes. A failure prints its seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest
import redis

from controlplane.policy import periods
from controlplane.policy.flows import ANY_MS
from controlplane.policy.periods import Period
from tests.records import expanded
from tests.workers.test_scripts import KEYS, Cell
from workers import scripts
from workers.scripts import Script

HOUR_MS = 3_600_000
# The clocks of Berlin go back on 25 October 2026, those of Santiago skip the midnight of 6 September 2026.
EDGES = (
    datetime(2026, 10, 25, tzinfo=UTC),
    datetime(2026, 9, 6, 3, tzinfo=UTC),
    datetime(2026, 12, 31, 22, tzinfo=UTC),
)
ZONES = ("Europe/Berlin", "America/Santiago", "UTC", "Asia/Kathmandu")
_CLOCK = (
    "(function() local m = tonumber(redis.call('GET', 'clock')) "
    "return {math.floor(m / 1000), m % 1000 * 1000} end)()"
)


def on_clock(client: redis.Redis, script: Script) -> Script:
    """The script by the test's clock."""
    assert "redis.call('TIME')" in script.source
    source = script.source.replace("redis.call('TIME')", _CLOCK)
    return Script(script.name, source, client.script_load(source))


@dataclass
class Budget:
    id: str
    level: int  # 1 key, 2 project, 3 organization
    subject: str
    limit: int
    period: Period
    zone: str
    hours: int = 0

    def blob(self, now_ms: int) -> list[Any]:
        """As a gateway passes it."""
        if self.period is Period.ROLLING:
            cut = periods.buckets(self.hours)
            return [self.id, self.level, self.limit, cut.width_ms, cut.n]
        return [self.id, self.level, self.limit, 0, 0, *periods.edges_ms(self.period, self.zone, now_ms)]

    def window(self, now_ms: int) -> int:
        return periods.window(self.period, self.zone, now_ms, self.hours).counter_ms


@dataclass
class Request:
    id: str
    key: str
    at_ms: int
    n_in: int
    n_out: int
    windows: dict[str, int]
    granted: int
    n: int = 0


@dataclass
class Booked:
    key: str
    at_ms: int
    cost: int


class World:
    """A cell and what the ledger would say. One nano-dollar a prompt token, two an output token."""

    def __init__(self, client: redis.Redis, budgets: list[Budget], now_ms: int) -> None:
        self.cell = Cell(client)
        self.r = client
        self.admit_script, self.topup_script = (on_clock(client, s) for s in (scripts.ADMIT, scripts.TOPUP))
        self.settle_script = scripts.SETTLE
        self.budgets = budgets
        self.ledger: list[Booked] = []
        self.live: dict[str, Request] = {}
        self.n = 0
        self.now_ms = now_ms
        self.move(0)
        self.cell.enrol("r1", slots=10_000)

    def move(self, by_ms: int) -> None:
        self.now_ms += by_ms
        self.r.set("clock", self.now_ms)

    def of(self, key: str) -> list[Budget]:
        return [b for b in self.budgets if b.subject in (key, "p1", "o1")]

    def booked(self, budget: Budget) -> dict[int, int]:
        """What the ledger says was spent in the present window: by bucket, or in all under its start."""
        window = periods.window(budget.period, budget.zone, self.now_ms, budget.hours)
        width = periods.buckets(budget.hours).width_ms if budget.period is Period.ROLLING else 0
        found: dict[int, int] = {}
        for item in self.ledger:
            if budget.subject in (item.key, "p1", "o1") and item.at_ms >= window.start_ms:
                at = item.at_ms - item.at_ms % width if width else window.start_ms
                found[at] = found.get(at, 0) + item.cost
        return found

    def held(self, budget: Budget) -> int:
        """Of requests that count in the present window."""
        present = budget.window(self.now_ms)
        return sum(
            int(expanded(self.r.hgetall(KEYS.request(it.id)))[b"money"])
            for it in self.live.values()
            if budget.id in it.windows
            and (budget.period is Period.ROLLING or it.windows[budget.id] == present)
        )

    def left(self, key: str) -> int | None:
        lefts = [b.limit - sum(self.booked(b).values()) - self.held(b) for b in self.of(key)]
        return min(lefts) if lefts else None

    def admit(self, key: str, n_in: int, n_out: int, *, share: int = 0, skew_ms: int = 0) -> list[Any]:
        self.n += 1
        request = f"q{self.n}"
        blob = [b.blob(self.now_ms + skew_ms) for b in self.of(key)]
        verdict: list[Any] = []
        for _ in range(len(blob) + 1):
            self.r.set(KEYS.body(request), b"BODY")
            scopes = [part for name in (key, "p1", "o1") for part in (name, -1, -1, -1, -1, -1, 100)]
            verdict = self.r.evalsha(
                self.admit_script.sha, 0, KEYS.prefix, self.now_ms + skew_ms, request, "d1", "g1", 7, "pv1", n_in,
                n_out, n_in + 2 * n_out, self.now_ms, 10_000, n_in, 2, "cs:", 0, *scopes, 0, n_out, b"", 0, 60_000,
                share, 0, ANY_MS, 0, "r1",
                *([msgspec.msgpack.encode(blob)] if blob else []),
            )  # fmt: skip
            if verdict[0] != b"seed":
                break
            assert verdict[1] == b"bud"
            self.seed(next(b for b in self.budgets if b.id == verdict[2].decode()), *map(int, verdict[3:5]))
        if verdict[0] == b"bound":
            windows = {b.id: b.window(self.now_ms) for b in self.of(key)}
            self.live[request] = Request(request, key, self.now_ms, n_in, n_out, windows, int(verdict[3]))
        return verdict

    def seed(self, budget: Budget, start_ms: int, end_ms: int) -> int:
        cut = periods.buckets(budget.hours) if budget.period is Period.ROLLING else periods.Buckets(0, 0)
        pairs = [part for pair in self.booked(budget).items() for part in pair]
        return self.cell.run(
            scripts.SEED_WINDOW,
            KEYS.prefix,
            budget.id,
            start_ms,
            end_ms,
            cut.width_ms,
            cut.n,
            86_400_000,
            *pairs,
        )

    def ask(self, it: Request, *, share: int) -> list[Any]:
        lease = KEYS.machine("m1").lease(it.id)
        self.r.hset(lease, "n", it.n)
        answer = self.r.evalsha(
            self.topup_script.sha, 0, KEYS.prefix, it.id, "m1", it.granted, it.n_in, "empty", 1, 2, share
        )
        if answer[0] == b"more":
            it.granted = int(answer[1])
        return answer

    def settle(self, it: Request, cost: int) -> None:
        del self.live[it.id]
        args = (KEYS.prefix, self.now_ms, it.id, it.n_in, it.n, cost, 1_000)
        assert self.cell.run(self.settle_script, *args)[0] == 1
        self.ledger.append(Booked(it.key, it.at_ms, cost))

    def counter(self, budget: Budget) -> dict[str, int]:
        return {k.decode(): int(float(v)) for k, v in self.r.hgetall(KEYS.budget(budget.id)).items()}

    def check(self) -> None:
        """The counters say what the model says, and no window holds more than its limit."""
        for budget in self.budgets:
            counter, booked = self.counter(budget), sum(self.booked(budget).values())
            if counter and counter["win"] == budget.window(self.now_ms):
                assert counter["spent"] == booked, budget
                assert counter["held"] == self.held(budget), budget
            assert booked <= budget.limit, budget


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as found:
        yield found


def history(client: redis.Redis, seed: int, n_steps: int) -> tuple[int, int]:
    """(admitted, refused)."""
    rng = random.Random(seed)
    kinds = [Period.DAY, Period.WEEK, Period.MONTH, Period.ROLLING, Period.TOTAL]
    subjects = [(1, "k1"), (1, "k2"), (2, "p1"), (3, "o1")]
    budgets = [
        Budget(
            f"b{i}", *rng.choice(subjects), rng.randrange(30, 1_500), rng.choice(kinds), rng.choice(ZONES),
            rng.choice([1, 5, 24]),
        )
        for i in range(rng.randrange(1, 4))
    ]  # fmt: skip
    start = rng.choice(EDGES) - timedelta(hours=rng.randrange(12))
    world = World(client, budgets, int(start.timestamp() * 1000))
    n_admitted = n_refused = 0
    for _ in range(n_steps):
        what = rng.random()
        if what < 0.25:
            world.move(rng.choice([rng.randrange(60_000), rng.randrange(HOUR_MS), 5 * HOUR_MS]))
            for it in [it for it in world.live.values() if it.at_ms < world.now_ms - 6 * HOUR_MS]:
                world.move(it.at_ms + 6 * HOUR_MS - world.now_ms)  # nothing lives longer
                world.settle(it, cost=it.n_in + 2 * it.n)
        elif what < 0.6:
            key, share = rng.choice(["k1", "k2"]), rng.choice([0, 4])
            n_in, n_out = rng.randrange(1, 20), rng.randrange(1, 60)
            left = world.left(key)
            verdict = world.admit(key, n_in, n_out, share=share, skew_ms=rng.choice([0, -40_000, 40_000]))
            assert (verdict[0] == b"bound") == (left is None or left >= n_in + 2), (seed, verdict, left)
            n_admitted += verdict[0] == b"bound"
            if verdict[0] == b"refused":
                n_refused += 1
                check_reset(world, verdict, n_in + 2)
        elif what < 0.75 and world.live:
            it = rng.choice(list(world.live.values()))
            it.n = it.granted
            if it.n < it.n_out:
                world.ask(it, share=rng.choice([0, 4]))
        elif what < 0.97 and world.live:
            it = rng.choice(list(world.live.values()))
            it.n = rng.randrange(it.n, it.granted + 1)
            world.settle(it, cost=it.n_in + 2 * it.n)
        elif what >= 0.985:
            client.delete(*client.keys(f"{KEYS.prefix}*"))  # Redis came back empty: what ran is lost
            world.live.clear()
            world.cell.enrol("r1", slots=10_000)
        world.check()
    return n_admitted, n_refused


def check_reset(world: World, verdict: list[Any], least: int) -> None:
    """At the instant the refusal named there is room again, if nothing else happens, and not a moment before."""
    kind, _, name = verdict[2].decode().partition(" ")
    budget = next(b for b in world.budgets if b.id == name)
    retry_ms, now_ms = int(verdict[3]), world.now_ms
    assert kind == "budget" and int(verdict[4]) == budget.limit and retry_ms != 0
    if budget.limit - sum(world.booked(budget).values()) >= least:
        assert retry_ms == 1000  # others hold it
        return
    if budget.limit < least or budget.period is Period.TOTAL:
        assert (retry_ms == -1) == (budget.period is Period.TOTAL)
        return
    world.now_ms = now_ms + retry_ms
    assert budget.limit - sum(world.booked(budget).values()) >= least
    world.now_ms -= 1
    assert budget.limit - sum(world.booked(budget).values()) < least
    world.now_ms = now_ms


def histories(client: redis.Redis, seeds: Iterable[int], n_steps: int) -> tuple[int, int]:
    """Compares step by step; requests admitted and refused in all of them."""
    n_admitted = n_refused = 0
    for seed in seeds:
        client.flushall()
        admitted, refused = history(client, seed, n_steps)
        n_admitted, n_refused = n_admitted + admitted, n_refused + refused
    return n_admitted, n_refused


def test_counters_and_verdicts_are_the_models(client: redis.Redis) -> None:
    n_admitted, n_refused = histories(client, range(100, 105), 120)
    assert n_admitted > 50 and n_refused > 20


@pytest.mark.full
def test_many_histories(client: redis.Redis) -> None:
    n_admitted, n_refused = histories(client, range(100, 160), 300)
    assert n_admitted > 500 and n_refused > 500


def day_budget(limit: int = 100, zone: str = "Europe/Berlin") -> Budget:
    return Budget("b1", 2, "p1", limit, Period.DAY, zone)


def at(zone: str, *when: int) -> int:
    return int(datetime(*when, tzinfo=ZoneInfo(zone)).timestamp() * 1000)  # type: ignore[arg-type,misc]


def test_a_request_counts_in_the_window_it_began_in(client: redis.Redis) -> None:
    world = World(client, [day_budget()], at("Europe/Berlin", 2026, 10, 24, 23, 59, 59))
    assert world.admit("k1", 10, 40)[0] == b"bound"
    assert world.admit("k1", 10, 1)[0] == b"refused"  # 90 of 100 are held
    world.move(2_000)  # midnight
    assert world.admit("k1", 10, 40)[0] == b"bound"
    old, new = world.live.values()
    assert world.counter(world.budgets[0])["held"] == world.counter(world.budgets[0])["pheld"] == 90
    old.n = 40
    world.settle(old, 90)
    counter = world.counter(world.budgets[0])
    assert (counter["pspent"], counter["pheld"], counter["spent"], counter["held"]) == (90, 0, 0, 90)
    new.n = 40
    world.settle(new, 90)
    world.check()


def test_a_day_with_25_hours_is_one_day(client: redis.Redis) -> None:
    world = World(client, [day_budget()], at("Europe/Berlin", 2026, 10, 25, 0, 0, 1))
    assert world.admit("k1", 100, 1)[0] == b"refused"
    assert world.admit("k1", 98, 1)[0] == b"bound"
    (it,) = world.live.values()
    it.n = 1
    world.settle(it, 100)
    verdict = world.admit("k1", 1, 1)
    assert int(verdict[3]) == 25 * HOUR_MS - 1_000
    world.move(24 * HOUR_MS)
    assert world.admit("k1", 1, 1)[0] == b"refused"
    world.move(HOUR_MS)
    assert world.admit("k1", 1, 1)[0] == b"bound"


def test_a_clock_that_goes_back_keeps_the_window(client: redis.Redis) -> None:
    world = World(client, [day_budget()], at("Europe/Berlin", 2026, 10, 24, 23, 59, 59))
    world.admit("k1", 1, 1)
    world.move(1_500)
    world.admit("k1", 1, 1)
    start = world.counter(world.budgets[0])["win"]
    world.move(-1_000)
    assert world.admit("k1", 1, 1)[0] == b"bound"
    assert world.counter(world.budgets[0])["win"] == start


def test_another_time_zone_is_read_from_the_ledger_again(client: redis.Redis) -> None:
    budget = day_budget()
    world = World(client, [budget], at("Europe/Berlin", 2026, 10, 23, 1))
    for _ in range(2):
        world.admit("k1", 10, 10)
        (it,) = world.live.values()
        it.n = 10
        world.settle(it, 30)
        world.move(30 * 60_000)
    assert world.counter(budget)["spent"] == 60
    # Its day began an hour after the first and before the second... both lie in the day before.
    budget.zone = "UTC"
    world.move(60 * 60_000)
    world.admit("k1", 1, 1)
    assert world.counter(budget)["spent"] == sum(world.booked(budget).values()) == 0


def test_the_ledger_trues_up_what_the_counter_missed_and_nothing_that_is_held(client: redis.Redis) -> None:
    budget = day_budget()
    world = World(client, [budget], at("Europe/Berlin", 2026, 10, 23, 1))
    world.admit("k1", 10, 10)
    start = world.counter(budget)["win"]

    def true_up(booked: int) -> int:
        return world.cell.run(scripts.TRUE_UP, KEYS.prefix, budget.id, start, 0, booked)

    assert true_up(30) == 0  # booked before it was settled: that is what is held
    assert true_up(45) == 15
    assert true_up(45) == 0
    (it,) = world.live.values()
    it.n = 10
    world.settle(it, 30)
    counter = world.counter(budget)
    assert (counter["spent"], counter["held"]) == (45, 0)
    # Of another window.
    assert world.cell.run(scripts.TRUE_UP, KEYS.prefix, budget.id, start + 1, 0, 1_000) == 0


def test_seeding_twice_changes_nothing(client: redis.Redis) -> None:
    budget = Budget("b1", 1, "k1", 100, Period.ROLLING, "UTC", 1)
    world = World(client, [budget], at("UTC", 2026, 10, 23, 1))
    world.ledger.append(Booked("k1", world.now_ms - HOUR_MS, 50))
    world.ledger.append(Booked("k1", world.now_ms - 2 * HOUR_MS, 50))
    assert world.admit("k1", 10, 10)[0] == b"bound"
    counter = world.counter(budget)
    assert (counter["spent"], counter["held"]) == (50, 30)
    assert world.seed(budget, counter["win"], counter["end"]) == 0
    assert world.counter(budget) == counter
    world.move(15 * 60_000)
    world.admit("k1", 1, 1)
    assert world.counter(budget)["spent"] == 0  # an hour and the bucket's quarter have passed


def test_money_comes_back_when_its_bucket_has_left_the_window_and_not_a_bucket_sooner(
    client: redis.Redis,
) -> None:
    budget = Budget("b1", 1, "k1", 100, Period.ROLLING, "UTC", 1)
    world = World(client, [budget], at("UTC", 2026, 10, 23, 1, 14))
    assert world.admit("k1", 98, 1)[0] == b"bound"
    (it,) = world.live.values()
    it.n = 1
    world.settle(it, 100)
    for minutes in (15, 15, 15, 15):  # an hour later there is still what was spent within it
        world.move(minutes * 60_000)
        verdict = world.admit("k1", 1, 1)
        assert verdict[0] == b"refused", minutes
    assert int(verdict[3]) == 60_000
    world.move(60_000)
    assert world.admit("k1", 1, 1)[0] == b"bound"
