"""What a gateway tells of its decisions: every refusal with its reasons, a sample of admissions, never too much."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from controlplane.decisions.wire import FIELD, Batch, Decision, decode
from controlplane.gateway import decisions
from controlplane.gateway.decisions import MAX_KEPT, MAX_PER_TENANT, Decisions
from controlplane.gateway.directory import LimitsRow
from controlplane.gateway.errors import ApiError
from tests.controlplane.gateway.harness import CHAT, DEPLOYMENT, KEYS, Machine, Running, until
from tests.controlplane.gateway.test_attainable import known_slots, learn
from tests.controlplane.gateway.test_fair_queue import Held, occupy, says, send
from workers.keys import DECISIONS_STREAM_MAX


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "EVERY_S", 0.05)


@pytest.fixture
async def held(gw: Running, redis_url: str) -> AsyncIterator[Held]:
    machine = Machine(redis_url)
    held = Held(machine)
    machine.behaviour = held.serve
    await machine.start(slots=1)
    yield held
    held.release_all()
    await machine.stop()


async def told(gw: Running) -> tuple[list[Decision], list[Batch]]:
    entries = await gw.redis.xrange(KEYS.decisions)
    batches = [decode(fields[FIELD.encode()]) for _, fields in entries]
    return [decision for batch in batches for decision in batch.decisions], batches


async def some(gw: Running, n: int) -> list[Decision]:
    async def enough() -> list[Decision]:
        found, _ = await told(gw)
        return found if len(found) >= n else []

    return await until(enough)


async def test_a_refusal_links_to_its_reasons_and_they_are_told(gw: Running, held: Held) -> None:
    await known_slots(gw)
    await occupy(gw, held)
    learn(gw, 0.3)
    waiting = await send(gw, says("a"))
    refused = await gw.post(says("b"))
    error = refused.json()["error"]
    assert error["code"] == "slo_unattainable"
    request = refused.headers["x-request-id"]
    assert error["decision_url"] == f"/api/v1/requests/{request}"
    (decision,) = await some(gw, 1)
    assert (decision.outcome, decision.status, decision.code) == ("refused", 503, "slo_unattainable")
    assert f"req_{decision.request}" == request
    assert (decision.deployment, decision.model, decision.slo_class) == (DEPLOYMENT, "tiny", "interactive")
    facts = decision.facts
    assert facts.message == error["message"] and facts.retry_after_s == pytest.approx(
        error["retry_after_ms"] / 1000, abs=0.002
    )
    said = facts.prediction
    assert said is not None and said.most_ahead_s is not None
    assert said.ahead_s > said.most_ahead_s
    assert (said.slots, said.target_s) == (1, 1.0)
    assert [(c.replica, c.used, c.slots) for c in facts.candidates] == [("r1", 1, 1)]
    _, batches = await told(gw)
    assert [(r.deployment, r.slo_class, r.n) for b in batches for r in b.refusals] == [
        (DEPLOYMENT, "interactive", 1)
    ]
    held.release_all()
    assert (await waiting).status_code == 200


async def test_a_limit_of_the_tenants_own_is_told_and_is_no_miss(gw: Running, held: Held) -> None:
    held.release_all()
    key = gw.directory.add_key(key_limits=LimitsRow(rpm=1))
    assert (
        await gw.http.post("/v1/chat/completions", json=says("a"), headers=gw.auth(key))
    ).status_code == 200
    refused = await gw.http.post("/v1/chat/completions", json=says("a"), headers=gw.auth(key))
    assert refused.status_code == 429
    assert refused.json()["error"]["decision_url"].endswith(refused.headers["x-request-id"])
    (decision,) = await some(gw, 1)
    assert (decision.code, decision.facts.limit, decision.facts.scope) == (
        "rate_limit_exceeded", "requests_per_minute", "key",
    )  # fmt: skip
    assert decision.facts.limits["x-ratelimit-remaining-requests"] == "0"
    _, batches = await told(gw)
    assert not any(batch.refusals for batch in batches)


async def test_admissions_are_sampled_with_their_alternatives(gw: Running, held: Held) -> None:
    gw.gateway.decisions._every = 2
    await known_slots(gw)
    held.release_all()
    for _ in range(5):
        assert (await gw.post(says("a"))).status_code == 200
    found = await some(gw, 2)
    assert [d.outcome for d in found] == ["bound", "bound"]
    assert found[0].facts.replica == "r1"
    assert found[0].facts.candidates[0].replica == "r1"


async def test_what_is_told_never_holds_the_text(gw: Running, held: Held) -> None:
    gw.gateway.decisions._every = 1
    await known_slots(gw)
    held.release_all()
    secret = "the-words-of-a-person"
    body = {**CHAT, "messages": [{"role": "user", "content": secret}], "stop": [secret], "user": secret}
    held._go.setdefault(secret, asyncio.Event()).set()
    assert (await gw.post(body)).status_code == 200
    await some(gw, 1)
    raw = await gw.redis.xrange(KEYS.decisions)
    assert secret not in repr(raw)
    assert gw.key not in repr(raw)


class Sink:
    """Redis as a flood sees it."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def fire(self, *command: Any) -> None:
        self.sent.append(command)


async def test_a_flood_of_refusals_stays_small(gw: Running) -> None:
    key = await gw.gateway.key_cache.authenticate(f"Bearer {gw.key}".encode(), None)
    sink = Sink()
    parts = gw.gateway
    flooded = Decisions(
        sink,
        parts.keys,
        "gw",
        parts.routes,
        parts.forecasts,
        sample=0.0,
        url="",  # type: ignore[arg-type]
    )
    from dataclasses import replace

    tenants = [replace(key, organization=f"{i:032x}") for i in range(30)]
    for n in range(20_000):
        error = ApiError(429, "rate_limit_exceeded", "no", retry_after_s=1.0)
        flooded.refused(tenants[n % 3 if n < 10_000 else n % 30], f"{n:032x}", error, None, None)
        assert error.details["decision_url"]
    assert len(flooded._kept) <= MAX_KEPT
    assert max(flooded._by_tenant.values()) == MAX_PER_TENANT
    assert flooded.n_dropped == 20_000 - len(flooded._kept)
    flooded.close()
    ((command, *_, maximum, _, _, payload),) = sink.sent
    assert (command, maximum) == ("XADD", DECISIONS_STREAM_MAX)
    assert len(payload) < 500_000
    assert flooded._kept == [] and not flooded._by_tenant
