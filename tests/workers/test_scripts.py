"""The cell's scripts on a real Redis: admission, binding, fencing, drawing down, settling, losing a replica."""

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from controlplane.policy.flows import ANY_MS
from tests.records import expanded
from workers import scripts
from workers.contract import End, FinishReason, FrameEntry, celery_message, decode_frame, encode
from workers.keys import RETENTION_MS, CellKeys
from workers.scripts import Script

NO_LIMIT = -1
KEYS = CellKeys("t0")
NOW_MS = 1_800_000_000_000


class Cell:
    """Both sides of one cell: the trusted scripts, and those a machine runs."""

    def __init__(self, client: redis.Redis) -> None:
        self.r = client
        self.now_ms = NOW_MS
        for script in (*scripts.TRUSTED_SCRIPTS, *scripts.MACHINE_SCRIPTS):
            assert client.script_load(script.source) == script.sha

    def run(self, script: Script, *args: Any) -> Any:
        return self.r.evalsha(script.sha, 0, *args)

    def admit(
        self,
        request: str,
        *,
        candidates: tuple[str, ...] = (),
        n_in: int = 10,
        n_out: int = 20,
        money: int = 50,
        out_rate: int = 2,
        queue_bound: int = 100,
        share: int = 0,
        key: str = "k1",
        prj: str = "p1",
        org: str = "o1",
        weights: tuple[int, int, int] = (100, 100, 100),
        band: int = 0,
        order: int = 0,
        expected: int = 20,
        prefixes: bytes = b"",
        window: int = 0,
        age_ms: int = 60_000,
        slot_ms: int = 0,
        most_ms: int = ANY_MS,
        **limits: int,
    ) -> list[Any]:
        """Admits with limits given as e.g. key_rpm=1, prj_budget=100."""
        self.r.set(KEYS.body(request), b"BODY")
        scopes: list[Any] = []
        for scope, scope_id in (("key", key), ("prj", prj), ("org", org)):
            names = ("rpm", "in", "out", "conc", "budget")
            scopes += [scope_id, *(limits.get(f"{scope}_{name}", NO_LIMIT) for name in names)]
            scopes.append(weights[("key", "prj", "org").index(scope)])
        return self.run(
            scripts.ADMIT, KEYS.prefix, self.now_ms, request, "d1", "g1", 7, "pv1", n_in, n_out, money,
            order or self.now_ms, queue_bound, money - n_out * out_rate, out_rate, "cs:", 0, *scopes,
            band, expected, prefixes, window, age_ms, share, slot_ms, most_ms, -1, *candidates,
        )  # fmt: skip

    def enrol(self, replica: str, machine: str = "m1", slots: int = 4) -> int:
        return self.run(scripts.ENROL, KEYS.prefix, self.now_ms, replica, machine, "d1", slots)

    def claim(self, request: str, epoch: int, replica: str = "r1", machine: str = "m1") -> list[Any]:
        prefix = KEYS.machine(machine).prefix
        return self.run(scripts.CLAIM, prefix, self.now_ms, request, epoch, replica)

    def flush(self, *entries: tuple[str, int, int, int, bool], machine: str = "m1") -> bytes:
        """Entries of (request, epoch, offset, n, finished)."""
        args: list[Any] = []
        for request, epoch, offset, n, finished in entries:
            end = End(FinishReason.STOP, 10, 0, offset + n) if finished else None
            frame = encode(FrameEntry(7, 0, offset, n, f"<{offset}>", end))
            args += [request, epoch, offset, offset + n, frame, b"J%d" % offset, b"U" if finished else b""]
        prefix = KEYS.machine(machine).prefix
        return self.run(scripts.FLUSH, prefix, "g1", RETENTION_MS, 1000, *args)

    def settle(
        self, request: str, n_in: int = 10, n_out: int = 20, cost: int = 50, n_cached: int = 0
    ) -> list[int]:
        return self.run(
            scripts.SETTLE, KEYS.prefix, self.now_ms, request, n_in, n_out, cost, RETENTION_MS, n_cached
        )

    def withdraw(self, replica: str, mode: str = "dead", deaths: int = 1) -> list[Any]:
        return self.run(scripts.WITHDRAW, KEYS.prefix, self.now_ms, replica, mode, deaths, b"WHY")

    def limit(self, scope: str, scope_id: str) -> dict[bytes, bytes]:
        return self.r.hgetall(KEYS.limits(scope, scope_id))

    def used(self, replica: str) -> int:
        return int(self.r.hget(KEYS.replica(replica), "used") or 0)


@pytest.fixture
def cell(redis_url: str) -> Iterator[Cell]:
    with redis.Redis.from_url(redis_url) as client:
        yield Cell(client)


def test_message_of_the_script_equals_the_contracts(cell: Cell) -> None:
    cell.enrol("r1")
    cell.admit("q1", candidates=("r1",))
    assert cell.r.lrange(KEYS.machine("m1").prefix + "replica.r1", 0, -1) == [celery_message("q1", 1, "r1")]


def test_binding_moves_the_body_under_the_machine_and_takes_a_slot(cell: Cell) -> None:
    cell.enrol("r1", slots=1)
    assert cell.admit("q1", candidates=("r1",)) == [b"bound", 1, b"r1", 20]
    assert not cell.r.exists(KEYS.body("q1"))
    assert cell.r.get(KEYS.machine("m1").body("q1")) == b"BODY"
    assert cell.used("r1") == 1
    assert cell.admit("q2", candidates=("r1",))[0] == b"queued", "the only slot is taken"


def test_request_waits_in_the_fair_queue_until_a_slot_frees(cell: Cell) -> None:
    cell.enrol("r1", slots=1)
    cell.admit("q1", candidates=("r1",))
    cell.admit("q2", candidates=("r1",))
    assert cell.settle("q1") == [1, 1], "settling pumped the queue"
    assert cell.r.hget(KEYS.request("q2"), "state") == b"bound"
    assert cell.used("r1") == 1


def test_nobody_overtakes_the_queue(cell: Cell) -> None:
    cell.admit("q1")
    cell.now_ms += 1
    cell.r.hset(
        KEYS.replica("r1"), mapping={"mid": "m1", "dep": "d1", "state": "ready", "slots": 1, "used": 0}
    )
    cell.r.sadd(KEYS.replicas("d1"), "r1")
    assert cell.admit("q2", candidates=("r1",))[0] == b"queued"
    assert cell.r.hget(KEYS.request("q1"), "state") == b"bound", "the older one got the slot"


def test_first_request_at_zero_wakes_the_autoscaler(cell: Cell) -> None:
    listener = cell.r.pubsub()
    listener.subscribe(KEYS.wake_channel)
    assert listener.get_message(timeout=5)["type"] == "subscribe"
    assert cell.admit("q1")[:3] == [b"queued", 1, 1]
    assert listener.get_message(timeout=5)["data"] == b"d1"
    listener.close()


def test_full_queue_refuses_and_takes_nothing(cell: Cell) -> None:
    cell.admit("q1", queue_bound=1, key_conc=5)
    assert cell.admit("q2", queue_bound=1, key_conc=5) == [b"full", 1, b"deployment"]
    assert not cell.r.exists(KEYS.body("q2"), KEYS.request("q2"))
    assert cell.limit("key", "k1")[b"conc"] == b"1"


@pytest.mark.parametrize("scope", ["key", "prj", "org"])
@pytest.mark.parametrize(
    ("limit", "value", "name"),
    [
        ("rpm", 1, b"requests_per_minute"),
        ("in", 10, b"input_tokens_per_minute"),
        ("out", 20, b"output_tokens_per_minute"),
        ("conc", 1, b"concurrency"),
    ],
)
def test_each_limit_refuses_at_each_level_and_gives_back(
    cell: Cell, scope: str, limit: str, value: int, name: bytes
) -> None:
    limits = {f"{scope}_{limit}": value}
    assert cell.admit("q1", **limits)[0] == b"queued"
    refused = cell.admit("q2", **limits)
    assert refused[:3] == [b"refused", scope.encode(), name]
    assert refused[3] > 0, "says when to retry"
    assert not cell.r.exists(KEYS.body("q2"), KEYS.request("q2")), "a refusal leaves nothing behind"
    cell.now_ms += refused[3]
    cell.settle("q1", n_in=0, n_out=0)
    assert cell.admit("q3", **limits)[0] == b"queued"


def test_a_refusal_at_the_organization_takes_nothing_from_the_key(cell: Cell) -> None:
    assert cell.admit("q1", key_rpm=5, org_conc=0)[:3] == [b"refused", b"org", b"concurrency"]
    assert cell.limit("key", "k1") == {}


def test_money_hold_is_the_worst_case_or_what_is_left(cell: Cell) -> None:
    assert cell.admit("q0", key_budget=100) == [b"seed", b"key", b"k1"]
    cell.run(scripts.SEED, KEYS.prefix, "key", "k1", 20)
    assert cell.admit("q1", key_budget=100)[3] == 20, "50 of 80 held: all 20 tokens"
    assert cell.admit("q2", key_budget=100)[3] == 10, "30 left: 10 for the prompt, 20 for 10 tokens"
    assert cell.admit("q3", key_budget=100)[:3] == [b"refused", b"key", b"budget"]
    assert cell.limit("key", "k1")[b"held"] == b"80"
    cell.settle("q1", cost=14)
    assert cell.limit("key", "k1")[b"held"] == b"30"
    assert cell.limit("key", "k1")[b"spent"] == b"34"


def test_money_stays_exact_beyond_what_a_double_holds(cell: Cell) -> None:
    """Lua counts in doubles: 2^53 nano-dollars are nine million dollars."""
    spent = 2**60 + 1
    cell.run(scripts.SEED, KEYS.prefix, "org", "o1", spent)
    cell.admit("q1", org_budget=2**62)
    cell.settle("q1", cost=3)
    assert int(cell.limit("org", "o1")[b"spent"]) == spent + 3
    assert int(cell.limit("org", "o1")[b"held"]) == 0


def test_settle_happens_once(cell: Cell) -> None:
    cell.enrol("r1", slots=2)
    cell.admit("q1", candidates=("r1",), key_conc=5, key_out=100)
    assert cell.settle("q1", n_out=5)[0] == 1
    assert cell.settle("q1", n_out=5) == [0]
    assert cell.used("r1") == 0
    assert cell.limit("key", "k1")[b"conc"] == b"0"
    assert float(cell.limit("key", "k1")[b"out"]) == pytest.approx(95), "15 of the 20 held tokens came back"


def test_claim_is_granted_once_per_epoch(cell: Cell) -> None:
    cell.enrol("r1")
    cell.admit("q1", candidates=("r1",))
    assert cell.claim("q1", 1)[:4] == [b"ok", b"BODY", b"g1", b"7"]
    assert cell.claim("q1", 1) == [b"held"], "duplicate delivery"
    assert cell.claim("q1", 2) == [b"stale"]
    assert cell.claim("unknown", 1) == [b"stale"]


def test_several_claims_in_one_call_are_answered_each_for_itself(cell: Cell) -> None:
    cell.enrol("r1")
    for request in ("q1", "q2", "q3"):
        cell.admit(request, candidates=("r1",))
    cell.claim("q2", 1)
    pairs = ("q1", 1, "r1", "q2", 1, "unknown", 1, "q3", 2, "q3", 1, "q3", 1)
    answers = cell.run(scripts.CLAIM, KEYS.machine("m1").prefix, cell.now_ms, *pairs)
    assert [answer[0] for answer in answers] == [b"ok", b"held", b"stale", b"stale", b"ok", b"held"]
    assert answers[0][1:4] == [b"BODY", b"g1", b"7"]


@pytest.mark.parametrize("candidates", [("r1",), ()])
def test_whoever_comes_back_is_told_the_age_by_the_clock_of_redis(
    cell: Cell, candidates: tuple[str, ...]
) -> None:
    if candidates:
        cell.enrol("r1")
    cell.admit("q1", candidates=candidates)
    record = KEYS.request("q1")
    cell.r.pexpire(record, cell.r.pttl(record) - 90_000)
    wrong_ms = cell.now_ms + 3_600_000  # a gateway's
    attached = cell.run(scripts.ATTACH, KEYS.prefix, wrong_ms, "q1", "p1", "", "g2", 9, 1_000)
    assert attached[0] == (b"running" if candidates else b"queued")
    assert 90_000 <= int(attached[12]) < 100_000


def test_only_the_holder_appends_and_hears_the_news_with_its_next_flush(cell: Cell) -> None:
    """Each row ends or limits the right to append that a claim gave (`open` in the lease)."""
    cell.enrol("r1", slots=8)
    cell.enrol("r2", "m1", slots=8)

    def claimed(request: str) -> None:
        cell.admit(request, candidates=("r1",))
        assert cell.flush((request, 1, 0, 1, False)) == b"s", "before the claim"
        cell.claim(request, 1)
        assert cell.flush((request, 1, 0, 1, False)) == b"a"

    for request in ("cancelled", "moved", "released", "ended", "rebound"):
        claimed(request)
    cell.run(scripts.CANCEL, KEYS.prefix, cell.now_ms, "cancelled")
    assert cell.flush(("cancelled", 1, 1, 1, False)) == b"c"
    attach = cell.run(scripts.ATTACH, KEYS.prefix, cell.now_ms, "moved", "p1", "", "g2", 9, 1_000)
    assert attach[0] == b"running"
    assert cell.flush(("moved", 1, 1, 1, False)) == b"m"
    cell.admit("early", candidates=("r1",))
    assert (
        cell.run(scripts.ATTACH, KEYS.prefix, cell.now_ms, "early", "p1", "", "g2", 9, 1_000)[0] == b"running"
    )
    cell.claim("early", 1)
    assert cell.flush(("early", 1, 0, 1, False)) == b"m", "what happened before the claim is told, too"
    assert cell.run(scripts.RELEASE, KEYS.machine("m1").prefix, "released", 1) == 1
    assert cell.flush(("released", 1, 1, 1, False)) == b"s"
    assert cell.flush(("ended", 1, 1, 1, True)) == b"a"
    assert cell.flush(("ended", 1, 2, 0, True)) == b"d"
    cell.run(scripts.WITHDRAW, KEYS.prefix, cell.now_ms, "r1", "lost", 0, "", "rebound")
    assert cell.flush(("rebound", 1, 1, 1, False)) == b"s"
    cell.claim("rebound", 2)
    assert cell.flush(("rebound", 1, 1, 1, False), ("rebound", 2, 1, 1, False)) == b"sa"


def test_flush_accepts_by_epoch_and_offset_and_publishes_exactly_that(cell: Cell) -> None:
    cell.enrol("r1")
    cell.admit("q1", candidates=("r1",))
    cell.claim("q1", 1)
    listener = cell.r.pubsub()
    listener.psubscribe(KEYS.gateway_pattern("g1"))
    assert listener.get_message(timeout=5)["type"] == "psubscribe"
    verdicts = cell.flush(
        ("q1", 1, 0, 1, False), ("q1", 1, 0, 1, False), ("q1", 2, 1, 1, False), ("q1", 1, 5, 1, False),
        ("q1", 1, 1, 2, False), ("q1", 1, 3, 18, False), ("q1", 1, 3, 1, True), ("q1", 1, 4, 1, False),
    )  # fmt: skip
    assert verdicts == b"adsgabad", "after its end an entry is a repetition"
    message = listener.get_message(timeout=5)
    listener.close()
    assert KEYS.machine_of_channel(message["channel"]) == "m1"
    assert [(e.offset, e.n, e.end is not None) for e in decode_frame(message["data"])] == [
        (0, 1, False), (1, 2, False), (3, 1, True),
    ]  # fmt: skip
    machine = KEYS.machine("m1")
    assert cell.r.lrange(machine.journal("q1"), 0, -1) == [b"J0", b"J1", b"J3"]
    assert [fields[b"u"] for _, fields in cell.r.xrange(machine.usage)] == [b"U"]
    assert not cell.r.exists(machine.body("q1"))


@pytest.mark.parametrize("n_entries", [1, 15, 16, 255, 256, 300])
def test_frame_header_fits_any_number_of_entries(cell: Cell, n_entries: int) -> None:
    cell.enrol("r1")
    cell.admit("q1", candidates=("r1",), n_out=1000)
    cell.claim("q1", 1)
    listener = cell.r.pubsub()
    listener.psubscribe(KEYS.gateway_pattern("g1"))
    listener.get_message(timeout=5)
    cell.flush(*(("q1", 1, i, 1, False) for i in range(n_entries)))
    entries = decode_frame(listener.get_message(timeout=5)["data"])
    listener.close()
    assert [e.offset for e in entries] == list(range(n_entries))


def test_cancel_reaches_queue_and_replica(cell: Cell) -> None:
    cell.admit("q1")
    assert cell.run(scripts.CANCEL, KEYS.prefix, NOW_MS, "q1") == b"queued"
    cell.settle("q1", 0, 0, 0)
    assert cell.run(scripts.CANCEL, KEYS.prefix, NOW_MS, "q1") == b"done"
    assert cell.run(scripts.CANCEL, KEYS.prefix, NOW_MS, "nobody") == b"unknown"
    cell.enrol("r1")
    cell.admit("q2", candidates=("r1",))
    cell.claim("q2", 1)
    listener = cell.r.pubsub()
    listener.subscribe(KEYS.machine("m1").control_channel("r1"))
    listener.get_message(timeout=5)
    assert cell.run(scripts.CANCEL, KEYS.prefix, NOW_MS, "q2") == b"bound"
    assert listener.get_message(timeout=5)["data"] == b"q2"
    listener.close()
    assert cell.flush(("q2", 1, 0, 1, False)) == b"c"


def test_dead_replica_gives_its_requests_back_with_their_journal(cell: Cell) -> None:
    cell.enrol("r1")
    cell.admit("q1", candidates=("r1",))
    cell.claim("q1", 1)
    cell.flush(("q1", 1, 0, 3, False))
    assert cell.withdraw("r1") == [1, 0, 0]
    assert cell.flush(("q1", 1, 3, 1, False)) == b"s", "the old holder is fenced out"
    assert cell.claim("q1", 1) == [b"stale"]
    cell.enrol("r2", "m2")
    granted = cell.claim("q1", 2, "r2", "m2")
    assert granted[0] == b"ok"
    assert granted[4:7] == [b"3", 17, b"2"], "offset, hold and attempt carry over"
    assert granted[7:] == [b"J0"]
    assert not cell.r.keys(KEYS.machine("m1").prefix + "*q1*"), "nothing of it is left under the old machine"


def test_resumed_work_goes_before_new_work(cell: Cell) -> None:
    cell.enrol("r1", slots=1)
    cell.admit("old", candidates=("r1",))
    cell.now_ms += 5
    cell.admit("new", candidates=("r1",))
    cell.withdraw("r1")
    assert cell.r.zrange(KEYS.queue("d1"), 0, -1) == [b"old", b"new"]


def test_only_a_claimed_request_counts_a_death_and_poison_is_named(cell: Cell) -> None:
    cell.enrol("r1")
    cell.admit("waiting", candidates=("r1",))
    cell.admit("poison", candidates=("r1",))
    cell.claim("poison", 1)
    assert cell.withdraw("r1", deaths=1) == [2, 0, 0]
    cell.enrol("r2")
    cell.claim("poison", 2, "r2")
    assert cell.withdraw("r2", deaths=1) == [1, 0, 1]
    assert cell.r.smembers(KEYS.failed) == {b"poison"}, "whoever watches finds it, should the caller die now"
    assert cell.r.hget(KEYS.request("poison"), "error") == b"WHY", "and so does its gateway"
    assert cell.r.zrange(KEYS.queue("d1"), 0, -1) == [b"waiting"]


def test_without_a_body_nothing_is_taken(cell: Cell) -> None:
    """The SET before it was refused, for instance because Redis is full."""
    cell.enrol("r1")
    cell.r.set(KEYS.body("other"), b"B")
    admit = cell.r.evalsha
    limits = ["k1", 5, 5000, 5000, 5, NO_LIMIT, 100, "p1", *[NO_LIMIT] * 5, 100, "o1", *[NO_LIMIT] * 5, 100]
    verdict = admit(
        scripts.ADMIT.sha, 0, KEYS.prefix, NOW_MS, "q1", "d1", "g1", 7, "pv1", 10, 20, 50, NOW_MS, 100, 10, 2,
        "cs:", 0, *limits, 0, 20, b"", 0, 60_000, 0, 0, ANY_MS, 0, "r1",
    )  # fmt: skip
    assert verdict == [b"gone"]
    assert cell.limit("key", "k1") == {}
    assert cell.used("r1") == 0
    assert not cell.r.exists(KEYS.request("q1"))


def test_buckets_refill_with_time_and_not_beyond_their_size(cell: Cell) -> None:
    assert cell.admit("q1", key_rpm=2)[0] == b"queued"
    assert cell.admit("q2", key_rpm=2)[0] == b"queued"
    refused = cell.admit("q3", key_rpm=2)
    assert refused[3] == 30_000, "one request every half minute"
    cell.now_ms += 29_999
    assert cell.admit("q4", key_rpm=2)[0] == b"refused"
    cell.now_ms += 1
    assert cell.admit("q5", key_rpm=2)[0] == b"queued"
    cell.now_ms += 10 * 60_000
    assert [cell.admit(f"q{i}", key_rpm=2)[0] for i in (6, 7, 8)] == [b"queued", b"queued", b"refused"]


def test_a_refund_never_lifts_a_bucket_above_its_size(cell: Cell) -> None:
    cell.admit("q1", key_out=20)
    cell.now_ms += 60_000
    cell.settle("q1", n_out=0)
    assert cell.admit("q2", key_out=20)[0] == b"queued"
    assert cell.admit("q3", key_out=20)[0] == b"refused", "20 a minute are 20, refund or not"


def test_a_clock_that_runs_behind_refills_nothing(cell: Cell) -> None:
    cell.admit("q1", key_rpm=1)
    cell.now_ms -= 120_000
    assert cell.admit("q2", key_rpm=1)[0] == b"refused"


def test_draining_replica_gets_no_new_work_and_keeps_what_it_runs(cell: Cell) -> None:
    cell.enrol("r1")
    cell.admit("q1", candidates=("r1",))
    cell.claim("q1", 1)
    assert cell.withdraw("r1", "drain") == [0, 1, 0]
    assert cell.admit("q2", candidates=("r1",))[0] == b"queued"
    assert cell.flush(("q1", 1, 0, 1, True)) == b"a"


def resize(cell: Cell, replica: str, was: int, slots: int, why: str = "because") -> int:
    return int(cell.run(scripts.RESIZE, KEYS.prefix, cell.now_ms, replica, was, slots, why))


def test_more_slots_take_what_waits_and_fewer_take_nothing_off(cell: Cell) -> None:
    cell.enrol("r1", slots=1)
    for n in range(4):
        cell.admit(f"a{n}", candidates=("r1",))
    assert resize(cell, "r1", 1, 3) == 2
    assert cell.r.hget(KEYS.replica("r1"), "used") == b"3"
    assert resize(cell, "r1", 3, 1, "too slow" * 100) == 0
    replica = cell.r.hgetall(KEYS.replica("r1"))
    assert (replica[b"used"], replica[b"slots"], len(replica[b"why"])) == (b"3", b"1", 200)
    for n in (0, 1):  # they end one by one, and nothing new comes before there is room
        cell.run(scripts.SETTLE, KEYS.prefix, cell.now_ms, f"a{n}", 10, 5, 20, RETENTION_MS)
        assert cell.r.hget(KEYS.request("a3"), "state") == b"queued"
    cell.run(scripts.SETTLE, KEYS.prefix, cell.now_ms, "a2", 10, 5, 20, RETENTION_MS)
    assert cell.r.hget(KEYS.request("a3"), "rid") == b"r1"


def test_gateways_hear_of_changed_slots(cell: Cell) -> None:
    heard = cell.r.pubsub(ignore_subscribe_messages=True)
    cell.enrol("r1", slots=1)
    heard.subscribe(KEYS.route_channel)
    heard.get_message(timeout=1)
    resize(cell, "r1", 1, 2)
    message = heard.get_message(timeout=2)
    assert message is not None
    assert message["data"] == b"d1"
    heard.close()


def test_slots_are_not_changed_of_a_draining_replica_or_on_an_old_view(cell: Cell) -> None:
    cell.enrol("r1", slots=4)
    assert resize(cell, "r1", 3, 8) == -1
    cell.run(scripts.WITHDRAW, KEYS.prefix, cell.now_ms, "r1", "drain", 1)
    assert resize(cell, "r1", 4, 8) == -1
    assert resize(cell, "nobody", 4, 8) == -1
    assert cell.r.hget(KEYS.replica("r1"), "slots") == b"4"
    assert cell.r.smembers(KEYS.replicas("d1")) == set()
    assert not cell.r.exists(KEYS.replica("nobody"))


def test_machine_user_reaches_its_own_keys_and_no_others(cell: Cell) -> None:
    cell.enrol("r1")
    cell.admit("q1", candidates=("r1",))
    machine = KEYS.machine("m1")
    digest = hashlib.sha256(b"secret").hexdigest()
    cell.r.execute_command("ACL", "SETUSER", machine.redis_user, *machine.acl_rules(digest))
    host = cell.r.connection_pool.connection_kwargs
    with redis.Redis(
        host=host["host"], port=host["port"], username=machine.redis_user, password="secret"
    ) as stranger:
        assert stranger.evalsha(scripts.CLAIM.sha, 0, machine.prefix, 1, "q1", 1, "r1")[0] == b"ok"
        foreign = KEYS.machine("m2").prefix
        for attempt in (
            lambda: stranger.get(KEYS.body("q1")),
            lambda: stranger.set(KEYS.limits("key", "k1"), "1"),
            lambda: stranger.evalsha(scripts.CLAIM.sha, 0, foreign, 1, "q1", 1, "r1"),
            lambda: stranger.publish(foreign + "g:g1", b""),
            lambda: stranger.keys("*"),
            lambda: stranger.acl_list(),
            lambda: stranger.config_get("*"),
            lambda: stranger.flushall(),
            lambda: stranger.eval("while true do end", 0),
            lambda: stranger.script_load("while true do end"),
        ):
            with pytest.raises(redis.ResponseError, match=r"NOPERM|can't access|no permissions"):
                attempt()


def test_lost_requests_go_back_without_a_death_and_without_touching_the_replica(cell: Cell) -> None:
    cell.enrol("r1", slots=4)
    for request in ("q1", "q2", "q3"):
        cell.admit(request, candidates=("r1",))
    cell.claim("q1", 1)
    cell.flush(("q1", 1, 0, 5, False))
    cell.settle("q3")
    cell.r.sadd(KEYS.replica_live("r1"), "q3")  # as if its slot had been forgotten
    cell.r.hincrby(KEYS.replica("r1"), "used", 1)
    answer = cell.run(
        scripts.WITHDRAW, KEYS.prefix, cell.now_ms, "r1", "lost", 0, "", "q1", "q3", "elsewhere"
    )
    assert answer == [1, 2, 0]
    record = expanded(cell.r.hgetall(KEYS.request("q1")))
    assert (record[b"state"], record[b"epoch"], record[b"crashes"]) == (b"bound", b"2", b"0")
    assert cell.flush(("q1", 1, 5, 1, False)) == b"s", "whoever held it is fenced out"
    assert cell.claim("q1", 2)[4] == b"5", "and the next one goes on from the journal"
    assert cell.r.hget(KEYS.request("q2"), "epoch") == b"1"
    assert cell.used("r1") == 2
    assert cell.r.hget(KEYS.replica("r1"), "state") == b"ready"
