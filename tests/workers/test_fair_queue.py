"""The fair queue in the cell and its twin in Python, held together on random histories: every answer and the whole
visible state after every step. A failure prints its seed and the steps that led there."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis

from controlplane.policy.fairness import AGE_FOLLOWS, AGE_MOST, FairQueue
from controlplane.policy.flows import ANY_MS, Flow, Request
from controlplane.policy.prefix import mark_of
from workers import scripts
from workers.keys import RETENTION_MS, CellKeys

KEYS = CellKeys("t0")
Q = f"{KEYS.prefix}dep:d1:"
NOW_MS = 1_800_000_000_000
NO_LIMIT = -1
SPAN = 10**13

TENANTS = [("o1", "p1", "k1"), ("o1", "p1", "k2"), ("o1", "p2", "k3"), ("o2", "p3", "k4"), ("o2", "p3", "k5"),
           ("o3", "p4", "k6"), ("o4", "p5", "k7")]  # fmt: skip
WEIGHTS = {"o1": 100, "o2": 200, "o3": 50, "p1": 300, "p2": 7, "k1": 100, "k2": 33}


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        for script in scripts.TRUSTED_SCRIPTS:
            assert client.script_load(script.source) == script.sha
        yield client


@dataclass
class Step:
    """One call of the cell with what the twin says of it."""

    text: str
    script: scripts.Script
    args: list[Any]
    answer: Any
    bindings: list[tuple[str, str]]
    state: dict[str, Any]


@dataclass
class History:
    """Random things that happen to a twin, as calls for the cell."""

    seed: int
    twin: FairQueue = field(init=False)
    steps: list[Step] = field(default_factory=list)
    now_ms: int = NOW_MS

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        window = self.rng.choice([0, 0, 200_000, 3_000_000])
        self.twin = FairQueue(bound=self.rng.choice([4, 12, 40]), window=window, age_ms=2_000)
        self.n = 0
        self.lost: list[str] = []

    def step(self) -> None:
        self.now_ms += self.rng.choice([0, 1, 5, 40, 700])
        waiting = [r.id for r in self.twin.requests.values() if not r.replica]
        bound = [r.id for r in self.twin.requests.values() if r.replica]
        kinds = [self.arrive] * 6 + [self.join] + [self.sweep]
        kinds += [self.settle] * 5 + [self.misplace] if bound else []
        kinds += [self.resize] if self.twin.replicas else []
        kinds += [self.produce] * 2 if bound else []
        kinds += [self.cancel] if waiting else []
        kinds += [self.drain, self.lose] if len(self.twin.replicas) > 2 else []
        self.rng.choice(kinds)()

    def arrive(self) -> None:
        rng, twin = self.rng, self.twin
        self.n += 1
        org, project, key = rng.choice(TENANTS)
        weights = tuple(WEIGHTS.get(name, 100) for name in (org, project, key))
        prefixes = tuple(f"{c}{org}{'x' * 8}"[:8] for c in "abcd"[: rng.randrange(5)])
        if rng.random() < 0.3:
            prefixes = (mark_of(f"{rng.randrange(3):08d}"), *prefixes)
        request = Request(
            f"q{self.n:05d}", Flow(rng.choice([0, 0, 0, 1, 3]), org, project, key, weights),  # type: ignore[arg-type]
            self.now_ms + rng.randrange(3000), rng.randrange(1, 400), rng.randrange(1, 200), prefixes,
            rng.choice([0, 1, 40, 900]),
        )  # fmt: skip
        most_ms = rng.choice([ANY_MS, ANY_MS, 2_000, 300, 0, -1])
        candidates = tuple(name for name in sorted(twin.replicas) if rng.random() < 0.7)
        ahead_ms = twin.flows.ahead_ms(request.flow)
        own_ms = rng.choice([-1, 0, 500, 3_000])
        verdict, bindings = twin.admit(
            request, self.now_ms, candidates, most_ahead_ms=most_ms, most_own_ms=own_ms
        )
        scopes: list[Any] = []
        for scope_id, weight in zip((key, project, org), reversed(weights), strict=True):
            scopes += [scope_id, *[NO_LIMIT] * 5, weight]
        args = [
            request.id, "d1", "g1", 7, "pv1", request.n_prompt, 10_000, 0, request.order_key, twin.bound, 0,
            0, "", 0, *scopes,
            request.flow.band, request.n_expected, "".join(prefixes), twin.flows.window, twin.age_ms, 0,
            request.slot_ms, most_ms, own_ms, *candidates,
        ]  # fmt: skip
        text = f"arrive {request} {candidates} {ahead_ms} of {most_ms}"
        self._note(text, scripts.ADMIT, args, (verdict, ahead_ms), bindings)

    def settle(self) -> None:
        request = self.rng.choice([r for r in self.twin.requests.values() if r.replica])
        n_prompt = self.rng.choice([request.n_prompt, self.rng.randrange(600)])
        n_cached = self.rng.randrange(n_prompt + 1)
        n_output = self.rng.choice([0, request.n_expected, self.rng.randrange(500)])
        self._settle(request.id, n_prompt, n_cached, n_output)

    def cancel(self) -> None:
        request = self.rng.choice([r for r in self.twin.requests.values() if not r.replica])
        self.twin.cancel(request.id)
        self._note(f"cancel {request.id}", scripts.CANCEL, [request.id], "queued", [])
        self._settle(request.id, 0, 0, 0)

    def _settle(self, request: str, n_prompt: int, n_cached: int, n_output: int) -> None:
        bindings = self.twin.settle(
            request, self.now_ms, n_prompt=n_prompt, n_cached=n_cached, n_output=n_output
        )
        args = [request, n_prompt, n_output, 0, RETENTION_MS, n_cached]
        text = f"settle {request} {n_prompt} {n_cached} {n_output}"
        self._note(text, scripts.SETTLE, args, [1, len(bindings)], bindings)

    def produce(self) -> None:
        request = self.rng.choice([r for r in self.twin.requests.values() if r.replica])
        n_output = self.rng.randrange(400)
        grows = n_output > request.n_expected and bool(request.charged or len(self.twin))
        self.twin.produced(request.id, n_output)
        self._note(f"produce {request.id} {n_output}", scripts.CHARGE, [request.id, n_output], int(grows), [])

    def join(self) -> None:
        twin = self.twin
        name = (
            f"r{self.n:05d}{len(self.steps)}"
            if len(twin.replicas) < 4
            else self.rng.choice(sorted(twin.replicas))
        )
        slots = self.rng.randrange(1, 4)
        bindings = twin.enrol(name, slots, self.now_ms)
        self._note(f"enrol {name} {slots}", scripts.ENROL, [name, "m1", "d1", slots], len(bindings), bindings)

    def resize(self) -> None:
        name = self.rng.choice(sorted(self.twin.replicas))
        replica = self.twin.replicas[name]
        before, slots = replica.slots, self.rng.randrange(4)
        if not replica.routed:
            self._note(f"resize {name}", scripts.RESIZE, [name, before, slots, "why"], -1, [])
            return
        bindings = self.twin.enrol(name, slots, self.now_ms)
        args = [name, before, slots, "why"]
        self._note(f"resize {name} {before} {slots}", scripts.RESIZE, args, len(bindings), bindings)

    def misplace(self) -> None:
        """Messages lost on the way to a live replica."""
        replica = self.rng.choice([r.replica for r in self.twin.requests.values() if r.replica])
        running = sorted(self.twin.replicas[replica].running)
        lost = self.rng.sample(running, self.rng.randint(1, len(running)))
        bindings = self.twin.requeue(replica, lost, self.now_ms)
        n_live = len(self.twin.replicas[replica].running)
        args = [replica, "lost", 1, "", *lost]
        self._note(f"misplace {lost}", scripts.WITHDRAW, args, [len(lost), n_live, 0], bindings)

    def drain(self) -> None:
        name = self.rng.choice(sorted(self.twin.replicas))
        self.twin.drain(name)
        n_live = len(self.twin.replicas[name].running)
        self._note(f"drain {name}", scripts.WITHDRAW, [name, "drain", 1], [0, n_live, 0], [])

    def lose(self) -> None:
        name = self.rng.choice(sorted(self.twin.replicas))
        n = len(self.twin.replicas[name].running)
        bindings = self.twin.lose(name, self.now_ms)
        del self.twin.replicas[name]
        self.lost.append(name)
        self._note(f"lose {name}", scripts.WITHDRAW, [name, "dead", 1], [n, 0, 0], bindings)

    def sweep(self) -> None:
        self.twin.flows.sweep()
        self._note("sweep", scripts.SWEEP, ["d1", 0, 1000], None, [])

    def _note(
        self, text: str, script: scripts.Script, args: list[Any], answer: Any, bindings: list[tuple[str, str]]
    ) -> None:
        first = [KEYS.prefix] if script is scripts.CHARGE else [KEYS.prefix, self.now_ms]
        state = twin_state(self.twin)
        state["used"] |= dict.fromkeys(self.lost[-3:], 0)
        self.steps.append(Step(text, script, [*first, *args], answer, bindings, state))


def twin_state(twin: FairQueue) -> dict[str, Any]:
    """All that the queue shows, in the cell's own names."""
    levels, flows = "opk", twin.flows
    counters = {
        f"{band}{levels[level]}{parent}{':' if parent else ''}{name}": value
        for ((level, band, parent), name), value in flows.counters.items()
    }
    counters |= {
        f"{band}{levels[level].upper()}{parent}": v for (level, band, parent), v in flows.left.items()
    }
    counters |= {f"n{org}": n for org, n in flows.n_waiting.items()}
    for letter, sums in (("m", flows.slot_ms), ("c", flows.cost)):
        counters |= {
            f"{letter}{band}{levels[level]}{parent}{':' if parent else ''}{name}": value
            for ((level, band, parent), name), value in sums.items()
        }
    counters |= {f"m{band}": value for band, value in flows.band_ms.items()}
    if twin.turn:
        counters["t"] = twin.turn
    if twin.usual_wait_ms:
        counters["u"] = twin.usual_wait_ms
    active = {
        f"{levels[level]}:{band}{':' if parent else ''}{parent}": ranking.items()
        for (level, band, parent), ranking in flows.active.items()
        if ranking
    }
    q: dict[str, int] = {}
    for name, requests in twin.waiting().items():
        if name == "resumed":
            q |= {request: at_ms - SPAN for request, at_ms in requests.items()}
        elif ":" in name:
            active[f"r:{name}"] = requests
        else:
            q |= {request: int(name) * SPAN + at_ms for request, at_ms in requests.items()}
    if q:
        active["q"] = q
    used = {name: len(replica.running) for name, replica in twin.replicas.items()}
    prefixes = {
        name: replica.prefixes.items() for name, replica in twin.replicas.items() if replica.prefixes.items()
    }
    return {"v": counters, "sets": active, "used": used, "px": prefixes}


DUMP = """
local P, Q, out = ARGV[1], ARGV[2], {v = {}, sets = {}, used = {}, px = {}}
local function scores(key)
  local found, e = {}, redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  for i = 1, #e, 2 do found[e[i]] = string.format('%.0f', e[i + 1]) end
  return found
end
local v = redis.call('HGETALL', Q .. 'v')
for i = 1, #v, 2 do
  local is_unset = (v[i] == 't' or v[i] == 'u') and v[i + 1] == '0'
  if v[i] ~= 'w' and v[i] ~= 'a' and not is_unset then out.v[v[i]] = v[i + 1] end
end
for _, key in ipairs(redis.call('KEYS', Q .. '*')) do
  local name = string.sub(key, #Q + 1)
  if name ~= 'v' and name ~= 'reps' then out.sets[name] = scores(key) end
end
for i = 3, #ARGV do
  out.used[ARGV[i]] = redis.call('HGET', P .. 'rep:' .. ARGV[i], 'used')
  local px = P .. 'rep:' .. ARGV[i] .. ':px'
  if redis.call('EXISTS', px) == 1 then out.px[ARGV[i]] = scores(px) end
end
return cjson.encode(out)
"""


def cell_state(raw: bytes) -> dict[str, Any]:
    """The dump with its numbers as integers (they travel as text: cjson would round)."""

    def numbers(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: numbers(part) for name, part in value.items()}
        return {} if isinstance(value, list) else int(value)

    return numbers(json.loads(raw))  # type: ignore[no-any-return]


def check(client: redis.Redis, history: History) -> None:
    """Run the whole history in the cell, in a few round trips, and compare step by step."""
    dump = client.script_load(DUMP)
    sent: list[Step] = []
    pipeline = client.pipeline(transaction=False)
    for step in history.steps:
        if step.script is scripts.ADMIT:
            pipeline.set(KEYS.body(step.args[2]), b"BODY")
        pipeline.evalsha(step.script.sha, 0, *step.args)
        for request, _ in step.bindings:
            pipeline.hget(KEYS.request(request), "rid")
        pipeline.evalsha(dump, 0, KEYS.prefix, Q, *step.state["used"])
        sent.append(step)
    answers = iter(pipeline.execute(raise_on_error=False))
    for i, step in enumerate(sent):
        if step.script is scripts.ADMIT:
            next(answers)
        answer = next(answers)
        rids = [next(answers) for _ in step.bindings]
        raw = next(answers)
        where = (
            f"seed {history.seed}, step {i}: {step.text}\nbefore: {[s.text for s in sent[max(0, i - 8) : i]]}"
        )
        assert not isinstance(answer, Exception), f"{where}\n{answer}"
        assert not isinstance(raw, Exception), f"{where}\n{raw}"
        if step.script is scripts.ADMIT:
            verdict, ahead_ms = step.answer
            assert answer[0].decode() == verdict, where
            if verdict in ("queued", "late"):
                assert answer[4 if verdict == "queued" else 2] == ahead_ms, where
        elif step.script is scripts.CANCEL:
            assert answer.decode() == step.answer, where
        elif step.answer is not None:
            assert answer == step.answer, where
        assert [(rid or b"").decode() for rid in rids] == [replica for _, replica in step.bindings], where
        assert cell_state(raw) == step.state, where


def compared(client: redis.Redis, seed: int, n_steps: int) -> int:
    history = History(seed)
    while len(history.steps) < n_steps:
        history.step()
    check(client, history)
    return len(history.steps)


@pytest.mark.parametrize("seed", range(16))
def test_the_cell_does_what_the_twin_does(client: redis.Redis, seed: int) -> None:
    assert compared(client, seed, 700) >= 700


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1_000, 1_030))
def test_the_cell_does_what_the_twin_does_for_long(client: redis.Redis, seed: int) -> None:
    assert compared(client, seed, 3_000) >= 3_000


def test_histories_meet_every_kind_of_step_and_state() -> None:
    """A history that never queues, resumes or ages anything would prove nothing."""
    texts: set[str] = set()
    states: set[str] = set()
    for seed in range(16):
        history = History(seed)
        while len(history.steps) < 700:
            history.step()
        for step in history.steps:
            texts.add(step.text.split()[0])
            texts |= {f"{step.text.split()[0]}>{len(step.bindings)}"} if step.bindings else set()
            texts |= {step.answer[0]} if isinstance(step.answer, tuple) else set()
            states |= {f"turn {step.state['v']['t']}"} if "t" in step.state["v"] else set()
            usual_ms = step.state["v"].get("u", 0)
            states |= {"waits above an age"} if AGE_FOLLOWS * usual_ms > history.twin.age_ms else set()
            states |= (
                {"waits at the bound"} if AGE_FOLLOWS * usual_ms > AGE_MOST * history.twin.age_ms else set()
            )
            states |= (
                {"resumed"} if any(score < 0 for score in step.state["sets"].get("q", {}).values()) else set()
            )
            states |= {f"{len(step.state['sets'].get('o:0', {}))} organizations"}
    kinds = {"arrive", "settle", "cancel", "produce", "enrol", "resize", "drain", "lose", "misplace", "sweep"}
    assert kinds <= texts
    assert {"bound", "queued", "full", "late", "settle>1", "enrol>2", "lose>1", "resize>1"} <= texts
    assert {"turn 7", "resumed", "4 organizations", "waits above an age", "waits at the bound"} <= states
