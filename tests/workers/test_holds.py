"""Reserve, draw down, top up, settle: random interleavings of everything that moves money, on the real scripts.

After every step no budget is exceeded; at the end nothing is held, nobody is counted as running or waiting, and what
is spent is the sum of what was settled. A failure prints its seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis

from billing.money import TOKENS_PER_RATE, NanoPerMillion, Rates, request_cost, worst_case_cost
from controlplane.policy.flows import ANY_MS
from tests.records import expanded
from tests.workers.test_scripts import KEYS, Cell
from workers import scripts

# Fractions of a nano-dollar a token, so that every rounding is met.
RATES = Rates(NanoPerMillion(1_300_000), NanoPerMillion(700_000), NanoPerMillion(2_700_001))
OUT = RATES.output / TOKENS_PER_RATE
BUDGETS = {"k1": "key", "k2": "key", "p1": "prj", "o1": "org"}


@dataclass
class Request:
    """One request as its replica and gateway see it."""

    id: str
    key: str
    n_in: int  # estimated
    n_out: int
    share: int
    exact: int
    granted: int = 0
    n: int = 0
    epoch: int = 0
    replica: str = ""
    machine: str = ""
    claimed: bool = False
    over: bool = False
    charge: list[int] = field(default_factory=list)  # n_in, n_out, cost once it has ended

    @property
    def allowed(self) -> int:
        """What workers.attempt.Run.n_paid says before the gateway has counted the exact prompt."""
        excess = max(self.exact - self.n_in, 0)
        return self.granted - -(-excess * RATES.input // RATES.output)


class History:
    """A cell under random use. The honest machine produces only what it is allowed."""

    def __init__(self, cell: Cell, seed: int) -> None:
        self.cell = cell
        self.rng = random.Random(seed)
        self.requests: list[Request] = []
        self.spent = dict.fromkeys(BUDGETS, 0)
        self.budgets = {name: self.rng.choice([-1, self.rng.randrange(40, 1200)]) for name in BUDGETS}
        self.n_replicas = 0
        self.told: set[str] = set()  # whose prompt was counted by a top-up: `granted` is exact from then on
        for name, scope in BUDGETS.items():
            cell.run(scripts.SEED, KEYS.prefix, scope, name, 0)
        self.replica = self._enrol()

    def _enrol(self) -> str:
        self.n_replicas += 1
        name = f"r{self.n_replicas}"
        self.cell.enrol(name, f"m{self.n_replicas}", slots=6)
        return name

    def step(self) -> None:
        self.cell.now_ms += self.rng.randrange(200)
        live = [r for r in self.requests if not r.over]
        kinds: list[Any] = [self.admit] * 2
        kinds += [self.serve] * 8 if live else []
        kinds += [self.settle_again] if self.requests else []
        kinds += [self.cancel] if live and self.rng.random() < 0.3 else []
        kinds += [self.lose_replica] if self.rng.random() < 0.1 else []
        self.rng.choice(kinds)()
        self.check_budgets()

    def admit(self) -> None:
        rng = self.rng
        n_in, n_out = rng.randrange(1, 30), rng.randrange(1, 40)
        made = Request(
            f"q{len(self.requests)}", rng.choice(["k1", "k2"]), n_in, n_out, rng.choice([0, 4, 64]),
            max(1, n_in + rng.choice([0, 0, -3, 5, 20])),
        )  # fmt: skip
        budgets = {
            f"{scope}_budget": self.budgets[n] for n, scope in BUDGETS.items() if n in (made.key, "p1", "o1")
        }
        self.cell.r.set(KEYS.body(made.id), b"BODY")
        scopes: list[Any] = []
        for scope, name in (("key", made.key), ("prj", "p1"), ("org", "o1")):
            scopes += [name, -1, -1, -1, -1, budgets[f"{scope}_budget"], 100]
        verdict = self.cell.run(
            scripts.ADMIT, KEYS.prefix, self.cell.now_ms, made.id, "d1", "g1", 7, "pv1", n_in, n_out,
            worst_case_cost(RATES, n_prompt=n_in, n_completion=n_out), self.cell.now_ms, 100,
            n_in * RATES.input / TOKENS_PER_RATE, OUT, "cs:", 0, *scopes, 0, n_out, b"", 0, 60_000, made.share,
            0, ANY_MS, 0, self.replica,
        )  # fmt: skip
        if verdict[0] in (b"bound", b"queued"):
            made.granted = int(verdict[3])
            assert 1 <= made.granted <= n_out
            self.requests.append(made)
        else:
            assert verdict[0] == b"full" or verdict[:3:2] == [b"refused", b"budget"], verdict

    def serve(self) -> None:
        """One thing that a replica does for one of its requests."""
        it = self.rng.choice([r for r in self.requests if not r.over])
        state, rid, mid, epoch = self.cell.r.hmget(KEYS.request(it.id), "state", "rid", "mid", "epoch")
        if state != b"bound":
            return
        if not it.claimed or it.epoch != int(epoch):
            it.replica, it.machine, it.epoch, it.claimed = rid.decode(), mid.decode(), int(epoch), True
            claim = self.cell.claim(it.id, it.epoch, it.replica, it.machine)
            assert claim[0] in (b"ok", b"cancelled"), claim
            it.n, it.granted = int(claim[4]), int(claim[4]) + int(claim[5])
            return
        counted = it.id in self.told or all(self.budgets[name] < 0 for name in (it.key, "p1", "o1"))
        allowed = it.granted if counted else it.allowed
        what = self.rng.random()
        if what < 0.35 and allowed > it.n:
            n = self.rng.randrange(1, min(allowed - it.n, 5) + 1)
            assert self.cell.flush((it.id, it.epoch, it.n, n, False), machine=it.machine) in (b"a", b"c")
            it.n += n
        elif what < 0.8 and allowed < it.n_out:
            self.ask(it, empty=allowed <= it.n)
        elif what > 0.9:
            self.end(it)

    def ask(self, it: Request, *, empty: bool) -> None:
        answer = self.cell.run(
            scripts.TOPUP, KEYS.prefix, it.id, it.machine, it.granted, it.exact, "empty" if empty else "soon",
            RATES.input / TOKENS_PER_RATE, OUT, it.share,
        )  # fmt: skip
        if answer[0] == b"more":
            assert self.cell.r.hget(KEYS.request(it.id), "asks") != b"1", "who can go on does not wait"
        if answer[0] == b"more" and self.rng.random() < 0.8:  # else the answer is lost
            it.granted = int(answer[1])
            self.told.add(it.id)
        if answer[0] == b"final":
            held = int(expanded(self.cell.r.hgetall(KEYS.request(it.id)))[b"money"])
            one_more = (it.exact * RATES.input + (it.n + 1) * RATES.output) / TOKENS_PER_RATE
            assert held + self.left(it) < one_more, "told to end with money left for a token"
            self.end(it, n=min(it.n, int(answer[1])))
        elif answer[0] == b"wait" and empty:
            unsettled = [r for r in self.requests if self.cell.r.hget(KEYS.request(r.id), "state") != b"done"]
            assert len(unsettled) > 1, "waits for nobody"

    def left(self, it: Request) -> int:
        found = [
            self.budgets[name] - sum(int(v or 0) for v in self.cell.r.hmget(KEYS.limits(scope, name), "spent", "held"))
            for name, scope in BUDGETS.items() if name in (it.key, "p1", "o1") and self.budgets[name] >= 0
        ]  # fmt: skip
        return min(found)

    def end(self, it: Request, n: int | None = None) -> None:
        assert n is None or n == it.n, "it was told to end with less than it has shown"
        n_in = it.exact if it.n else 0
        cost = request_cost(RATES, n_prompt=n_in, n_cached=0, n_completion=it.n)
        it.charge = [n_in, it.n, cost]
        if any(self.budgets[name] >= 0 for name in (it.key, "p1", "o1")):
            assert cost <= int(expanded(self.cell.r.hgetall(KEYS.request(it.id)))[b"money"]), (
                "costs more than was held"
            )
        self.cell.flush((it.id, it.epoch, it.n, 0, True), machine=it.machine)
        it.over = True
        if self.rng.random() < 0.8:  # else its gateway has died, and intake settles it in the end
            self.settle(it)

    def settle(self, it: Request) -> None:
        if self.cell.settle(it.id, *it.charge)[0] == 1:
            for name in (it.key, "p1", "o1"):
                self.spent[name] += it.charge[2]

    def settle_again(self) -> None:
        it = self.rng.choice(self.requests)
        if it.over:
            self.settle(it)

    def cancel(self) -> None:
        it = self.rng.choice([r for r in self.requests if not r.over])
        if self.cell.run(scripts.CANCEL, KEYS.prefix, self.cell.now_ms, it.id) == b"queued":
            it.over, it.charge = True, [0, 0, 0]
            self.settle(it)

    def lose_replica(self) -> None:
        """It dies; what it ran goes to another one, however often it was the reason (no poison here)."""
        dead, self.replica = self.replica, self._enrol()
        self.cell.withdraw(dead, deaths=1_000)
        given_up = {name.decode() for name in self.cell.r.smembers(KEYS.failed)}
        for it in self.requests:
            if it.id in given_up and not it.over:  # its client had left: the watcher settles it at nothing
                it.over, it.charge = True, [0, 0, 0]
                self.settle(it)

    def check_budgets(self) -> None:
        for name, scope in BUDGETS.items():
            counters = self.cell.limit(scope, name)
            spent, held = int(counters[b"spent"]), int(counters.get(b"held", 0))
            assert held >= 0
            if self.budgets[name] >= 0:
                assert spent + held <= self.budgets[name], (name, counters)

    def finish(self) -> None:
        for _ in range(10_000):
            live = [r for r in self.requests if not r.over]
            if not live:
                break
            self.cell.now_ms += 1
            self.serve()
            self.settle_again()
            if all(self.cell.r.hget(KEYS.request(r.id), "state") == b"queued" for r in live):
                self._enrol()
        for it in self.requests:
            self.settle(it)
        for name, scope in BUDGETS.items():
            counters = self.cell.limit(scope, name)
            assert int(counters.get(b"conc", 0)) == 0
            assert int(counters.get(b"held", 0)) == 0 or self.budgets[name] < 0
            assert int(counters.get(b"ask", 0)) == 0
            assert (
                int(counters[b"spent"])
                == self.spent[name]
                == sum(r.charge[2] for r in self.requests if name in (r.key, "p1", "o1"))
            )


@pytest.fixture
def cell(redis_url: str) -> Iterator[Cell]:
    with redis.Redis.from_url(redis_url) as client:
        yield Cell(client)


@pytest.mark.parametrize("seed", range(12))
def test_money_is_exact_whatever_happens_in_which_order(cell: Cell, seed: int) -> None:
    history = History(cell, seed)
    for _ in range(200):
        history.step()
    history.finish()
    assert len(history.requests) >= 2


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100, 160))
def test_money_is_exact_over_many_histories(cell: Cell, seed: int) -> None:
    history = History(cell, seed)
    for _ in range(500):
        history.step()
    history.finish()
    assert len(history.requests) >= 2
