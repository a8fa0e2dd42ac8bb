"""Admission by prediction at a real gateway, queue and script: who is refused, what they are told, what is learned."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from controlplane.gateway.directory import SloBook
from controlplane.policy import coming
from controlplane.policy.outlook import MIN_SEEN, Gate
from controlplane.policy.pace import Pace, Speed
from controlplane.policy.perfbias import Bias
from tests.controlplane.gateway.harness import CHAT, DEPLOYMENT, KEYS, Machine, Running, until
from tests.controlplane.gateway.test_fair_queue import Held, change_book, occupy, says, send


@pytest.fixture
async def held(gw: Running, redis_url: str) -> AsyncIterator[Held]:
    machine = Machine(redis_url)
    held = Held(machine)
    machine.behaviour = held.serve
    await machine.start(slots=1)
    yield held
    held.release_all()
    await machine.stop()


def learn(gw: Running, slot_s: float) -> Gate:
    """The gateway has seen requests that keep their slot so long."""
    gate = Gate(Pace(0.01, 0.0, 0.0))
    for _ in range(MIN_SEEN):
        gate.pace.saw_answer(10, 1, slot_s)
    gate.pace.base_s = slot_s
    gw.gateway.forecasts._gates[DEPLOYMENT] = gate
    return gate


async def known_slots(gw: Running) -> None:
    """The route table has looked."""
    gw.gateway.routes.candidates(DEPLOYMENT)
    await until(lambda: gw.gateway.routes.standing(DEPLOYMENT, "", "")[0])


async def test_what_would_come_too_late_is_refused_with_its_prediction(gw: Running, held: Held) -> None:
    await known_slots(gw)
    await occupy(gw, held)
    learn(gw, 0.3)
    waiting = await send(gw, says("a"))
    refused = await gw.post(says("b"))
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (503, "slo_unattainable")
    assert error["slo_class"] == "interactive" and error["ttft_target_s"] == 1.0
    assert 0.8 < error["ttft_p50_s"] < error["ttft_p90_s"] < 2
    assert 0 <= error["attainment"] < 0.95
    assert int(refused.headers["retry-after"]) >= 1
    assert int(refused.headers["retry-after-ms"]) == error["retry_after_ms"]
    assert await gw.redis.zcard(KEYS.queue(DEPLOYMENT)) == 1, "it was not filed"
    left = await gw.redis.keys(f"{KEYS.prefix}body:*")
    assert len(left) == 1, "and its body is gone"
    # Who can wait does.
    patient = await send(gw, says("c", service_tier="flex"))
    held.release_all()
    assert {(await task).status_code for task in (waiting, patient)} == {200}
    assert gw.gateway.forecasts.n_refused == 1


async def test_a_bounded_deployment_refuses_by_the_length_of_its_queue_only(gw: Running, held: Held) -> None:
    change_book(gw, SloBook(admission={DEPLOYMENT: "bounded"}))
    await known_slots(gw)
    await occupy(gw, held)
    learn(gw, 100.0)
    tasks = [await send(gw, says(word)) for word in "ab"]
    held.release_all()
    assert {(await task).status_code for task in tasks} == {200}


async def test_a_free_slot_is_given_whatever_is_predicted(gw: Running, held: Held) -> None:
    await known_slots(gw)
    learn(gw, 100.0)
    held.release_all()
    assert [(await gw.post(says("a"))).status_code for _ in range(3)] == [200] * 3


async def test_prompts_that_wait_at_the_only_replica_refuse_what_they_would_delay(
    gw: Running, redis_url: str
) -> None:
    """Slots are free, but the prompts before it take longer to compute than its target allows."""
    machine, go = Machine(redis_url), asyncio.Event()

    async def slow(job: Any) -> None:
        await go.wait()
        await job.finish("x", n=1)

    machine.behaviour = slow
    await machine.start(slots=8)
    try:
        await known_slots(gw)
        gate = learn(gw, 0.05)
        gate.pace.token_s = 0.01
        long = {**CHAT, "messages": [{"role": "user", "content": "word " * 400}]}
        first = asyncio.ensure_future(gw.post(long))
        await until(lambda: machine.jobs)
        stream = next(iter(gw.gateway.inbox.streams.values()))
        assert (
            gate.terms(stream.key.organization, stream.deployment.promise, 400, 1, slots=8).most_ahead_ms
            == -1
        )
        refused = await gw.post(long)
        assert refused.json()["error"]["code"] == "slo_unattainable"
        assert len(machine.jobs) == 1
        overflow = Machine(redis_url, "m2", "u1", role="overflow")
        await overflow.start(slots=1)
        try:
            await until(lambda: gw.gateway.routes.overflows(DEPLOYMENT))
            taken = await gw.post(long)
            assert (taken.status_code, len(overflow.jobs), len(machine.jobs)) == (200, 1, 1)
            await overflow.withdraw("drain")
            gw.gateway.routes.on_change(DEPLOYMENT)
            await until(lambda: not gw.gateway.routes.overflows(DEPLOYMENT))
            assert (await gw.post(long)).json()["error"]["code"] == "slo_unattainable"
        finally:
            await overflow.stop()
        go.set()
        assert (await first).status_code == 200
        assert (await gw.post(long)).status_code == 200, "nothing waits before it any more"
    finally:
        go.set()
        await machine.stop()


async def test_a_gateway_learns_from_what_it_serves(gw: Running, held: Held) -> None:
    await known_slots(gw)
    held.release_all()
    for _ in range(MIN_SEEN):
        assert (await gw.post(says("a"))).status_code == 200
    gate = gw.gateway.forecasts._gates[DEPLOYMENT]
    assert gate.pace.n == MIN_SEEN
    assert gate.pace.first_s(3) < 0.5
    held._go.clear()
    busy = await occupy(gw, held)
    waiting = await send(gw, says("a"))
    stream = await until(lambda: next((s for s in gw.gateway.inbox.streams.values() if s.queued), None))
    assert stream.total_s > 0
    held.release_all()
    assert {(await task).status_code for task in (busy, waiting)} == {200}
    record = gate.record(stream.key.organization, stream.deployment.promise)
    (track,) = gw.gateway.forecasts.tracks()
    assert track is record.track and track.n == 1
    shown = (await gw.http.get("/metrics")).text
    assert "corral_gateway_prediction_coverage" in shown and "corral_gateway_predictions_failing" in shown
    for _ in range(60):
        record.waited(0.001, 10.0)  # always later than said, and ever later
        record.bias = Bias()
    assert (gw.gateway.forecasts.n_failing(), gw.gateway.forecasts.coverage() < 0.75) == (1, True)


async def test_a_replica_that_is_being_started_counts_from_when_it_will_be_ready(
    gw: Running, held: Held
) -> None:
    """As the control worker tells it (autoscaler/tick.py); one that should have been ready long ago counts no more."""
    await known_slots(gw)
    await occupy(gw, held)
    gate = learn(gw, 0.3)
    waiting = [await send(gw, says("a"))]
    assert (await gw.post(says("b"))).status_code == 503
    for in_s, is_admitted in ((0.05, True), (-100.0, False)):
        starts = coming.text([(32, int((time.time() + in_s) * 1000))])
        await gw.redis.hset(KEYS.stage(DEPLOYMENT), "starts", starts)
        await gw.redis.publish(KEYS.route_channel, DEPLOYMENT)
        await until(
            lambda wanted=starts: gw.gateway.routes._views[DEPLOYMENT].starts == coming.parse(wanted.encode())
        )
        if is_admitted:
            waiting.append(await send(gw, says("c")))
            stream = max(gw.gateway.inbox.streams.values(), key=lambda s: s.number)
            await until(lambda waits=stream: waits.queued)
            assert stream.total_s < gate.total_s(stream.terms, stream.ahead_ms, stream.slots) / 2
        else:
            assert (await gw.post(says("d"))).status_code == 503
    held.release_all()
    assert {(await task).status_code for task in waiting} == {200}


async def test_predictions_begin_with_what_the_performance_model_says(gw: Running, held: Held) -> None:
    told = Speed(0.4, 0.003, 0.07)
    for replica in await gw.redis.smembers(KEYS.replicas(DEPLOYMENT)):
        await gw.redis.hset(KEYS.replica(replica.decode()), "pace", told.text)
    await known_slots(gw)
    held.release_all()
    assert (await gw.post(says("a"))).status_code == 200
    gate = gw.gateway.forecasts._gates[DEPLOYMENT]
    assert gate.presumed == told
    await until(lambda: gate.pace.n)
    for _ in range(MIN_SEEN):
        assert (await gw.post(says("a"))).status_code == 200
    assert gate.pace.first_s(3) < 0.4, "what is seen takes its place"
    assert gate.presumed == told
