"""Intake between real servers: each request once, right sums, nothing lost, nothing stuck."""

import time
from collections import Counter
from collections.abc import Sequence
from uuid import UUID

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from billing.booking import Books
from billing.intake import Intake
from billing.models import UsageEvent as Row
from billing.models import Witness
from billing.usage_streams import Done, Settlement, UsageStreams
from billing.vetting import Refusal
from controlplane.tenants import key_services
from tests.billing.usage import KEYS, Tenant, admit, altered, deliver, event, new_hex
from tests.database import acting_as
from tests.records import changed
from tests.world import World
from workers.keys import RETENTION_MS
from workers.scripts import SEED

MACHINE, OTHER = new_hex(), new_hex()
COST = 60 * 100 + 40 * 25 + 20 * 400  # nano-dollars of event()'s counts at the standard price


def rows(tenant: Tenant) -> list[Row]:
    return list(Row.objects.filter(organization_id=UUID(tenant.org)).order_by("request_id"))


def acks(client: redis.Redis, machine: str, replica: str) -> list[str]:
    return [item.decode() for item in client.lrange(KEYS.machine(machine).ack(replica), 0, -1)]


def test_a_delivery_becomes_a_row_an_acknowledgement_and_is_forgotten(
    intake: Intake, client: redis.Redis
) -> None:
    tenant = Tenant()
    usage = event(tenant, MACHINE)
    admit(client, usage)
    deliver(client, MACHINE, usage)
    tally = intake.run([MACHINE], budget_s=5)
    assert (tally.n_booked, tally.n_repeated, tally.n_refused) == (1, 0, 0)
    [row] = rows(tenant)
    assert row.request_id.hex == usage.request_id
    assert (row.n_prompt_tokens, row.n_cached_tokens, row.n_completion_tokens) == (100, 40, 20)
    assert (row.cost_nano, row.witness, row.status, row.finish_reason) == (COST, Witness.STREAM, 200, "stop")
    assert (row.first_token_ms, row.duration_ms, row.attempts) == (80, 900, 1)
    assert acks(client, MACHINE, usage.replica) == [usage.request_id]
    assert client.pttl(KEYS.machine(MACHINE).ack(usage.replica)) > 0
    assert client.xlen(KEYS.machine(MACHINE).usage) == 0


def test_the_second_witness_changes_nothing_and_is_acknowledged(intake: Intake, client: redis.Redis) -> None:
    tenant = Tenant()
    usage = event(tenant, MACHINE)
    deliver(client, MACHINE, usage, spool=True)
    intake.run([MACHINE], budget_s=5)
    deliver(client, MACHINE, usage)
    tally = intake.run([MACHINE], budget_s=5)
    assert (tally.n_booked, tally.n_repeated) == (0, 1)
    [row] = rows(tenant)
    assert row.witness == Witness.SPOOL
    assert acks(client, MACHINE, usage.replica) == [usage.request_id] * 2


def test_booking_settles_the_hold_once(intake: Intake, client: redis.Redis) -> None:
    tenant = Tenant()
    usage = event(tenant, MACHINE)
    admit(client, usage, money=50_000)
    budgets = dict.fromkeys(("key_budget_nano", "project_budget_nano", "organization_budget_nano"), 90_000)
    record = KEYS.request(usage.request_id)
    client.hset(record, "adm", changed(client.hgetall(record), **budgets))
    scopes = [
        KEYS.limits("key", tenant.key),
        KEYS.limits("prj", tenant.project),
        KEYS.limits("org", tenant.org),
    ]
    for scope in scopes:
        client.hset(scope, mapping={"spent": 1_000, "held": 50_000, "conc": 1})
    for _ in range(2):
        deliver(client, MACHINE, usage)
        intake.run([MACHINE], budget_s=5)
    for scope in scopes:
        left = client.hmget(scope, "spent", "held", "conc")
        assert left == [str(1_000 + COST).encode(), b"0", b"0"]
    assert client.hget(KEYS.request(usage.request_id), "state") == b"done"


def test_what_was_not_held_is_neither_booked_nor_charged(intake: Intake, client: redis.Redis) -> None:
    tenant = Tenant()
    usage = event(tenant, MACHINE, n_completion=900)
    admit(client, usage, n_held=20)
    deliver(client, MACHINE, usage)
    intake.run([MACHINE], budget_s=5)
    [row] = rows(tenant)
    assert (row.n_completion_tokens, row.cost_nano) == (20, COST)


@pytest.mark.parametrize("machine_is", ["hostile", "mad"])
def test_refused_entries_are_put_aside_and_hold_up_nobody(
    intake: Intake, client: redis.Redis, machine_is: str
) -> None:
    tenant, victim = Tenant(), Tenant()
    admitted = event(victim, MACHINE)
    admit(client, admitted)
    forged = altered(admitted, org=tenant.org)
    deliver(client, MACHINE, forged if machine_is == "hostile" else b"\xc1 not msgpack")
    deliver(client, MACHINE, good := event(tenant, MACHINE))
    tally = intake.run([MACHINE], budget_s=5)
    assert [row.request_id.hex for row in rows(tenant)] == [good.request_id]
    assert rows(victim) == []
    expected = Refusal.OTHER_REQUEST if machine_is == "hostile" else Refusal.UNDECODABLE
    assert tally.refused == Counter({expected: 1})
    assert client.llen(KEYS.usage_bad) == 1
    assert client.xlen(KEYS.machine(MACHINE).usage) == 0
    assert intake.run([MACHINE], budget_s=5).n_refused == 0


def test_an_unknown_price_is_put_aside(intake: Intake, client: redis.Redis) -> None:
    tenant = Tenant()
    usage = event(tenant, MACHINE, price_version=new_hex())
    deliver(client, MACHINE, usage)
    assert intake.run([MACHINE], budget_s=5).refused == Counter({Refusal.UNKNOWN_PRICE: 1})
    # A spool must not send it for ever.
    assert acks(client, MACHINE, usage.replica) == [usage.request_id]


def test_a_row_the_database_refuses_holds_up_no_other(
    intake: Intake, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = Tenant()
    bad, good = event(tenant, MACHINE), event(tenant, MACHINE)
    monkeypatch.setattr(
        "billing.intake.request_cost", lambda _rates, *, n_prompt, **_: -1 if n_prompt == 7 else 5
    )
    bad = altered(bad, n_prompt=7, n_cached=0)
    admit(client, bad)
    deliver(client, MACHINE, bad)
    deliver(client, MACHINE, good)
    tally = intake.run([MACHINE], budget_s=5)
    assert [row.request_id.hex for row in rows(tenant)] == [good.request_id]
    assert tally.refused == Counter({Refusal.NOT_STORABLE: 1})
    assert client.hget(KEYS.request(bad.request_id), "state") == b"queued"  # not settled: the reaper will
    assert acks(client, MACHINE, bad.replica) == [bad.request_id]
    assert client.xlen(KEYS.machine(MACHINE).usage) == 0


def test_what_is_put_aside_is_bounded(intake: Intake, client: redis.Redis) -> None:
    client.rpush(KEYS.usage_bad, *["old"] * 1_000)
    deliver(client, MACHINE, b"x" * 100_000)
    intake.run([MACHINE], budget_s=5)
    assert client.llen(KEYS.usage_bad) == 1_000
    assert len(client.lindex(KEYS.usage_bad, 0)) < 6_000


def test_a_busy_machine_does_not_starve_a_quiet_one(
    intake: Intake, streams: UsageStreams, client: redis.Redis
) -> None:
    tenant = Tenant()
    for _ in range(30):
        deliver(client, MACHINE, event(tenant, MACHINE))
    deliver(client, OTHER, event(tenant, OTHER))
    read = streams.read([MACHINE, OTHER], limit=10)
    assert {item.machine_id for item in read} == {MACHINE, OTHER}
    assert len(read) <= 10
    assert intake.run([MACHINE, OTHER], budget_s=5).n_booked == 31


def test_a_run_is_bounded_in_time(streams: UsageStreams, books: Books, client: redis.Redis) -> None:
    tenant = Tenant()
    for _ in range(6):
        deliver(client, MACHINE, event(tenant, MACHINE))
    intake = Intake(streams, books, batch=2)
    assert intake.run([MACHINE], budget_s=0).n_booked == 2
    assert intake.run([MACHINE], budget_s=5).n_booked == 4


def test_what_comes_during_a_run_is_the_next_ones(
    intake: Intake, streams: UsageStreams, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a loaded cell is booked a few requests at a time, and each settled here before its gateway does it."""
    tenant, finish = Tenant(), streams.finish

    def finish_late(done: Sequence[Done]) -> None:
        finish(done)
        deliver(client, MACHINE, event(tenant, MACHINE))

    monkeypatch.setattr(streams, "finish", finish_late)
    deliver(client, MACHINE, event(tenant, MACHINE))
    assert intake.run([MACHINE, OTHER], budget_s=60).n_booked == 1
    assert intake.run([MACHINE, OTHER], budget_s=60).n_booked == 1


class CutOffError(Exception):
    """The process dies here."""


@pytest.mark.parametrize("step", ["settle", "finish"])
def test_a_crash_after_the_commit_books_nothing_twice(
    intake: Intake, streams: UsageStreams, client: redis.Redis, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    tenant = Tenant()
    usage = event(tenant, MACHINE)
    admit(client, usage)
    deliver(client, MACHINE, usage)

    def die(*_: object) -> None:
        raise CutOffError

    with monkeypatch.context() as patched:
        patched.setattr(streams, step, die)
        with pytest.raises(CutOffError):
            intake.run([MACHINE], budget_s=5)
    assert len(rows(tenant)) == 1
    assert acks(client, MACHINE, usage.replica) == []
    tally = intake.run([MACHINE], budget_s=5)
    assert (tally.n_booked, tally.n_repeated) == (0, 1)
    assert len(rows(tenant)) == 1
    assert acks(client, MACHINE, usage.replica) == [usage.request_id]
    assert client.hget(KEYS.request(usage.request_id), "state") == b"done"


def test_nothing_is_acknowledged_before_it_is_booked(
    intake: Intake, books: Books, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = Tenant()
    usage = event(tenant, MACHINE)
    admit(client, usage)
    deliver(client, MACHINE, usage)

    def die(*_: object) -> None:
        raise CutOffError

    with monkeypatch.context() as patched:
        patched.setattr(books, "_insert", die)
        with pytest.raises(CutOffError):
            intake.run([MACHINE], budget_s=5)
    assert acks(client, MACHINE, usage.replica) == []
    assert client.hget(KEYS.request(usage.request_id), "state") == b"queued"
    assert client.xlen(KEYS.machine(MACHINE).usage) == 1
    assert intake.run([MACHINE], budget_s=5).n_booked == 1


def test_a_settlement_of_an_unknown_request_is_nothing(streams: UsageStreams, client: redis.Redis) -> None:
    streams.settle([Settlement(new_hex(), 1, 1, 1)], now_ms=1)
    assert client.dbsize() == 0


def test_machines_are_found_by_their_streams(streams: UsageStreams, client: redis.Redis) -> None:
    deliver(client, MACHINE, b"x")
    client.set(f"{KEYS.prefix}m:nobody:usage", "no stream")
    assert streams.find_machines() == {MACHINE}


def test_a_keys_last_use_moves_forward_only(world: World, intake: Intake, client: redis.Redis) -> None:
    with acting_as("corral_app"):
        key, _ = key_services.create_api_key(
            organization_id=world.organization.id, project_id=world.project.id, name="ci"
        )
    tenant = Tenant(org=world.organization.id.hex, project=world.project.id.hex, key=key.id.hex)
    now_ms = int(time.time() * 1000)
    with acting_as("corral_operator"):
        for age_s, newest_s in ((300, 300), (600, 300), (0, 0)):
            deliver(client, MACHINE, event(tenant, MACHINE, admitted_at_ms=now_ms - age_s * 1000))
            intake.run([MACHINE], budget_s=5)
            key.refresh_from_db()
            assert key.last_used_at is not None
            assert abs(key.last_used_at.timestamp() * 1000 - (now_ms - newest_s * 1000)) < 5


DELIVERIES = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from([MACHINE, OTHER]), st.booleans()), min_size=1, max_size=14
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    deliveries=DELIVERIES,
    counts=st.lists(st.integers(0, 5_000), min_size=5, max_size=5),
    batch=st.integers(1, 6),
    runs_between=st.sets(st.integers(0, 13)),
)
def test_any_order_and_repetition_leaves_one_row_each_and_the_right_sum(
    streams: UsageStreams,
    books: Books,
    client: redis.Redis,
    deliveries: list[tuple[int, str, bool]],
    counts: list[int],
    batch: int,
    runs_between: set[int],
) -> None:
    client.flushall()
    tenant = Tenant()
    # The same request may come from two machines: it was resumed, or one of them is behind.
    base = [event(tenant, MACHINE, n_completion=n) for n in counts]
    intake = Intake(streams, books, batch=batch)
    n_booked = n_repeated = 0
    for number, (which, machine, spool) in enumerate(deliveries):
        deliver(client, machine, altered(base[which], machine=machine), spool=spool)
        if number in runs_between:
            tally = intake.run([MACHINE, OTHER], budget_s=5)
            n_booked, n_repeated = n_booked + tally.n_booked, n_repeated + tally.n_repeated
    tally = intake.run([MACHINE, OTHER], budget_s=5)
    n_booked, n_repeated = n_booked + tally.n_booked, n_repeated + tally.n_repeated

    delivered = {which for which, _, _ in deliveries}
    found = rows(tenant)
    assert {row.request_id.hex for row in found} == {base[which].request_id for which in delivered}
    assert len(found) == len(delivered) == n_booked
    assert n_repeated == len(deliveries) - len(delivered)
    assert sum(row.cost_nano for row in found) == sum(7_000 + 400 * counts[which] for which in delivered)
    assert not client.xlen(KEYS.machine(MACHINE).usage) + client.xlen(KEYS.machine(OTHER).usage)
    n_acked = sum(len(acks(client, machine, usage.replica)) for usage in base for machine in (MACHINE, OTHER))
    assert n_acked == len(deliveries)


def spent(client: redis.Redis, tenant: Tenant) -> list[int]:
    scopes = (("key", tenant.key), ("prj", tenant.project), ("org", tenant.org))
    return [int(client.hget(KEYS.limits(*scope), "spent") or -1) for scope in scopes]


def seed(client: redis.Redis, tenant: Tenant, at_ms: int, *scopes: str) -> None:
    ids_of = {"key": tenant.key, "prj": tenant.project, "org": tenant.org}
    for scope in scopes:
        client.eval(SEED.source, 0, KEYS.prefix, scope, ids_of[scope], 1_000, at_ms)


def test_usage_that_redis_lost_is_charged_to_budgets_read_from_the_ledger_before(
    intake: Intake, client: redis.Redis
) -> None:
    """Redis came back empty; the counters were seeded, and then a spool announced what nobody had booked."""
    tenant, now_ms = Tenant(), time.time_ns() // 1_000_000
    usage = event(tenant, MACHINE)
    seed(client, tenant, now_ms - 5_000, "key", "prj")
    deliver(client, MACHINE, usage, spool=True)
    deliver(client, MACHINE, usage, spool=True)
    intake.run([MACHINE], budget_s=5)
    assert spent(client, tenant) == [1_000 + COST, 1_000 + COST, -1], (
        "what is not seeded will read the ledger"
    )
    deliver(client, MACHINE, usage, spool=True)
    intake.run([MACHINE], budget_s=5)
    assert spent(client, tenant)[0] == 1_000 + COST, "once"


def test_what_the_ledger_had_when_the_budget_was_read_is_not_charged_again(
    intake: Intake, client: redis.Redis
) -> None:
    tenant = Tenant()
    usage = event(tenant, MACHINE)
    seed(client, tenant, time.time_ns() // 1_000_000 + 5_000, "key", "prj", "org")
    deliver(client, MACHINE, usage, spool=True)
    intake.run([MACHINE], budget_s=5)
    assert spent(client, tenant) == [1_000] * 3


def test_usage_whose_record_ran_out_after_its_settlement_is_not_charged_again(
    intake: Intake, client: redis.Redis
) -> None:
    """Postgres was away for longer than records live: the gateway had settled it at its end."""
    tenant, now_ms = Tenant(), time.time_ns() // 1_000_000
    before_ms = now_ms - RETENTION_MS - 10_000
    usage = event(tenant, MACHINE, request_id=f"{before_ms:012x}7{new_hex()[13:]}")
    seed(client, tenant, now_ms - 3_600_000, "key", "prj", "org")
    deliver(client, MACHINE, usage)
    assert intake.run([MACHINE], budget_s=5).n_booked == 1
    assert spent(client, tenant) == [1_000] * 3
