"""Requests in flight while the version changes: records as the version before wrote them (a field each), and as a later
one may (more places at the end)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import redis

from billing.usage_streams import UsageStreams
from controlplane.policy.flows import ANY_MS
from workers import scripts
from workers.keys import RETENTION_MS, CellKeys
from workers.records import decode_admitted

KEYS = CellKeys("t0")
M1 = KEYS.machine("m1")
NOW_MS = 1_800_000_000_000
SCOPES = (("key", "k1"), ("prj", "p1"), ("org", "o1"))


@pytest.fixture
def r(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        for script in (*scripts.TRUSTED_SCRIPTS, *scripts.MACHINE_SCRIPTS):
            client.script_load(script.source)
        for scope, scope_id in SCOPES:
            client.hset(KEYS.limits(scope, scope_id), mapping={
                "rq": "9", "in": "500.5", "out": "700", "ms": NOW_MS, "conc": 2, "held": 600, "spent": 1_000, "n": 2,
            })  # fmt: skip
        yield client


def run(r: redis.Redis, script: scripts.Script, *args: Any) -> Any:
    return r.evalsha(script.sha, 0, KEYS.prefix, *args)


def old_record(r: redis.Redis, request: str, *, bound_to: str = "") -> None:
    """What the version before wrote when it admitted 10 prompt and 20 output tokens for 300 nano-dollars."""
    r.hset(KEYS.request(request), mapping={
        "state": "bound" if bound_to else "queued", "dep": "d1", "gw": "g1", "stream": 7, "pv": "pv1", "in_est": 10,
        "out_est": 20, "hold_out": 20, "money": 300, "adm_ms": NOW_MS - 1_000, "key": "k1", "prj": "p1", "org": "o1",
        "note": "cs:abc", "fq": "1,100,50,200", "pred": 16, "pfx": "", "caps": "600,900,100000,600,900,-1,-1,-1,-1",
        "n": 0, "crashes": 0, "epoch": 1 if bound_to else 0, "attempt": 1 if bound_to else 0, "rid": bound_to,
        "mid": "m1" if bound_to else "", "bound_ms": NOW_MS if bound_to else 0,
    })  # fmt: skip
    if bound_to:
        r.set(M1.body(request), "BODY")
        r.hset(M1.lease(request), mapping={
            "epoch": 1, "state": "claimed", "gw": "g1", "stream": 7, "n": 0, "upto": 20, "attempt": 1,
        })  # fmt: skip
        r.sadd(KEYS.replica_live(bound_to), request)
        r.hincrby(KEYS.replica(bound_to), "used", 1)
    else:
        r.set(KEYS.body(request), "BODY")
        r.zadd(KEYS.queue("d1"), {request: 10**13 + NOW_MS - 1_000})
        for name, member in (("o:1", "o1"), ("p:1:o1", "p1"), ("k:1:p1", "k1"), ("r:1:k1", request)):
            r.zadd(f"{KEYS.prefix}dep:d1:{name}", {member: 0})
        r.hset(f"{KEYS.prefix}dep:d1:v", mapping={
            "w": 0, "a": 30_000, "no1": 1, "1oo1": 0, "1po1:p1": 0, "1kp1:k1": 0,
        })  # fmt: skip


def enrol(r: redis.Redis) -> int:
    return int(run(r, scripts.ENROL, NOW_MS, "r1", "m1", "d1", 4))


def test_a_bound_one_is_flushed_settled_once_and_gives_back_what_it_held(r: redis.Redis) -> None:
    enrol(r)
    old_record(r, "q1", bound_to="r1")
    flushed = r.evalsha(
        scripts.FLUSH.sha,
        0,
        M1.prefix,
        "g1",
        RETENTION_MS,
        100,
        "q1",
        1,
        0,
        5,
        b"\x91\xc0",
        b"entry",
        b"usage",
    )
    assert flushed == b"a", "its lease has no field `open`"
    assert run(r, scripts.SETTLE, NOW_MS, "q1", 8, 5, 120, RETENTION_MS, 0) == [1, 0]
    assert run(r, scripts.SETTLE, NOW_MS, "q1", 8, 5, 120, RETENTION_MS, 0) == [0]
    found = {scope: r.hgetall(KEYS.limits(scope, scope_id)) for scope, scope_id in SCOPES}
    assert [found[s][b"conc"] for s in found] == [b"1", b"1", b"1"]
    assert [found[s][b"held"] for s in found] == [b"300", b"600", b"600"], "only the key's budget held money"
    assert [found[s][b"spent"] for s in found] == [b"1120", b"1120", b"1120"]
    assert [found[s][b"in"] for s in found] == [b"502.5", b"502.5", b"500.5"]
    assert r.hget(KEYS.replica("r1"), "used") == b"0"


def test_one_that_waits_is_dispatched_and_its_lease_is_whole(r: redis.Redis) -> None:
    old_record(r, "q1")
    assert enrol(r) == 1
    lease = r.hgetall(M1.lease("q1"))
    assert (lease[b"epoch"], lease[b"upto"], lease[b"gw"], lease[b"state"]) == (b"1", b"20", b"g1", b"bound")
    [message] = r.lrange(f"{M1.prefix}replica.r1", 0, -1)
    assert json.loads(json.loads(message)["body"])[0] == ["q1", 1]
    tenths = 10 * 10 + 20 * 16
    assert r.hget(f"{KEYS.prefix}dep:d1:v", "1oo1") == b"%d" % (tenths * 10_000 // 200), (
        "charged by its weight"
    )
    assert r.hget(KEYS.request("q1"), "chg") == b"%d" % tenths


def test_it_is_cancelled_attached_charged_and_withdrawn(r: redis.Redis) -> None:
    enrol(r)
    for request in ("q1", "q2"):
        old_record(r, request, bound_to="r1")
    attached = run(r, scripts.ATTACH, NOW_MS, "q1", "p1", "abc", "g2", 8, 5_000)
    assert attached[:4] == [b"running", b"q1", b"cs:abc", b"%d" % (NOW_MS - 1_000)]
    assert run(r, scripts.ATTACH, NOW_MS, "q1", "p2", "abc", "g2", 8, 5_000) == [b"unknown"]
    assert run(r, scripts.CANCEL, NOW_MS, "q2") == b"bound"
    assert run(r, scripts.CHARGE, "q1", 100) == 0, "nobody waits"
    old_record(r, "q3")
    assert run(r, scripts.CHARGE, "q1", 100) == 1
    assert run(r, scripts.WITHDRAW, NOW_MS, "r1", "dead", 2, "") == [1, 0, 1], "one goes on, one was given up"
    assert r.zscore(KEYS.queue("d1"), "q1") == NOW_MS - 1_000 - 10**13
    assert run(r, scripts.CANCEL, NOW_MS, "q3") == b"queued"
    assert r.zscore(KEYS.queue("d1"), "q3") is None
    assert run(r, scripts.SETTLE, NOW_MS, "q3", 0, 0, 0, RETENTION_MS, 0)[0] == 1


def test_intake_knows_what_it_was_admitted_with(r: redis.Redis) -> None:
    old_record(r, "q1", bound_to="r1")
    streams = UsageStreams(r, KEYS)
    [known, unknown] = streams.admissions(["q1", "q2"])
    assert unknown is None
    assert known is not None
    assert (known.deployment, known.key, known.project, known.org) == ("d1", "k1", "p1", "o1")
    assert (known.price_version, known.n_output_held, known.settled) == ("pv1", 20, False)


def test_places_that_a_later_version_adds_are_ignored(r: redis.Redis) -> None:
    enrol(r)
    scopes = [arg for _, scope_id in SCOPES for arg in (scope_id, -1, -1, -1, -1, -1, 100)]
    args = [NOW_MS, "q1", "d1", "g1", 7, "pv1", 10, 20, 300, 1, 9, 0, 0, "cs:", 0, *scopes, 0, 16, "", 0, 30_000, 0,
            0, ANY_MS, 0, "r1"]  # fmt: skip
    r.set(KEYS.body("q1"), "BODY")
    assert run(r, scripts.ADMIT, *args)[0] == b"bound"
    packed = r.hget(KEYS.request("q1"), "adm")
    known = list(msgspec.structs.astuple(decode_admitted(packed)))
    later = msgspec.msgpack.encode([*known, "new", {"more": 1}])
    r.hset(KEYS.request("q1"), "adm", later)
    assert decode_admitted(later) == decode_admitted(packed)
    assert run(r, scripts.SETTLE, NOW_MS, "q1", 8, 5, 120, RETENTION_MS, 0) == [1, 0]
