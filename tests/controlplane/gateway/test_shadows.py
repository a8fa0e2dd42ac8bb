"""Copies of answered requests to shadows, at a real gateway and Redis: who is copied, as whom, in which bounds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace

from billing.rating import FREE
from controlplane.gateway import shadows as module
from controlplane.gateway.directory import LimitsRow, ShadowRow
from controlplane.tenants import api_keys
from controlplane.upstreams.wire import FIELD, Batch, Result, decode
from tests.controlplane.gateway.harness import (
    CHAT,
    DEPLOYMENT,
    KEYS,
    Job,
    Machine,
    Running,
    text_of,
    until,
)
from workers.contract import FinishReason, WireError

SHADOW, OWNER, PROJECT = "5" * 32, "6" * 32, "7" * 32
GREEDY = {**CHAT, "temperature": 0, "user": "someone"}


@pytest.fixture
async def shadow(gw: Running, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Machine]:
    """What stands for the endpoint: the watcher enrols it under the endpoint's id."""
    monkeypatch.setattr(module, "EVERY_S", 0.01)
    it = Machine(redis_url, "m2", "u1", SHADOW, role="replica")
    await it.start()
    yield it
    await it.stop()


def watch(gw: Running, key: str = "", **changes: Any) -> None:
    """All requests of this key are copied, but for what `changes` say."""
    row = ShadowRow(
        SHADOW, DEPLOYMENT, OWNER, PROJECT, "copies", 1_000_000, 600, 4, 1_000_000_000,
        input_nano_per_million=3_000_000, output_nano_per_million=5_000_000,
    )  # fmt: skip
    lookup = api_keys.lookup_of(key or gw.key) or ""
    record = gw.directory.records[lookup]
    gw.directory.records[lookup] = replace(record, shadows=(replace(row, **changes),))


class Told:
    """What was told of copies, of all batches so far."""

    def __init__(self, gw: Running, upstream: str = SHADOW) -> None:
        self.gw, self.upstream = gw, upstream
        self.raw = b""
        self.results: list[Result] = []
        self.skipped: dict[str, int] = {}

    async def look(self) -> None:
        entries: Any = await self.gw.redis.xrange(KEYS.shadows)
        for entry_id, fields in entries:
            await self.gw.redis.xdel(KEYS.shadows, entry_id)
            self.raw += fields[FIELD.encode()]
            batch: Batch = decode(fields[FIELD.encode()])
            self.results += batch.results
            for each in batch.skips:
                assert (each.organization, each.upstream) == (OWNER, self.upstream)
                self.skipped[each.reason] = self.skipped.get(each.reason, 0) + each.n

    async def until(self, n_results: int, n_skipped: int = 0) -> None:
        async def come() -> bool:
            await self.look()
            return (len(self.results), sum(self.skipped.values())) == (n_results, n_skipped)

        await until(come)


async def test_an_answer_is_copied_after_it_is_out_and_compared(
    gw: Running, machine: Machine, shadow: Machine
) -> None:
    watch(gw)
    told = Told(gw)
    async with gw.stream({**GREEDY, "max_tokens": 5}) as events:
        assert text_of(await events.rest()) == "one two three"
    assert (await gw.post({**GREEDY, "max_tokens": 3})).status_code == 200
    await told.until(2)
    requests = {job.id for job in machine.jobs}
    for result in told.results:
        assert (result.organization, result.upstream) == (OWNER, SHADOW)
        assert (result.status, result.is_same, result.similarity_ppm) == (200, True, 1_000_000)
        assert (result.finish, result.own_finish) == ("stop", "stop")
        assert (result.n_completion, result.own_n_completion, result.n_prompt) == (3, 3, 7)
        assert result.cost_nano == 7 * 3 + 3 * 5  # at the endpoint's own rates
    streamed, plain = sorted(told.results, key=lambda r: r.first_token_ms is None)
    assert None not in (
        streamed.first_token_ms,
        streamed.itl_us,
        streamed.own_first_token_ms,
        streamed.own_itl_us,
    )
    assert (plain.first_token_ms, plain.own_itl_us) == (None, None)  # its tokens come in bundles
    assert {result.request for result in told.results} == requests
    assert b"Hello" not in told.raw and b"one two" not in told.raw
    for job in shadow.jobs:
        sent = job.envelope
        assert sent.id not in requests
        assert (sent.org, sent.project, sent.key, sent.deployment) == (OWNER, PROJECT, SHADOW, SHADOW)
        assert (sent.price_version, sent.slo, sent.end_customer, sent.zero_retention) == (
            FREE.hex,
            None,
            "",
            True,
        )
        assert sent.payload in {other.envelope.payload for other in machine.jobs}
        assert sent.sampling.max_tokens == next(
            o.envelope.sampling.max_tokens for o in machine.jobs if o.envelope.payload == sent.payload
        )


async def test_a_response_is_copied_as_the_chat_that_it_is_without_whom_it_is_for(
    gw: Running, machine: Machine, shadow: Machine
) -> None:
    watch(gw)
    told = Told(gw)
    asked = {"model": "tiny", "input": "Hello", "temperature": 0, "safety_identifier": "someone"}
    assert (await gw.post(asked, path="/v1/responses")).status_code == 200
    await told.until(1)
    own, copy = machine.jobs[0].envelope, shadow.jobs[0].envelope
    assert (told.results[0].is_same, copy.payload, copy.endpoint) == (True, own.payload, own.endpoint)
    assert own.end_customer and not copy.end_customer


async def test_other_texts_are_told_apart_and_only_greedy_ones_judged(
    gw: Running, machine: Machine, shadow: Machine
) -> None:
    async def differs(job: Job) -> None:
        await job.emit("one two four")
        await job.finish(reason=FinishReason.LENGTH)

    shadow.behaviour = differs
    watch(gw)
    told = Told(gw)
    await gw.post(GREEDY)
    await gw.post(CHAT)
    await told.until(2)
    greedy, sampled = sorted(told.results, key=lambda r: r.is_same is None)
    assert (greedy.is_same, greedy.finish, greedy.own_finish) == (False, "length", "stop")
    assert (sampled.is_same, sampled.similarity_ppm) == (None, 0)


async def test_a_shadow_that_fails_or_hangs_is_nobodys_failure(
    gw: Running, machine: Machine, shadow: Machine
) -> None:
    go = asyncio.Event()

    async def hangs_then_fails(job: Job) -> None:
        await go.wait()
        await job.finish(reason=FinishReason.ERROR, error=WireError(504, "upstream_timeout", "late"))

    shadow.behaviour = hangs_then_fails
    watch(gw)
    told = Told(gw)
    answers = [await gw.post(GREEDY) for _ in range(3)]
    assert {a.json()["choices"][0]["message"]["content"] for a in answers} == {"one two three"}
    await until(lambda: len(shadow.jobs) == 3)
    go.set()
    await told.until(3)
    assert {(r.status, r.code, r.is_same, r.finish) for r in told.results} == {
        (504, "upstream_timeout", None, "")
    }
    assert [line.status for line in gw.log.lines] == [200] * 3


async def test_never_more_than_so_many_are_under_way(gw: Running, machine: Machine, shadow: Machine) -> None:
    go = asyncio.Event()

    async def slow(job: Job) -> None:
        await go.wait()
        await job.finish("x", n=1)

    shadow.behaviour = slow
    watch(gw, slots=2)
    told = Told(gw)
    assert {(await gw.post(GREEDY)).status_code for _ in range(5)} == {200}
    await told.until(0, 3)
    assert told.skipped == {"busy": 3}
    assert len(shadow.jobs) == 2
    go.set()
    await told.until(2, 3)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"rpm": 1}, "rate"), ({"budget_nano": 0}, "budget"), ({"id": "8" * 32}, "busy")],
    ids=["rate", "budget", "nobody-there"],
)
async def test_what_a_shadow_may_not_have_is_dropped_and_counted(
    gw: Running,
    machine: Machine,
    shadow: Machine,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    reason: str,
) -> None:
    monkeypatch.setattr(module, "_LOOKS", 5)
    watch(gw, **changes)
    told = Told(gw, changes.get("id", SHADOW))
    for _ in range(3):
        assert (await gw.post({**GREEDY, "max_tokens": 3})).status_code == 200
    n_copied = 1 if reason == "rate" else 0
    await told.until(n_copied, 3 - n_copied)
    assert (told.skipped, len(shadow.jobs)) == ({reason: 3 - n_copied}, n_copied)


async def test_a_day_that_began_elsewhere_counts(gw: Running, machine: Machine, shadow: Machine) -> None:
    """Redis was emptied: what the day has cost comes from the ledger (corral_shadow_spent)."""
    watch(gw, budget_nano=1_000)
    start_of_day = 86_400_000 * (await now_ms(gw) // 86_400_000)
    gw.directory.in_window[SHADOW] = {str(start_of_day): 990}
    told = Told(gw)
    assert (await gw.post({**GREEDY, "max_tokens": 3})).status_code == 200
    await told.until(0, 1)
    assert told.skipped == {"budget": 1}


async def now_ms(gw: Running) -> int:
    seconds, _ = await gw.redis.time()
    return int(seconds) * 1000


async def test_a_caller_is_charged_and_limited_for_his_own_requests_only(
    gw: Running, machine: Machine, shadow: Machine
) -> None:
    """Also where the shadow is his own organization's: its copies are not his requests."""
    key = gw.directory.add_key(key_limits=LimitsRow(rpm=2, max_concurrency=1))
    go = asyncio.Event()

    async def slow(job: Job) -> None:
        await go.wait()
        await job.finish("x", n=1)

    shadow.behaviour = slow
    record = gw.directory.records[api_keys.lookup_of(key) or ""]
    watch(gw, key, organization=record.organization.id, project=record.project.id)
    assert [(await gw.post(GREEDY, **gw.auth(key))).status_code for _ in range(3)] == [200, 200, 429]
    await until(lambda: len(shadow.jobs) == 2)
    go.set()
    await until(lambda: gw.gateway.shadows.n_copied == 2)


async def test_a_second_deployment_of_the_project_may_be_the_shadow(
    gw: Running, machine: Machine, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.01)
    key = gw.directory.add_key(names=("tiny", "next"))
    record = gw.directory.records[api_keys.lookup_of(key) or ""]
    target = record.deployments[1]
    second = Machine(redis_url, "m2", "r2", target.id)
    await second.start()
    try:
        watch(gw, key, organization=record.organization.id, project=record.project.id, target=target.id)
        assert (await gw.post(GREEDY, **gw.auth(key))).status_code == 200
        await until(lambda: gw.gateway.shadows.n_copied == 1)
        [job] = second.jobs
        assert (job.envelope.key, job.envelope.org) == (SHADOW, record.organization.id)
        assert (job.envelope.price_version, job.envelope.model) == (target.price.version, "next")
        assert job.envelope.slo is None  # nobody's objective is spent on it
        # A key that may not use the second deployment does not reach it by being copied either.
        gw.directory.records[api_keys.lookup_of(key) or ""] = replace(
            gw.directory.records[api_keys.lookup_of(key) or ""], deployments=record.deployments[:1]
        )
        gw.gateway.key_cache.invalidate("all")
        assert (await gw.post(GREEDY, **gw.auth(key))).status_code == 200
        await until(lambda: gw.gateway.shadows.n_running == 0)
        assert (len(second.jobs), gw.gateway.shadows.n_skipped) == (1, 0)
    finally:
        await second.stop()


async def test_what_is_not_answered_or_not_kept_is_not_copied(
    gw: Running, machine: Machine, shadow: Machine
) -> None:
    quiet = gw.directory.add_key(zero_retention=True)
    watch(gw, quiet)  # as if the directory had told of it all the same
    assert (await gw.post(GREEDY, **gw.auth(quiet))).status_code == 200

    async def fails(job: Job) -> None:
        await job.finish(reason=FinishReason.ERROR, error=WireError(500, "engine_failed", "broke"))

    machine.behaviour = fails
    watch(gw)
    assert (await gw.post(GREEDY)).status_code == 500
    assert (await gw.post({**GREEDY, "max_tokens": 0})).status_code == 400
    assert (gw.gateway.shadows.n_running, gw.gateway.shadows.n_waiting, shadow.jobs) == (0, 0, [])


async def test_copies_that_wait_are_few_and_the_rest_is_dropped(
    gw: Running, machine: Machine, shadow: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_RUNNING", 1)
    monkeypatch.setattr(module, "MAX_WAITING", 2)
    go = asyncio.Event()

    async def slow(job: Job) -> None:
        await go.wait()
        await job.finish("x", n=1)

    shadow.behaviour = slow
    watch(gw)
    told = Told(gw)
    assert {(await gw.post(GREEDY)).status_code for _ in range(5)} == {200}
    assert (gw.gateway.shadows.n_running, gw.gateway.shadows.n_waiting) == (1, 2)
    await told.until(0, 2)
    assert told.skipped == {"crowded": 2}
    go.set()
    await told.until(3, 2)
    assert gw.gateway.shadows._n_waiting_bytes == 0


async def test_without_a_shadow_nothing_is_asked_of_it(
    gw: Running, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gw.gateway.shadows, "offer", lambda *_: pytest.fail("it was asked"))
    async with gw.stream(GREEDY) as events:
        await events.rest()
    assert (await gw.post(GREEDY)).status_code == 200
