"""What a client gets for a good request: whole answers and streams, in OpenAI's shapes, settled once."""

import asyncio

import pytest

from tests.controlplane.gateway.harness import CHAT, KEYS, Job, Machine, Running, text_of, until
from workers.contract import End, FinishReason, WireError


async def test_chat_answer_has_openai_shape_and_exact_usage(gw: Running, machine: Machine) -> None:
    response = await gw.post(CHAT)
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    assert body["choices"] == [
        {
            "index": 0,
            "logprobs": None,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "one two three", "refusal": None},
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    request = response.headers["x-request-id"]
    assert request.startswith("req_")
    assert body["id"] == "chatcmpl-" + request.removeprefix("req_")


async def test_completion_answer(gw: Running, machine: Machine) -> None:
    response = await gw.post({"model": "tiny", "prompt": "Say"}, path="/v1/completions")
    body = response.json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {"index": 0, "logprobs": None, "finish_reason": "stop", "text": "one two three"}
    ]


async def test_replica_gets_the_body_verbatim_with_checked_parameters(gw: Running, machine: Machine) -> None:
    raw = b'{ "model":"tiny","messages" :[{"role":"user","content":"h\\u00e9"}],"max_tokens":5,"stop":"x", "seed":3}'
    await gw.post(raw)
    envelope = machine.jobs[0].envelope
    assert envelope.payload == raw
    assert envelope.sampling.max_tokens == 5
    assert envelope.sampling.stop == ("x",)
    assert envelope.sampling.seed == 3
    assert not envelope.open_ended
    assert envelope.id == machine.jobs[0].id
    assert envelope.cache_salt == envelope.org, "prefixes are not shared between tenants"


async def test_request_without_max_tokens_may_use_the_context(gw: Running, machine: Machine) -> None:
    await gw.post(CHAT)
    envelope = machine.jobs[0].envelope
    assert envelope.open_ended
    assert 2000 < envelope.sampling.max_tokens < 2048


async def test_chat_stream_has_openai_chunks(gw: Running, machine: Machine) -> None:
    async with gw.stream(CHAT) as events:
        assert events.status == 200
        assert events.response.headers["content-type"].startswith("text/event-stream")
        chunks = await events.rest()
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(chunks) == "one two three"
    assert chunks[-2]["choices"][0] == {"index": 0, "logprobs": None, "finish_reason": "stop", "delta": {}}
    assert chunks[-1] == "[DONE]"
    assert len({c["id"] for c in chunks[:-1]}) == 1
    assert all("usage" not in c for c in chunks[:-1])
    request = machine.jobs[0].id
    assert events.ids == [f"{request}.{n}" for n in (0, 1, 2, 3, "3.2")], "ids are the tokens so far"


async def test_stream_tells_usage_when_asked(gw: Running, machine: Machine) -> None:
    async with gw.stream({**CHAT, "stream_options": {"include_usage": True}}) as events:
        chunks = await events.rest()
    assert [c["usage"] for c in chunks[:-2]] == [None] * (len(chunks) - 2)
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"]["total_tokens"] == 10


async def test_completion_stream(gw: Running, machine: Machine) -> None:
    async with gw.stream({"model": "tiny", "prompt": "Say"}, "/v1/completions") as events:
        chunks = await events.rest()
    assert {c["object"] for c in chunks[:-1]} == {"text_completion"}
    assert text_of(chunks) == "one two three"


async def test_tokens_arrive_as_they_are_made(gw: Running, machine: Machine) -> None:
    """No token waits for a later one."""
    go = asyncio.Event()

    async def one_then_wait(job: Job) -> None:
        await job.emit("first")
        await go.wait()
        await job.finish("last", n=1)

    machine.behaviour = one_then_wait
    async with gw.stream(CHAT) as events:
        await events.next()
        assert text_of([await events.next()]) == "first"
        go.set()
        assert text_of(await events.rest()) == "last"


async def test_text_is_escaped_as_json(gw: Running, machine: Machine) -> None:
    hard = 'quote " back \\ newline \n tab \t null \x00 ünï 🐎 \u2028 data: [DONE]'

    async def say(job: Job) -> None:
        await job.emit(hard)
        await job.finish()

    machine.behaviour = say
    assert (await gw.post(CHAT)).json()["choices"][0]["message"]["content"] == hard
    async with gw.stream(CHAT) as events:
        assert text_of(await events.rest()) == hard


@pytest.mark.parametrize(
    ("reason", "told", "note"),
    [
        (FinishReason.STOP, "stop", None),
        (FinishReason.LENGTH, "length", None),
        (FinishReason.BUDGET, "length", {"finish": "budget"}),
    ],
)
async def test_finish_reasons_are_openais(
    gw: Running, machine: Machine, reason: FinishReason, told: str, note: object
) -> None:
    async def end(job: Job) -> None:
        await job.emit("a")
        await job.finish(reason=reason)

    machine.behaviour = end
    body = (await gw.post(CHAT)).json()
    assert body["choices"][0]["finish_reason"] == told
    assert body.get("corral") == note
    async with gw.stream(CHAT) as events:
        last = (await events.rest())[-2]
    assert last["choices"][0]["finish_reason"] == told
    assert last.get("corral") == note


@pytest.mark.parametrize("streaming", [False, True])
async def test_refusal_of_the_replica_comes_as_a_status(
    gw: Running, machine: Machine, streaming: bool
) -> None:
    async def refuse(job: Job) -> None:
        error = WireError(400, "context_length_exceeded", "the prompt has 9000 tokens", "messages")
        await job.finish(reason=FinishReason.ERROR, n_prompt=0, error=error)

    machine.behaviour = refuse
    response = await gw.post({**CHAT, "stream": streaming})
    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": "the prompt has 9000 tokens",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }
    record = await gw.record(machine.jobs[0].id)
    assert record[b"state"] == b"done", "the hold was released"


async def test_failure_after_the_first_token_is_told_in_the_stream(gw: Running, machine: Machine) -> None:
    async def break_off(job: Job) -> None:
        await job.emit("part")
        await job.finish(reason=FinishReason.ERROR, error=WireError(500, "engine_died", "it died"))

    machine.behaviour = break_off
    async with gw.stream(CHAT) as events:
        chunks = await events.rest()
    assert text_of(chunks) == "part"
    assert chunks[-1]["error"]["code"] == "engine_died"
    assert "[DONE]" not in chunks


async def test_end_settles_holds_with_actual_counts_at_once(gw: Running, machine: Machine) -> None:
    from controlplane.gateway.directory import LimitsRow

    gw.key = gw.directory.add_key(
        key_limits=LimitsRow(output_tpm=10_000, max_concurrency=5, budget_nano=1_000_000)
    )
    await gw.post({**CHAT, "max_tokens": 100})
    key = machine.jobs[0].envelope.key

    async def settled() -> bool:
        return (await gw.record(machine.jobs[0].id))[b"state"] == b"done"

    await until(settled)
    limits = await gw.limit("key", key)
    assert limits[b"conc"] == b"0"
    assert limits[b"held"] == b"0"
    assert limits[b"spent"] == b"13", "7 prompt tokens at 1 and 3 at 2 nano-dollars"
    assert float(limits[b"out"]) >= 9_990
    assert int(await gw.redis.hget(KEYS.replica("r1"), "used")) == 0
    assert not gw.gateway.inbox.streams


async def test_estimates_learn_from_exact_counts(gw: Running, machine: Machine) -> None:
    async def count_double(job: Job) -> None:
        await job.finish("x", n=1, n_prompt=100)

    machine.behaviour = count_double
    for _ in range(2):
        await gw.post(CHAT)
    ids = [job.id for job in machine.jobs]
    estimates = [int((await gw.record(request))[b"in_est"]) for request in ids]
    assert estimates[0] < 30
    assert 90 <= estimates[1] <= 110


async def test_absurd_counts_of_a_machine_are_bounded_by_the_hold(gw: Running, machine: Machine) -> None:
    from controlplane.gateway.directory import LimitsRow

    gw.key = gw.directory.add_key(key_limits=LimitsRow(budget_nano=1_000_000))

    async def lie(job: Job) -> None:
        end = End(FinishReason.STOP, -5, 10**12, 10**15)
        job_finish = job._flush("x", 1, end, False)
        await job_finish

    machine.behaviour = lie
    assert (await gw.post({**CHAT, "max_tokens": 10})).status_code == 200
    key = machine.jobs[0].envelope.key

    async def spent() -> bytes | None:
        return (await gw.limit("key", key)).get(b"spent")

    await until(lambda: not gw.gateway.inbox.streams)
    assert await spent() == b"20", "ten tokens were held, ten are charged"


async def test_models_are_those_of_the_key(gw: Running) -> None:
    key = gw.directory.add_key(names=("b", "a"))
    response = await gw.http.get("/v1/models", headers=gw.auth(key))
    assert response.json()["object"] == "list"
    assert [m["id"] for m in response.json()["data"]] == ["a", "b"]
    one = await gw.http.get("/v1/models/a", headers=gw.auth(key))
    assert one.json()["id"] == "a"
    assert one.json()["object"] == "model"
    missing = await gw.http.get("/v1/models/tiny", headers=gw.auth(key))
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
