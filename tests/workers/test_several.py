"""Admissions and settlements in one call leave what they would have left one by one, and answer the same."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import redis

from controlplane.policy.flows import ANY_MS
from workers import scripts
from workers.keys import RETENTION_MS, CellKeys

KEYS = CellKeys("t0")
NOW_MS = 1_760_000_000_000
HUGE = 1 << 53  # nano-dollars: beyond what a double holds exactly

Step = tuple[str, list[Any]]


@pytest.fixture
def r(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        for script in scripts.TRUSTED_SCRIPTS:
            client.script_load(script.source)
        yield client


def an_admission(dice: random.Random, request: str, now_ms: int) -> list[Any]:
    """All arguments of admit.lua: tight limits of every kind, few tenants, few slots."""
    scopes: list[Any] = []
    tenant = dice.choice(("a", "b"))
    for scope_id in (f"k{tenant}{dice.randrange(2)}", f"p{tenant}", f"o{tenant}"):
        budget = dice.choice((-1, 2_000, 100_000, 3 * HUGE))
        per_minute = [dice.choice((-1, *caps)) for caps in ((60, 6_000), (500, 90_000), (900, 90_000))]
        scopes += [scope_id, *per_minute, dice.choice((-1, 3, 50)), budget, dice.choice((50, 100))]
    n_out, rate = dice.randint(1, 60), dice.choice((0, 7, 2.5))
    n_in = dice.randint(1, 200)
    money = n_in + int(n_out * rate) + 1
    return [KEYS.prefix, now_ms, request, "d1", "g1", dice.randrange(9), "pv", n_in, n_out, money, now_ms, 6, n_in,
            rate, "cs:", 0, *scopes, dice.randrange(3), dice.randint(1, 60), "", 2_000, 5_000, dice.choice((0, 4)),
            dice.choice((0, 70)), dice.choice((ANY_MS, 200)), 5,
            *dice.sample(["r1", "r2"], dice.randrange(3))]  # fmt: skip


def a_history(dice: random.Random) -> list[list[Step]]:
    """Groups of steps that happen in one instant each."""
    groups, known, now_ms = [], ["unknown"], NOW_MS
    for _ in range(30):
        now_ms += dice.randrange(4_000)
        if dice.random() < 0.6:
            group: list[Step] = []
            for _ in range(dice.randint(1, 6)):
                request = f"q{len(known)}" if dice.random() < 0.95 else dice.choice(known)
                known.append(request)
                group.append(("admit", an_admission(dice, request, now_ms)))
        else:
            group = [
                ("settle", [KEYS.prefix, now_ms, dice.choice(known), dice.randint(0, 200), dice.randint(0, 60),
                            dice.choice((0, 300, HUGE)), RETENTION_MS, 0])
                for _ in range(dice.randint(1, 6))
            ]  # fmt: skip
        groups.append(group)
    return groups


def a_pass(r: redis.Redis, group: list[Step], *, bodies: dict[str, bytes] | None = None) -> list[Any]:
    """pass.lua with the settlements and then the admissions of a group."""
    settled = [args for kind, args in group if kind == "settle"]
    flat = [arg for args in settled for arg in (*args[2:6], args[7])]
    given = msgspec.msgpack.encode([*settled[0][:2], settled[0][6], *flat]) if settled else b""
    admitted = [
        part
        for kind, args in group
        if kind == "admit"
        for part in (msgspec.msgpack.encode([str(arg) for arg in args]), (bodies or {}).get(args[2], b""))
    ]
    return list(r.evalsha(scripts.PASS.sha, 0, given, 60_000, *admitted))


def begin(r: redis.Redis, dice: random.Random) -> None:
    r.flushdb()
    for replica in ("r1", "r2"):
        r.evalsha(scripts.ENROL.sha, 0, KEYS.prefix, NOW_MS, replica, "m1", "d1", 4)
    for scope_id in ("ka0", "ka1", "kb0", "kb1", "pa", "pb", "oa", "ob"):
        scope = {"k": "key", "p": "prj", "o": "org"}[scope_id[0]]
        if dice.random() < 0.8:
            spent = dice.choice((0, 1_000, HUGE))
            r.evalsha(scripts.SEED.sha, 0, KEYS.prefix, scope, scope_id, spent)


def store_bodies(r: redis.Redis, group: list[Step], dice: random.Random) -> None:
    for kind, args in group:
        if kind == "admit" and dice.random() < 0.95:
            r.set(KEYS.body(args[2]), "BODY")


def everything(r: redis.Redis) -> dict[bytes, object]:
    readers = {
        b"string": r.get,
        b"hash": r.hgetall,
        b"list": lambda key: r.lrange(key, 0, -1),
        b"set": r.smembers,
        b"zset": lambda key: r.zrange(key, 0, -1, withscores=True),
    }
    return {key: (readers[r.type(key)](key), r.pttl(key) > 0) for key in r.scan_iter()}


@pytest.mark.parametrize("seed", range(12))
def test_together_is_the_same_as_one_by_one(r: redis.Redis, seed: int) -> None:
    history = a_history(random.Random(seed))

    def one_by_one(group: list[Step]) -> list[Any]:
        script = {"admit": scripts.ADMIT, "settle": scripts.SETTLE}
        return [r.evalsha(script[kind].sha, 0, *args) for kind, args in group]

    def together(group: list[Step]) -> list[Any]:
        faults, _, *answers = a_pass(r, group)
        assert not faults
        return answers

    seen = []
    for run in (one_by_one, together):
        dice = random.Random(seed)
        begin(r, dice)
        states = []
        for group in history:
            store_bodies(r, group, dice)
            answers = run(group)
            if group[0][0] == "settle" and run is one_by_one:
                answers = []
            states.append((answers, everything(r)))
        seen.append(states)
    verdicts = {answer[0] for answers, _ in seen[0] for answer in answers if isinstance(answer, list)}
    assert {b"bound", b"refused"} <= verdicts
    for n, (alone, joint) in enumerate(zip(*seen, strict=True)):
        assert joint[0] == alone[0], f"answers of group {n}: {history[n]}"
        assert joint[1] == alone[1], f"state after group {n}: {history[n]}"


def test_a_fault_in_one_does_not_reach_the_others(r: redis.Redis) -> None:
    dice = random.Random(1)
    begin(r, random.Random(3))
    whole = [an_admission(dice, f"q{n}", NOW_MS) for n in range(3)]
    for args in whole:
        args[16:37] = [arg for scope in ("ka0", "pa", "oa") for arg in (scope, -1, -1, -1, 10, -1, 100)]
        args[43:] = [0, ANY_MS, 0, "r1"]
        r.set(KEYS.body(args[2]), "BODY")
    whole[1][9] = "not a number"
    _, rooms, *answers = a_pass(r, [("admit", args) for args in whole])
    assert [answer[0] for answer in answers] == [b"bound", b"error", b"bound"]
    assert rooms[1:2] == b"0"
    assert r.hget(KEYS.limits("key", "ka0"), "conc") == b"2"
    begun = [KEYS.prefix, NOW_MS]
    wrong, right = [*begun, "q0", "x", 1, 1, RETENTION_MS, 0], [*begun, "q2", 1, 1, 1, RETENTION_MS, 0]
    with pytest.raises(redis.ResponseError, match=r"settle: .*arithmetic"):
        a_pass(r, [("settle", wrong), ("settle", right)])
    assert r.hget(KEYS.limits("key", "ka0"), "conc") == b"1", "the other one was settled"


def roomy_admission(request: str, **limits: int) -> Step:
    """One of a tenant with these limits at its key: concurrency, budget; nothing else limits it."""
    key = ["ka0", -1, -1, -1, limits.get("concurrency", -1), limits.get("budget", -1), 100]
    scopes = [*key, *[arg for scope in ("pa", "oa") for arg in (scope, -1, -1, -1, -1, -1, 100)]]
    return "admit", [KEYS.prefix, NOW_MS, request, "d1", "g1", 1, "pv", 10, 10, 100, NOW_MS, 6, 10, 9, "cs:", 0,
                     *scopes, 0, 10, "", 0, 5_000, 0, 0, ANY_MS, 0, "r1"]  # fmt: skip


def test_settlements_go_before_the_admissions_of_their_pass(r: redis.Redis) -> None:
    begin(r, random.Random(3))
    body = dict.fromkeys(("q0", "q1"), b"BODY")
    [_, _, first] = a_pass(r, [roomy_admission("q0", concurrency=1)], bodies=body)
    assert first[0] == b"bound"
    settled: Step = ("settle", [KEYS.prefix, NOW_MS, "q0", 10, 5, 50, RETENTION_MS, 0])
    [_, _, second] = a_pass(r, [settled, roomy_admission("q1", concurrency=1)], bodies=body)
    assert second[0] == b"bound", "the place that the first one had is free"
    assert r.hget(KEYS.replica("r1"), "used") == b"1"
    assert r.smembers(KEYS.replica_live("r1")) == {b"q1"}


@pytest.mark.parametrize(
    ("limits", "is_roomy"),
    [({}, b"1"), ({"concurrency": 65}, b"1"), ({"concurrency": 63}, b"0"), ({"budget": 6_500}, b"1"),
     ({"budget": 6_300}, b"0")],
)  # fmt: skip
def test_a_pass_tells_where_a_settlement_could_be_missed(
    r: redis.Redis, limits: dict[str, int], is_roomy: bytes
) -> None:
    r.evalsha(scripts.ENROL.sha, 0, KEYS.prefix, NOW_MS, "r1", "m1", "d1", 4)
    r.evalsha(scripts.SEED.sha, 0, KEYS.prefix, "key", "ka0", 0)
    answers = a_pass(r, [roomy_admission("q0", **limits)], bodies={"q0": b"BODY"})
    assert answers[1] == is_roomy
    [_, rooms, *_] = a_pass(r, [roomy_admission("q1")], bodies={"q1": b"BODY"})
    assert rooms == b"0", "of four slots one was free"


def test_a_body_given_to_the_script_lies_where_one_stored_before_lies(r: redis.Redis) -> None:
    machine = KEYS.machine("m1")
    r.evalsha(scripts.ENROL.sha, 0, KEYS.prefix, NOW_MS, "r1", "m1", "d1", 1)
    group = [roomy_admission(name) for name in ("bound", "queued")] + [roomy_admission("full")]
    group[2][1][11] = 1  # a queue of one
    answers = a_pass(r, group, bodies={name: name.encode() for name in ("bound", "queued", "full")})
    assert [answer[0] for answer in answers[2:]] == [b"bound", b"queued", b"full"]
    assert r.get(machine.body("bound")) == b"bound"
    assert r.get(KEYS.body("queued")) == b"queued"
    assert r.pttl(machine.body("bound")) > 0 < r.pttl(KEYS.body("queued"))
    assert not r.exists(KEYS.body("bound"), KEYS.body("full"), machine.body("full"))
