"""The last credit, shared: streams are topped up token by token, and the money ends exactly, never early."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.controlplane.gateway.fronted import fronted
from tests.controlplane.gateway.harness import Running, until
from workers.config import ServeTuning

OUT_NANO = 2  # of one output token; a prompt token costs 1 (FakeDirectory)


def _chat(n: int, max_tokens: int, *, stream: bool = True, text: str = "Hello there") -> dict[str, Any]:
    message = {"role": "user", "content": f"{text} {n}"}
    body = {
        "model": "tiny",
        "messages": [message],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": stream,
    }
    return body | ({"stream_options": {"include_usage": True}} if stream else {})


async def _streamed(gw: Running, body: dict[str, Any]) -> tuple[str, dict[str, int]]:
    """(how it ended, usage) of a stream; the status must have been 200."""
    async with gw.stream(body) as events:
        assert events.status == 200
        rest = await events.rest()
    finish = next(
        e["corral"]["finish"] if "corral" in e else e["choices"][0]["finish_reason"]
        for e in rest
        if isinstance(e, dict) and e.get("choices") and e["choices"][0]["finish_reason"]
    )
    usage = next(e["usage"] for e in rest if isinstance(e, dict) and e.get("usage"))
    return finish, usage


def _cost(usage: dict[str, int]) -> int:
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return usage["prompt_tokens"] - cached + cached // 2 + OUT_NANO * usage["completion_tokens"]


async def _quiet(gw: Running, key_id: str) -> dict[bytes, bytes]:
    """The key's counters once nothing is in flight."""

    async def idle() -> dict[bytes, bytes] | None:
        counters = await gw.limit("key", key_id)
        return counters if counters.get(b"conc") == b"0" else None

    found: dict[bytes, bytes] = await until(idle)
    assert found[b"held"] == b"0"
    assert found.get(b"ask", b"0") == b"0", "nobody waits any more"
    return found


def _limited(gw: Running, budget_nano: int) -> str:
    """Give the gateway's key a budget; the key's id."""
    from controlplane.gateway.directory import LimitsRow

    gw.key = gw.directory.add_key(key_limits=LimitsRow(budget_nano=budget_nano))
    return list(gw.directory.records.values())[-1].key.id


@pytest.mark.parametrize("budget", [1_000, 3_001, 9_000])
async def test_32_streams_share_the_last_credit_to_the_token(
    redis_url: str, tmp_path: Path, budget: int
) -> None:
    async with fronted(redis_url, tmp_path) as (gw, _):
        key_id = _limited(gw, budget)
        ended = await asyncio.gather(*(_streamed(gw, _chat(n, 400)) for n in range(32)))
        counters = await _quiet(gw, key_id)
    assert {finish for finish, _ in ended} == {"budget"}
    assert all(usage["completion_tokens"] >= 1 for _, usage in ended), "everybody who was admitted ran"
    spent = sum(_cost(usage) for _, usage in ended)
    assert int(counters[b"spent"]) == spent
    assert budget - OUT_NANO < spent <= budget


async def test_what_short_answers_return_feeds_the_long_ones(redis_url: str, tmp_path: Path) -> None:
    """Nobody ends with `budget` while there is credit: 24 short streams leave enough for 8 long ones."""
    async with fronted(redis_url, tmp_path) as (gw, _):
        bodies = [_chat(n, 12 if n % 4 else 300) for n in range(32)]
        prompts = 32 * 20
        key_id = _limited(gw, prompts + OUT_NANO * (24 * 12 + 8 * 300))
        ended = await asyncio.gather(*(_streamed(gw, body) for body in bodies))
        await _quiet(gw, key_id)
    assert {finish for finish, _ in ended} == {"length"}
    assert [usage["completion_tokens"] for _, usage in ended] == [body["max_tokens"] for body in bodies]


async def test_plain_answers_are_held_whole_so_ten_of_64_are_served(redis_url: str, tmp_path: Path) -> None:
    async with fronted(redis_url, tmp_path, step_ms=5) as (gw, _):
        _limited(gw, 10**9)
        one = (await gw.post(_chat(10, 40, stream=False))).json()["usage"]
        key_id = _limited(gw, 10 * _cost(one))
        answers = await asyncio.gather(*(gw.post(_chat(10 + n, 40, stream=False)) for n in range(64)))
        counters = await _quiet(gw, key_id)
    served = [answer.json() for answer in answers if answer.status_code == 200]
    assert len(served) == 10
    assert all(body["usage"]["completion_tokens"] == 40 for body in served)
    assert {answer.json()["error"]["code"] for answer in answers if answer.status_code != 200} == {
        "insufficient_quota"
    }
    assert int(counters[b"spent"]) <= 10 * _cost(one)


async def test_a_prompt_longer_than_estimated_is_paid_for_before_it_runs(
    redis_url: str, tmp_path: Path
) -> None:
    """The estimate is a quarter of the bytes; one-letter words are a token each."""
    async with fronted(redis_url, tmp_path) as (gw, _):
        budget = 500
        key_id = _limited(gw, budget)
        ended = await asyncio.gather(*(_streamed(gw, _chat(n, 50, text="x " * 60)) for n in range(6)))
        counters = await _quiet(gw, key_id)
    assert int(counters[b"spent"]) <= budget
    assert all(usage["prompt_tokens"] == 0 for _, usage in ended if usage["completion_tokens"] == 0)
    assert any(usage["completion_tokens"] for _, usage in ended)


async def test_a_plain_answer_to_a_longer_prompt_than_estimated_costs_no_more_than_was_held(
    redis_url: str, tmp_path: Path
) -> None:
    async with fronted(redis_url, tmp_path) as (gw, _):
        body = _chat(0, 50, stream=False, text="x " * 60)
        budget = 40 + OUT_NANO * 50  # enough for the estimate
        key_id = _limited(gw, budget)
        answer = (await gw.post(body)).json()
        counters = await _quiet(gw, key_id)
    assert answer["corral"]["finish"] == "budget"
    assert answer["usage"]["prompt_tokens"] > 40, "not what was estimated"
    assert budget - OUT_NANO < int(counters[b"spent"]) <= budget


async def test_who_finds_nothing_left_waits_for_what_others_return(redis_url: str, tmp_path: Path) -> None:
    """A plain answer holds 1,500 tokens and stops by itself after at most 200."""
    async with fronted(redis_url, tmp_path) as (gw, _):
        plain = _chat(0, 1_500, stream=False) | {"ignore_eos": False}
        key_id = _limited(gw, 2 * 20 + OUT_NANO * (1_500 + 20))
        answer = asyncio.ensure_future(gw.post(plain))
        await until(lambda: gw.gateway.inbox.streams)
        await asyncio.sleep(0)
        finish, usage = await _streamed(gw, _chat(1, 300))
        assert (await answer).json()["choices"][0]["finish_reason"] == "stop"
        await _quiet(gw, key_id)
    assert (finish, usage["completion_tokens"]) == ("length", 300)


async def test_without_an_answer_a_stream_ends_at_what_it_holds(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway does not answer (it died, and somebody else reads the journal): bounded, exact, told."""
    async with fronted(redis_url, tmp_path, tuning=ServeTuning(budget_patience_s=0.1)) as (gw, _):
        key_id = _limited(gw, 2_000)
        monkeypatch.setattr(gw.gateway.inbox, "_on_ask", lambda *_: None)
        finish, usage = await _streamed(gw, _chat(0, 400))
        await _quiet(gw, key_id)
    assert finish == "budget"
    assert 1 <= usage["completion_tokens"] <= 2_000 // OUT_NANO // 64
