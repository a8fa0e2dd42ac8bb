"""Every wrong request gets the status, code and field that name what is wrong, before anything is
reserved."""

import asyncio
from typing import Any

import pytest

from controlplane.gateway.directory import LimitsRow
from tests.controlplane.gateway.harness import CHAT, KEYS, Machine, Running
from tests.controlplane.gateway.test_answers import text_of

PROMPT = {"model": "tiny", "prompt": "Say"}


def chat(**changes: Any) -> dict[str, Any]:
    return {**CHAT, **changes}


async def refused(gw: Running, body: Any, path: str = "/v1/chat/completions") -> tuple[int, dict[str, Any]]:
    response = await gw.post(body, path=path)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert await gw.redis.keys(KEYS.prefix + "*") == [KEYS.born.encode()], "nothing was reserved"
    return response.status_code, error


@pytest.mark.parametrize(
    ("body", "path", "status", "param", "code"),
    [
        (chat(temperature="hot"), "/v1/chat/completions", 400, "temperature", "invalid_type"),
        (chat(mesages=[]), "/v1/chat/completions", 400, "mesages", "unknown_parameter"),
        ({"model": "tiny", "prompt": ""}, "/v1/completions", 400, "prompt", "invalid_value"),
        (b"{", "/v1/chat/completions", 400, None, "invalid_json"),
        (b"[]", "/v1/completions", 400, None, "invalid_type"),
    ],
)
async def test_bad_body_reserves_nothing(
    gw: Running, body: Any, path: str, status: int, param: str, code: str
) -> None:
    """Every field has its row in test_schemas.py; these go the whole way."""
    got, error = await refused(gw, body, path)
    assert (got, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == "invalid_request_error"


async def test_unknown_model_names_those_the_key_may_use(gw: Running) -> None:
    gw.key = gw.directory.add_key(names=("small", "large"))
    status, error = await refused(gw, chat(model="gpt-4o"))
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "large, small" in error["message"]


async def test_model_of_another_tenant_looks_unknown(gw: Running) -> None:
    gw.directory.add_key(names=("secret-model",), organization="e" * 32)
    status, error = await refused(gw, chat(model="secret-model"))
    assert status == 404
    assert "tiny" in error["message"]


async def test_declared_body_over_the_limit_is_a_413_before_it_is_read(gw: Running) -> None:
    """Nothing of the body was sent when the answer comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gw.url.rsplit(":", 1)[1]))
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + gw.key.encode()
        + b"\r\ncontent-length: %d\r\n\r\n" % (gw.gateway.config.max_body_bytes + 1)
    )  # fmt: skip
    head = await asyncio.wait_for(reader.readuntil(b"request_too_large"), 10)
    assert head.startswith(b"HTTP/1.1 413")
    writer.close()


async def test_client_that_sends_everything_first_still_sees_the_413(gw: Running) -> None:
    response = await gw.post(b"x" * (gw.gateway.config.max_body_bytes + 1))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


async def test_undeclared_body_over_the_limit_is_a_413(gw: Running) -> None:
    async def endless() -> Any:
        for _ in range(80):
            yield b"x" * 65_536

    response = await gw.http.post("/v1/chat/completions", content=endless(), headers=gw.auth())
    assert response.status_code == 413


async def test_body_just_within_the_limit_is_read(gw: Running, machine: Machine) -> None:
    text = "y" * (gw.gateway.config.max_body_bytes - 200)
    gw.key = gw.directory.add_key(context=10_000_000)
    response = await gw.post(chat(messages=[{"role": "user", "content": text}]))
    assert response.status_code == 200, response.text


async def test_compressed_body_is_refused(gw: Running) -> None:
    response = await gw.post(CHAT, **{"content-encoding": "gzip"})
    assert response.status_code == 400
    assert "Content-Encoding" in response.json()["error"]["message"]


async def test_unknown_route_and_wrong_method(gw: Running) -> None:
    response = await gw.post(CHAT, path="/v1/embeddings")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_route")
    response = await gw.http.get("/v1/chat/completions", headers=gw.auth())
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    response = await gw.http.delete("/v1/models", headers=gw.auth())
    assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD")
    assert response.headers["x-request-id"].startswith("req_")


async def test_harmless_fields_are_accepted(gw: Running, machine: Machine) -> None:
    body = chat(
        user="u", metadata={"a": "b"}, store=False, service_tier="auto", seed=7, n=1, logprobs=False, tools=[],
        tool_choice="auto", parallel_tool_calls=True, response_format={"type": "text"}, temperature=None,
        stop=None, prompt_cache_key="k", safety_identifier="s", modalities=["text"], top_k=-1, min_p=0.1,
        repetition_penalty=1.1, ignore_eos=True, logit_bias={"5": -100}, frequency_penalty=0.5, verbosity=None,
    )  # fmt: skip
    assert (await gw.post(body)).status_code == 200
    sampling = machine.jobs[0].envelope.sampling
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (0, 0.1, 1.1)
    assert sampling.ignore_eos
    assert sampling.logit_bias == {"5": -100.0}


async def test_list_of_one_prompt_is_a_prompt(gw: Running, machine: Machine) -> None:
    response = await gw.post({**PROMPT, "prompt": ["Say"]}, path="/v1/completions")
    assert response.status_code == 200


async def test_text_parts_and_tool_history_are_accepted(gw: Running, machine: Machine) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "4", "tool_call_id": "1"},
        {"role": "user", "content": "Hello", "name": "ann"},
    ]
    async with gw.stream(chat(messages=messages)) as events:
        assert text_of(await events.rest()) == "one two three"


async def test_limits_are_not_touched_by_a_bad_request(gw: Running, machine: Machine) -> None:
    gw.key = gw.directory.add_key(key_limits=LimitsRow(rpm=1))
    bodies = [chat(temperature=9), chat(model="none"), CHAT, CHAT]
    assert [(await gw.post(body)).status_code for body in bodies] == [400, 404, 200, 429]
