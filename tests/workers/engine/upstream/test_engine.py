"""An endpoint elsewhere as an engine: what it is sent, what its answers become, and every way in which it fails."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import aclosing
from typing import Any

import pytest

from tests.workers.endpoints import Answerer, Call, endpoint
from workers.contract import Endpoint, FinishReason, UpstreamSecret, UpstreamSpec
from workers.engine.base import (
    UNKNOWN_ID,
    Delta,
    Engine,
    EngineFailed,
    EngineInputError,
    EngineRequest,
    SamplingSpec,
)
from workers.engine.upstream.engine import UpstreamEngine

CHAT = {"model": "ours", "messages": [{"role": "user", "content": "badi hoga"}], "user": "mallory", "seed": 7}


def ask(body: dict[str, Any] | None = None, **sampling: Any) -> EngineRequest:
    single = sampling.pop("single_tokens", False)
    where = Endpoint.COMPLETIONS if body and "prompt" in body else Endpoint.CHAT
    spec = SamplingSpec(**{"max_tokens": 40, **sampling})
    return EngineRequest(
        "r", [], spec, single_tokens=single, endpoint=where, body=json.dumps(body or CHAT).encode()
    )


async def collect(engine: UpstreamEngine, request: EngineRequest) -> list[Delta]:
    async with aclosing(engine.generate(request)) as deltas:
        return [delta async for delta in deltas]


async def failure_of(answer: Answerer, **changes: Any) -> tuple[EngineFailed, int]:
    """How a request ends that is answered so, and how many calls that took."""
    async with endpoint(answer) as there:
        engine = UpstreamEngine(there.spec(**changes), UpstreamSecret())
        with pytest.raises(EngineFailed) as failed:
            await collect(engine, ask())
        await engine.stop()
        return failed.value, len(there.calls)


async def well(call: Call) -> None:
    await call.words("badi", " hoga", " dete")


async def test_an_answer_is_handed_on_as_it_comes_and_counted_as_the_endpoint_says() -> None:
    async with endpoint(well) as there:
        secret = UpstreamSecret("sk-secret", {"X-Org": "o"})
        engine = UpstreamEngine(there.spec(), secret)
        deltas = await collect(engine, ask())
        assert "".join(d.text for d in deltas) == "badi hoga dete"
        assert [d.finish for d in deltas if d.finish] == [FinishReason.STOP] == [deltas[-1].finish]
        counted = deltas[-1].counted
        assert counted is not None
        assert (counted.n_prompt, counted.n_completion, counted.by) == (7, 3, "upstream")
        assert sum(len(d.token_ids) for d in deltas) == 3
        assert {t for d in deltas for t in d.token_ids} == {UNKNOWN_ID}
        [call] = there.calls
        assert call.path == "/v1/chat/completions"
        assert (call.headers["authorization"], call.headers["x-org"]) == ("Bearer sk-secret", "o")
        assert call.body == {
            "messages": CHAT["messages"],
            "seed": 7,
            "model": "their-model",
            "stream": True,
            "max_tokens": 40,
            "stream_options": {"include_usage": True},
        }  # fmt: skip - who asks stays here
        typed: Engine = engine
        assert typed.max_model_len == 2048


async def test_connections_are_kept_and_one_that_was_closed_meanwhile_is_no_failure() -> None:
    async def closes(call: Call) -> None:
        await well(call)
        call.writer.close()

    async with endpoint(well, well, closes, well) as there:
        engine = UpstreamEngine(there.spec(), UpstreamSecret())
        for _ in range(4):
            await collect(engine, ask())
        assert (len(there.calls), there.n_connections) == (4, 2)
        await engine.stop()


async def test_what_reports_no_usage_is_counted_here_and_marked() -> None:
    async def silent(call: Call) -> None:
        await call.words("badi hoga", " dete", usage=False)

    async with endpoint(silent) as there:
        for tokenizers, by, n in ((["toy"], "tokenizer", 3), (["/nowhere/tokenizer.json"], "estimate", 4)):
            deltas = await collect(UpstreamEngine(there.spec(tokenizers=tokenizers), UpstreamSecret()), ask())
            counted = deltas[-1].counted
            assert counted is not None
            assert (counted.n_prompt, counted.n_completion, counted.by) == (-1, n, by)


async def test_the_bill_is_never_more_than_was_asked_for_and_usage_corrects_in_both_directions() -> None:
    async def letters(call: Call) -> None:
        await call.words(*"badihogadete", usage=False)
        assert call.body["max_tokens"] == 40

    async def boasts(call: Call) -> None:
        await call.head()
        await call.text("badi", "stop")
        await call.usage(5, 4_000)
        await call.done()

    async def more(call: Call) -> None:
        await call.head()
        await call.text("badi hoga", "length")
        await call.usage(5, 20)
        await call.done()

    async with endpoint(letters, boasts, more) as there:
        engine = UpstreamEngine(there.spec(), UpstreamSecret())
        deltas = await collect(engine, ask())
        assert deltas[-1].counted is not None
        assert deltas[-1].counted.n_completion == 3  # by the tokenizer, whatever the pieces
        assert sum(len(d.token_ids) for d in deltas) <= 6
        assert (await collect(engine, ask()))[-1].counted.n_completion == 40  # type: ignore[union-attr]
        singly = await collect(engine, ask(single_tokens=True))
        assert sum(len(d.token_ids) for d in singly) == 20
        assert max(len(d.token_ids) for d in singly) == 1
        assert singly[-1].finish is FinishReason.LENGTH


async def test_completions_plain_bodies_and_probabilities_are_understood() -> None:
    async def plain(call: Call) -> None:
        said = {"choices": [{"index": 0, "text": "badi", "finish_reason": "stop"}]}
        await call.refuse("200 OK", {**said, "usage": {"prompt_tokens": 2, "completion_tokens": 1}})

    async def probable(call: Call) -> None:
        await call.head()
        content = [{"token": "badi", "logprob": -0.5, "top_logprobs": [{"token": "x", "logprob": -2}]}]
        choice = {"index": 0, "delta": {"content": "badi"}, "logprobs": {"content": content}}
        await call.event({"choices": [choice]})
        await call.text("", "stop")
        await call.done()

    async with endpoint(plain, probable) as there:
        engine = UpstreamEngine(there.spec(), UpstreamSecret())
        deltas = await collect(engine, ask({"prompt": "hoga"}))
        assert ("".join(d.text for d in deltas), deltas[-1].finish) == ("badi", FinishReason.STOP)
        assert there.calls[0].path == "/v1/completions"
        [told, _] = await collect(engine, ask({**CHAT, "logprobs": True}, logprobs=1))
        assert told.logprobs is not None
        assert (told.logprobs[0].text, told.logprobs[0].top) == ("badi", ((-1, "x", -2.0),))


async def test_what_a_plain_endpoint_does_not_know_is_refused_by_name() -> None:
    async with endpoint(well) as there:
        with pytest.raises(EngineInputError, match="top_k is not supported") as refused:
            await collect(UpstreamEngine(there.spec(), UpstreamSecret()), ask(top_k=5))
        assert refused.value.param == "top_k"
        await collect(UpstreamEngine(there.spec(extensions=True), UpstreamSecret()), ask(top_k=5))
        assert [call.body["top_k"] for call in there.calls] == [5]


async def hangs(call: Call) -> None:
    await call.until_gone()


async def hangs_after_head(call: Call) -> None:
    await call.head()
    await call.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    while True:  # life without a word is no progress
        await call.chunk(b": still here\n\n")
        await asyncio.sleep(0.02)


async def hangs_in_the_middle(call: Call) -> None:
    await call.head()
    await call.text("badi")
    await call.until_gone()


async def cut(call: Call) -> None:
    await call.head()
    await call.text("badi")
    call.writer.close()


async def cut_without_length(call: Call) -> None:
    await call.head("200 OK\r\nContent-Type: text/event-stream\r\nConnection: close")
    await call.raw(b'data: {"choices":[{"index":0,"delta":{"content":"badi"}}]}\n\n')
    call.writer.close()


async def drips(call: Call) -> None:
    await call.head()
    while True:
        await call.chunk(b"d")
        await asyncio.sleep(0.01)


async def oversized(call: Call) -> None:
    await call.head()
    await call.chunk(b"data: " + b"x" * (2 << 20))


async def endless(call: Call) -> None:
    await call.head()
    while True:
        await call.text("x" * 5_000)


async def error_in_between(call: Call) -> None:
    await call.head()
    await call.text("badi")
    await call.event({"error": {"message": "secret words", "code": "overloaded"}})


def says(data: bytes) -> Answerer:
    async def answer(call: Call) -> None:
        await call.raw(data)
        call.writer.close()

    return answer


def refuses(status: str, headers: str = "") -> Answerer:
    async def answer(call: Call) -> None:
        await call.refuse(status, {"error": {"message": "key sk-their-secret"}}, headers)

    return answer


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (hangs, 504, "upstream_timeout"),
        (hangs_after_head, 504, "upstream_timeout"),
        (hangs_in_the_middle, 504, "upstream_timeout"),
        (drips, 504, "upstream_timeout"),
        (cut, 502, "upstream_interrupted"),
        (cut_without_length, 502, "upstream_interrupted"),
        (error_in_between, 502, "upstream_failed"),
        (oversized, 502, "upstream_garbage"),
        (endless, 502, "upstream_garbage"),
        (says(b"SSH-2.0-OpenSSH_9.9\r\n"), 502, "upstream_failed"),
        (says(b""), 502, "upstream_failed"),
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nnot JSON."), 502, "upstream_garbage"),
        (says(b'HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{"hello": 12}'), 502, "upstream_garbage"),
        (says(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}"), 502, "upstream_garbage"),
        (says(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 80_000), 502, "upstream_failed"),
        (says(b"HTTP/1.1 " + b"302 Found\r\nLocation: http://169.254.169.254/\r\n\r\n"), 502, "upstream_misconfigured"),
        (refuses("500 No"), 502, "upstream_failed"),
        (refuses("429 Slow", "Retry-After: 60\r\n"), 503, "upstream_busy"),
        (refuses("401 Who"), 502, "upstream_refuses_us"),
        (refuses("404 No model"), 502, "upstream_misconfigured"),
    ],
)  # fmt: skip
async def test_every_way_to_fail_ends_the_request_with_a_reason(
    answer: Answerer, status: int, code: str
) -> None:
    limit_s = 0.15 if code == "upstream_timeout" else 60.0
    error, n_calls = await failure_of(answer, first_token_s=limit_s, between_tokens_s=limit_s)
    assert (error.status, error.code, n_calls) == (status, code, 1)
    assert "secret" not in error.message


async def test_a_request_that_the_endpoint_refuses_is_the_clients_400_and_no_failure_of_the_endpoint() -> (
    None
):
    async def refuses_it(call: Call) -> None:
        await call.refuse("400 Bad", {"error": {"message": "messages is too long", "param": "messages"}})

    async with endpoint(refuses_it) as there:
        engine = UpstreamEngine(there.spec(n_retries=3, breaker_failures=1), UpstreamSecret())
        with pytest.raises(EngineInputError, match="messages is too long"):
            await collect(engine, ask())
        assert len(there.calls) == 1
        assert engine.offered(8) == 8


async def test_it_is_tried_again_before_the_first_token_only_and_within_a_bound() -> None:
    async with endpoint(refuses("500 No"), says(b""), well) as there:
        engine = UpstreamEngine(there.spec(n_retries=2), UpstreamSecret())
        assert "".join(d.text for d in await collect(engine, ask())) == "badi hoga dete"
        assert len(there.calls) == 3
    error, n_calls = await failure_of(refuses("500 No"), n_retries=1)
    assert (error.code, n_calls) == ("upstream_failed", 2)
    error, n_calls = await failure_of(cut, n_retries=3)
    assert (error.code, n_calls) == ("upstream_interrupted", 1)  # its first token was shown
    error, n_calls = await failure_of(refuses("429 Slow", "Retry-After: 60\r\n"), n_retries=3)
    assert n_calls == 1  # nobody waits a minute


async def test_an_endpoint_that_fails_is_left_alone_and_tried_by_one_request_first() -> None:
    now_s = 100.0
    async with endpoint(refuses("500 No"), refuses("500 No"), well) as there:
        engine = UpstreamEngine(
            there.spec(breaker_failures=2, breaker_pause_s=5), UpstreamSecret(), lambda: now_s
        )
        for _ in range(2):
            assert engine.offered(8) == 8
            with pytest.raises(EngineFailed, match="failed"):
                await collect(engine, ask())
        assert (engine.offered(8), engine.note) == (0, "open upstream_failed")
        with pytest.raises(EngineFailed, match="left alone: try again in 5 s"):
            await collect(engine, ask())
        assert len(there.calls) == 2
        now_s += 5.1
        assert engine.offered(8) == 1
        await collect(engine, ask())
        assert (engine.offered(8), engine.note, len(there.calls)) == (8, "", 3)


async def test_a_client_that_leaves_closes_the_call_and_speaks_for_nothing() -> None:
    async with endpoint(hangs_in_the_middle) as there:
        engine = UpstreamEngine(there.spec(breaker_failures=1), UpstreamSecret())
        deltas = engine.generate(ask())
        await anext(deltas)
        await deltas.aclose()
        async with asyncio.timeout(30):
            assert await there.calls[0].gone.wait()
        assert engine.offered(8) == 8


async def test_addresses_are_judged_at_every_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async with endpoint(well) as there:
        for address in ("127.0.0.1", "::ffff:127.0.0.1", "169.254.169.254", "10.0.0.1"):
            answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, there.port))]

            async def resolves(*_: Any, answer: Any = answer, **__: Any) -> Any:
                return answer

            monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolves)
            url = f"http://rebound.example:{there.port}/v1"
            engine = UpstreamEngine(there.spec(base_url=url, allow="", n_retries=3), UpstreamSecret())
            with pytest.raises(EngineFailed, match="cannot be reached"):
                await collect(engine, ask())
        assert there.calls == []
        engine = UpstreamEngine(there.spec(base_url=url), UpstreamSecret())
        monkeypatch.undo()


def test_the_specification_survives_the_wire() -> None:
    import msgspec

    spec = UpstreamSpec(upstream="u", base_url="https://x.org/v1", model="m", role="overflow")  # type: ignore[arg-type]
    assert msgspec.json.decode(msgspec.json.encode(spec), type=UpstreamSpec) == spec
