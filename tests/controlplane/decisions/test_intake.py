"""Decisions from the stream to Postgres and back in words: kept once, bounded, and only for their tenant."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from io import StringIO
from typing import Any
from uuid import UUID

import pytest
import redis
from django.core.management import call_command
from django.core.management.base import CommandError

from controlplane import ids
from controlplane.decisions import intake, selectors, wire
from controlplane.decisions.models import DecisionMark, RequestDecision
from controlplane.decisions.words import explain
from controlplane.errors import NotFoundError
from controlplane.slo.models import SloWindow
from controlplane.tenants.context import tenant
from tests.booked import book_usage
from tests.database import acting_as
from tests.records import packed
from tests.world import World
from workers.keys import CellKeys

KEYS = CellKeys("c0")
DEPLOYMENT = ids.new_id().hex
REPLICAS = ("a" * 32, "b" * 32)


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    selectors._client.cache_clear()
    with redis.Redis.from_url(redis_url, socket_timeout=5) as found:
        yield found


def refusal(world: World, request: str, **values: Any) -> wire.Decision:
    facts = wire.Facts(
        gateway="gw-1",
        endpoint="chat",
        n_prompt=900,
        n_output_expected=120,
        admission="predicted",
        message="the first word would probably come after 1.9 s, and the class interactive promises 1 s",
        retry_after_s=1.5,
        prediction=wire.Prediction(1.9, 2.6, 1.0, 0.07, 3.1, 40.0, 12.5, 16),
        candidates=[
            wire.Candidate(REPLICAS[0], 16, 16, 41_000.0, 300, 64),
            wire.Candidate(REPLICAS[1], 16, 16, 52_000.0),
        ],
    )  # fmt: skip
    return wire.Decision(
        **(
            {
                "request": request,
                "organization": world.organization.id.hex,
                "project": world.project.id.hex,
                "key": ids.new_id().hex,
                "at_ms": int(time.time() * 1000),
                "outcome": "refused",
                "deployment": DEPLOYMENT,
                "model": "toy-chat",
                "code": "slo_unattainable",
                "status": 503,
                "slo_class": "interactive",
                "facts": facts,
            }
            | values
        )
    )


def tell(client: redis.Redis, *told: wire.Decision, refusals: list[wire.Refusals] | None = None) -> None:
    batch = wire.Batch(int(time.time() * 1000), list(told), refusals or [])
    client.xadd(KEYS.decisions, {wire.FIELD: wire.encode(batch)})


def run(client: redis.Redis) -> intake.Tally:
    with acting_as("corral_operator"):
        return intake.run(client, KEYS, using="default")


@pytest.mark.django_db
def test_a_decision_is_kept_once_and_the_stream_emptied(world: World, client: redis.Redis) -> None:
    request = ids.new_id()
    tell(client, refusal(world, request.hex))
    entry = client.xrange(KEYS.decisions)[0]
    assert (run(client).n_kept, client.xlen(KEYS.decisions)) == (1, 0)
    assert run(client).n_kept == 0
    with acting_as("corral_operator"):
        assert DecisionMark.objects.get(cell="c0").entry_id == entry[0].decode()
    with tenant(world.organization.id):
        (row,) = RequestDecision.objects.all()
        assert (row.request_id, row.code, row.facts["prediction"]["ahead_s"]) == (
            request, "slo_unattainable", 40.0,
        )  # fmt: skip
    with tenant(world.other_organization.id):
        assert not RequestDecision.objects.exists()


@pytest.mark.django_db
def test_an_entry_that_was_not_taken_out_counts_once(
    world: World, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies between the commit and the XDEL."""
    series = wire.Refusals(
        world.organization.id.hex, world.project.id.hex, DEPLOYMENT, "interactive", 990_000, 7
    )
    tell(client, refusal(world, ids.new_id().hex), refusals=[series])
    monkeypatch.setattr(client, "xdel", lambda *_: 0)
    run(client)
    run(client)
    with acting_as("corral_operator"):
        assert RequestDecision.objects.count() == 1
        assert [
            (w.n, w.n_refused, w.n_good, w.allowed_ppm) for w in SloWindow.objects.filter(width_s=60)
        ] == [(7, 7, 0, 70_000)]


@pytest.mark.django_db
def test_what_does_not_decode_is_passed_over(world: World, client: redis.Redis) -> None:
    client.xadd(KEYS.decisions, {wire.FIELD: b"\xff\x00"})
    client.xadd(KEYS.decisions, {"other": b"x"})
    tell(client, refusal(world, "not an id"), refusal(world, ids.new_id().hex))
    tally = run(client)
    assert (tally.n_bad, tally.n_kept) == (2, 1)


@pytest.mark.django_db
def test_a_flood_fills_neither_the_table_nor_the_others_room(
    world: World, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "MAX_PER_TENANT_RUN", 50)
    monkeypatch.setattr(intake, "MAX_PER_TENANT", 120)
    other = ids.new_id().hex
    for _ in range(10):
        for _ in range(intake.BATCHES - 1):
            tell(client, *(refusal(world, ids.new_id().hex) for _ in range(20)))
        tell(
            client,
            refusal(world, other, organization=world.other_organization.id.hex),
        )
        run(client)
    with acting_as("corral_operator"):
        mine = RequestDecision.objects.filter(organization_id=world.organization.id)
        assert mine.count() == 10 * 50
        newest = set(mine.order_by("-id").values_list("id", flat=True)[:120])
        intake.prune(now=datetime.now(tz=UTC), using="default")
        assert set(mine.values_list("id", flat=True)) == newest
        assert RequestDecision.objects.filter(organization_id=world.other_organization.id).count() == 10
        intake.prune(now=datetime.now(tz=UTC) + intake.KEPT + timedelta(hours=1), using="default")
        assert not RequestDecision.objects.exists()


@pytest.mark.django_db
def test_an_emptied_redis_is_read_from_its_beginning(world: World, client: redis.Redis) -> None:
    with acting_as("corral_operator"):
        DecisionMark.objects.create(cell="c0", entry_id="99999999999999-0")
    tell(client, refusal(world, ids.new_id().hex))
    assert run(client).n_kept == 0
    with acting_as("corral_operator"):
        intake.forget_mark_of_another(client, KEYS, using="default")
    assert run(client).n_kept == 1


def known(world: World, request: UUID) -> selectors.Request:
    with tenant(world.organization.id):
        return selectors.request(organization_id=world.organization.id, request_id=request)


@pytest.mark.django_db
def test_a_refusal_explains_itself_in_words(world: World, client: redis.Redis) -> None:
    request = ids.new_id()
    tell(client, refusal(world, request.hex))
    run(client)
    found = known(world, request)
    words = " ".join(explain(found))
    assert found.stage == "refused"
    for part in (
        "Refused with 503 slo_unattainable",
        "try again after 1.5 s",
        "expected after 1.9 s (2.6 s in one of ten cases)",
        "promises 1 s, which it would have met with a probability of 7%",
        "waited 40 s of slot time for 16 slots; the target allows 12.5 s",
        "Of 2 replicas rep_aaaaaaaa ranked first: 16 of 16 slots taken, 64 tokens of the prompt cached",
        "rep_bbbbbbbb, would have cost 52,000",
    ):
        assert part in words, (part, words)


@pytest.mark.django_db
def test_a_request_tells_where_it_stands_until_it_is_booked(world: World, client: redis.Redis) -> None:
    request = ids.new_id()
    adm = packed(
        deployment=DEPLOYMENT,
        price_version="p",
        n_prompt_estimate=1,
        n_output_asked=1,
        money_held_nano=0,
        admitted_at_ms=1,
        band="0",
        n_output_expected=1,
        prefixes="",
        note="",
        key="k",
        project=world.project.id.hex,
        organization=world.organization.id.hex,
    )
    key = KEYS.request(request.hex)
    client.hset(key, mapping={"state": "queued", "adm": adm})
    client.zadd(KEYS.queue(DEPLOYMENT), {"first": 1, request.hex: 2})
    found = known(world, request)
    assert (found.stage, found.live and found.live.n_before) == ("queued", 1)
    assert "behind 1 that" in " ".join(explain(found))
    client.hset(key, mapping={"state": "bound", "rid": REPLICAS[0], "attempt": 2})
    found = known(world, request)
    assert found.stage == "running"
    assert explain(found) == ["It runs now on replica rep_aaaaaaaa (attempt 2)."]
    with tenant(world.other_organization.id), pytest.raises(NotFoundError):
        selectors.request(organization_id=world.other_organization.id, request_id=request)
    event = book_usage(world, first_token_ms=80)
    found = known(world, event.request_id)
    assert found.stage == "ended"
    assert "first token after 80 ms" in " ".join(explain(found))


@pytest.mark.django_db
def test_the_command_explains_and_says_what_it_does_not_know(world: World, client: redis.Redis) -> None:
    request = ids.new_id()
    tell(client, refusal(world, request.hex))
    run(client)
    out = StringIO()
    with acting_as("corral_operator"):
        call_command("explain", f"req_{request.hex}", organization="acme", stdout=out)
        with pytest.raises(CommandError, match="no such request"):
            call_command("explain", f"req_{request.hex}", organization="other", stdout=StringIO())
        with pytest.raises(CommandError, match="an id looks like"):
            call_command("explain", "req_1", organization="acme", stdout=StringIO())
    assert "refused" in out.getvalue() and "Refused with 503 slo_unattainable" in out.getvalue()
