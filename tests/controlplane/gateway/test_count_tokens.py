"""POST /v1/messages/count_tokens as the published anthropic SDK calls it: what is counted, taken and refused."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic

from controlplane.gateway.directory import LimitsRow
from controlplane.gateway.identity import ALL_CHARGED
from controlplane.gateway.metrics import GatewayMetrics
from tests.controlplane.gateway.harness import DEPLOYMENT, KEYS, Job, Machine, Running, until
from workers.contract import Endpoint, FinishReason, WireError

BODY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
TOOL = {"name": "now", "description": "the time", "input_schema": {"type": "object", "properties": {}}}


async def counts(job: Job) -> None:
    """As a replica ends what may have no token: it has counted the prompt."""
    assert job.envelope.sampling.max_tokens == 0
    await job.finish("", FinishReason.LENGTH, n_prompt=len(job.envelope.payload))


@pytest.fixture
async def sdk(gw: Running, machine: Machine) -> AsyncIterator[AsyncAnthropic]:
    machine.behaviour = counts
    async with AsyncAnthropic(api_key=gw.key, base_url=gw.url, max_retries=0) as client:
        yield client


async def test_the_replica_counts_what_the_message_would_be_answered_from(
    gw: Running, machine: Machine, sdk: AsyncAnthropic
) -> None:
    more: dict[str, Any] = {"system": "Be brief", "tools": [TOOL], "tool_choice": {"type": "any"}}
    plain = await sdk.messages.count_tokens(**BODY)
    told = await sdk.messages.count_tokens(**BODY, **more, thinking={"type": "disabled"})
    envelopes = [job.envelope for job in machine.jobs]
    assert [plain.input_tokens, told.input_tokens] == [len(e.payload) for e in envelopes]
    chat = json.loads(envelopes[1].payload)
    assert [m["role"] for m in chat["messages"]] == ["system", "user"]
    assert chat["tools"][0]["function"]["name"] == "now"

    async def answers(job: Job) -> None:
        await job.finish("Noon.", n=1)

    machine.behaviour = answers
    await sdk.messages.create(**BODY, **more, max_tokens=5)
    asked = json.loads(machine.jobs[-1].envelope.payload)
    assert asked.pop("max_tokens") == 5
    assert asked == chat, "the same prompt"
    assert {(e.endpoint, e.n_carried_prompt, e.slo) for e in envelopes} == {
        (Endpoint.CHAT, ALL_CHARGED, None)
    }


async def test_it_takes_a_request_and_no_tokens_or_money(
    gw: Running, machine: Machine, sdk: AsyncAnthropic
) -> None:
    key = gw.directory.add_key(key_limits=LimitsRow(rpm=2, input_tpm=3, output_tpm=3, budget_nano=10))
    mine = sdk.with_options(api_key=key)
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def waits(job: Job) -> None:
        begun.set()
        await go_on.wait()
        await counts(job)

    machine.behaviour = waits
    first = asyncio.create_task(mine.messages.count_tokens(**BODY))
    await begun.wait()
    record = await gw.record(machine.jobs[0].id)
    assert int(record[b"money"]) == 0
    go_on.set()
    assert (await first).input_tokens > 10, "more than its tokens a minute and its money"
    await mine.messages.count_tokens(**BODY)

    async def settled() -> dict[bytes, bytes] | None:
        limits = await gw.limit("key", f"{len(gw.directory.records) - 1:032x}")
        return limits if limits[b"conc"] == b"0" else None

    limits = await until(settled)
    assert (int(limits[b"held"]), int(limits[b"spent"])) == (0, 0)
    with pytest.raises(anthropic.RateLimitError) as limited:
        await mine.messages.count_tokens(**BODY)
    assert limited.value.response.headers["request-id"].startswith("req_")


async def test_it_is_no_answer_in_figures_and_copies(
    gw: Running, machine: Machine, sdk: AsyncAnthropic
) -> None:
    n = (await sdk.messages.count_tokens(**BODY)).input_tokens
    line = gw.log.lines[-1]
    assert (line.endpoint, line.status, line.n_prompt, line.n_completion) == ("count_tokens", 200, n, 0)
    metrics: GatewayMetrics = gw.gateway.metrics
    assert (metrics.n_prompt, metrics.n_completion) == (0, 0)


async def test_refusals_name_what_the_client_sent(gw: Running, machine: Machine, sdk: AsyncAnthropic) -> None:
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"messages": []}, "messages"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"stream": True}, "stream"),
        ({"tools": [{"name": "now", "input_schema": {"type": "array"}}]}, "tools[0].input_schema.type"),
    )
    for changes, param in refused:
        answer = await gw.post({**BODY, **changes}, path="/v1/messages/count_tokens")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert answer.json()["type"] == "error"
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        await sdk.messages.count_tokens(**{**BODY, "model": "other"})
    assert not machine.jobs

    async def elsewhere(job: Job) -> None:
        error = WireError(501, "count_unavailable", "it cannot count")
        await job.finish(reason=FinishReason.ERROR, n_prompt=0, error=error)

    machine.behaviour = elsewhere
    with pytest.raises(anthropic.InternalServerError, match="it cannot count") as failed:
        await sdk.messages.count_tokens(**BODY)
    assert failed.value.status_code == 501


async def test_without_a_replica_it_wakes_the_deployment_and_waits(gw: Running, redis_url: str) -> None:
    woken = gw.redis.pubsub()
    await woken.subscribe(KEYS.wake_channel)
    await woken.get_message(timeout=5)
    async with AsyncAnthropic(api_key=gw.key, base_url=gw.url, max_retries=0) as client:
        waiting = asyncio.create_task(client.messages.count_tokens(**BODY))

        async def told() -> Any:
            return await woken.get_message(ignore_subscribe_messages=True, timeout=0.1)

        assert (await until(told))["data"] == DEPLOYMENT.encode()
        machine = Machine(redis_url)
        machine.behaviour = counts
        await machine.start()
        try:
            assert (await waiting).input_tokens > 0
        finally:
            await machine.stop()
            await woken.aclose()


async def test_a_key_to_repeat_with_means_nothing_to_a_count(
    gw: Running, machine: Machine, sdk: AsyncAnthropic
) -> None:
    again = {"idempotency-key": "k", "last-event-id": "0" * 32 + ".1"}
    for _ in range(2):
        await sdk.messages.count_tokens(**BODY, extra_headers=again)
    assert len(machine.jobs) == 2
