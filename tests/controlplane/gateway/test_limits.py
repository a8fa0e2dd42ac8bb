"""Limits and budgets as OpenAI's clients expect them: 429 with the limit, the scope and when to retry."""

import asyncio
import time

from controlplane.gateway.directory import LimitsRow
from tests.controlplane.gateway.harness import CHAT, DEPLOYMENT, KEYS, Job, Machine, Running, until
from workers.contract import FinishReason


async def test_rate_limit_says_which_and_when_to_retry(gw: Running, machine: Machine) -> None:
    gw.key = gw.directory.add_key(key_limits=LimitsRow(rpm=2))
    assert [(await gw.post(CHAT)).status_code for _ in range(2)] == [200, 200]
    response = await gw.post(CHAT)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (429, "rate_limit_exceeded")
    assert "requests per minute" in error["message"]
    assert "API key" in error["message"]
    assert 1 <= int(response.headers["retry-after"]) <= 30
    assert 0 < int(response.headers["retry-after-ms"]) <= 30_000
    assert response.headers["x-ratelimit-limit-requests"] == "2"
    assert response.headers["x-ratelimit-remaining-requests"] == "0"
    assert response.headers["x-corral-scope"] == "key"


async def test_concurrency_is_given_back_at_the_end(gw: Running, machine: Machine) -> None:
    gw.key = gw.directory.add_key(key_limits=LimitsRow(max_concurrency=1))
    go = asyncio.Event()

    async def wait(job: Job) -> None:
        await go.wait()
        await job.finish("x", n=1)

    machine.behaviour = wait
    first = asyncio.ensure_future(gw.post(CHAT))
    await until(lambda: machine.jobs)
    refused = await gw.post(CHAT)
    assert (refused.status_code, refused.headers["x-corral-limit"]) == (429, "concurrency")
    go.set()
    assert (await first).status_code == 200

    async def served() -> bool:
        return (await gw.post(CHAT)).status_code == 200

    await until(served)


async def test_used_up_budget_is_insufficient_quota_and_not_retried(gw: Running, machine: Machine) -> None:
    gw.key = gw.directory.add_key(key_limits=LimitsRow(budget_nano=100))
    key = list(gw.directory.records.values())[-1].key.id
    gw.directory.spent[("key", key)] = 100
    response = await gw.post(CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "insufficient_quota")
    assert response.json()["error"]["type"] == "insufficient_quota"
    assert response.headers["x-should-retry"] == "false"
    assert "retry-after" not in response.headers


async def test_budget_already_spent_is_read_from_the_ledger_once(gw: Running, machine: Machine) -> None:
    gw.key = gw.directory.add_key(key_limits=LimitsRow(budget_nano=1_000_000))
    key = list(gw.directory.records.values())[-1].key.id
    gw.directory.spent[("key", key)] = 400
    assert (await gw.post(CHAT)).status_code == 200
    gw.directory.spent[("key", key)] = 999_999
    assert (await gw.post(CHAT)).status_code == 200

    async def booked() -> bool:
        return (await gw.limit("key", key))[b"spent"] == b"426"

    await until(booked)


async def test_budget_cannot_be_read_is_a_503(gw: Running, machine: Machine) -> None:
    gw.key = gw.directory.add_key(key_limits=LimitsRow(budget_nano=1_000_000))
    assert (await gw.http.get("/v1/models", headers=gw.auth())).status_code == 200
    gw.directory.up = False
    response = await gw.post(CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "budget_unavailable")
    assert "retry-after" in response.headers


async def test_answer_is_cut_where_the_money_ends(gw: Running, machine: Machine) -> None:
    """What is left pays for the prompt and some tokens: the lease holds exactly those."""
    gw.key = gw.directory.add_key(key_limits=LimitsRow(budget_nano=60))
    n_allowed = 0

    async def spend(job: Job) -> None:
        nonlocal n_allowed
        while await job.emit("x ") == "a":
            n_allowed += 1
        await job.finish(reason=FinishReason.BUDGET)

    machine.behaviour = spend
    body = (await gw.post(CHAT)).json()
    assert body["corral"] == {"finish": "budget"}
    assert body["usage"]["completion_tokens"] == n_allowed
    estimated = int((await gw.record(machine.jobs[0].id))[b"in_est"])
    assert n_allowed == (60 - estimated) // 2


async def test_money_of_a_long_prompt_is_held_for_more_than_its_estimate(
    gw: Running, machine: Machine
) -> None:
    """Or every other one would have to ask for more before its first token."""
    gw.key = gw.directory.add_key(key_limits=LimitsRow(budget_nano=10**9))
    long = {"role": "user", "content": "word " * 1_200}
    assert (await gw.post(CHAT | {"messages": [long], "max_tokens": 4})).status_code == 200
    [job] = machine.jobs
    estimated = int((await gw.record(job.id))[b"in_est"])
    assert 1_024 < estimated < 1_900
    assert 1.01 * estimated < job.envelope.n_prompt_held < 1.5 * estimated
    held = int((await gw.record(job.id))[b"money"])
    assert held >= job.envelope.n_prompt_held + 2 * 4, "at 1 and 2 nano-dollars a token"


async def test_short_prompts_are_held_for_as_estimated_once_money_may_be_short(
    gw: Running, machine: Machine
) -> None:
    """While there is money for many more, none of them has to ask because of a token; the last ones find theirs."""
    await machine.enrol(slots=64)
    held = {}
    for budget_nano in (10**9, 30 * 60):  # beyond 64 such requests, and not
        gw.key = gw.directory.add_key(key_limits=LimitsRow(budget_nano=budget_nano))
        for _ in range(3):
            assert (await gw.post(CHAT | {"max_tokens": 20})).status_code == 200
        job = machine.jobs[-1]
        held[budget_nano] = job.envelope.n_prompt_held - int((await gw.record(job.id))[b"in_est"])
    assert held[10**9] > 0
    assert held[30 * 60] == 0


async def test_after_redis_lost_everything_rates_fill_from_empty(gw: Running, machine: Machine) -> None:
    """What was used is not known any more. Over the loss: at most the full limit, and what has filled since."""
    gw.key = gw.directory.add_key(key_limits=LimitsRow(rpm=60))

    async def admitted(n: int) -> int:
        answers = await asyncio.gather(*(gw.post(CHAT) for _ in range(n)))
        return sum(answer.status_code == 200 for answer in answers)

    assert await admitted(70) >= 60
    n_before = gw.gateway.redis.n_disconnects
    started_at = time.monotonic()
    await gw.redis.flushall()
    for client in await gw.redis.client_list(_type="normal"):
        if client["name"].startswith("gateway-"):
            await gw.redis.client_kill_filter(_id=client["id"])
    await until(lambda: gw.gateway.redis.n_disconnects > n_before and gw.gateway.redis.connected)
    await machine.enrol()
    await until(lambda: gw.gateway.subscriber.connected)
    n = await admitted(70)
    since_s = time.monotonic() - started_at
    assert n <= since_s + 1, "one a second, from the moment it was found empty"


async def test_refused_request_leaves_nothing_behind(gw: Running) -> None:
    gw.key = gw.directory.add_key(key_limits=LimitsRow(max_concurrency=0))
    assert (await gw.post(CHAT)).status_code == 429
    assert not gw.gateway.inbox.streams
    assert await gw.redis.keys(KEYS.prefix + "*") == [KEYS.born.encode()]


async def test_every_answer_says_where_the_limits_stand(gw: Running, machine: Machine) -> None:
    """Plain, streamed and refused; equal to the counters right after this request was admitted."""
    gw.key = gw.directory.add_key(key_limits=LimitsRow(rpm=3, input_tpm=9_000, output_tpm=50_000))
    body = CHAT | {"max_tokens": 100}
    plain = (await gw.post(body)).headers
    taken = 9_000 - int(plain["x-ratelimit-remaining-input-tokens"])
    assert 1 <= taken < 100
    assert plain["x-ratelimit-limit-requests"] == "3"
    assert plain["x-ratelimit-remaining-requests"] == "2"
    assert plain["x-ratelimit-reset-requests"] == "20000ms"
    assert plain["x-ratelimit-limit-output-tokens"] == "50000"
    assert plain["x-ratelimit-remaining-output-tokens"] == "49900"
    assert plain["x-ratelimit-reset-output-tokens"] == "120ms"
    assert plain["x-ratelimit-limit-tokens"] == plain["x-ratelimit-limit-input-tokens"] == "9000", (
        "the tighter one"
    )
    assert plain["x-ratelimit-remaining-tokens"] == plain["x-ratelimit-remaining-input-tokens"]
    assert plain["x-ratelimit-reset-tokens"] == plain["x-ratelimit-reset-input-tokens"]
    async with gw.stream(body) as events:
        assert events.response.headers["x-ratelimit-remaining-requests"] == "1"
        await events.rest()
    assert (await gw.post(body)).headers["x-ratelimit-remaining-requests"] == "0"
    refused = await gw.post(body)
    assert refused.status_code == 429
    assert refused.headers["x-ratelimit-limit-output-tokens"] == "50000"
    assert int(refused.headers["retry-after-ms"]) <= int(refused.headers["x-ratelimit-reset-requests"][:-2])


async def test_an_answer_without_limits_has_no_such_headers(gw: Running, machine: Machine) -> None:
    assert not [name for name in (await gw.post(CHAT)).headers if name.startswith("x-ratelimit")]


async def test_a_prompt_of_token_ids_is_held_to_the_token_and_teaches_nothing(
    gw: Running, machine: Machine
) -> None:
    gw.key = gw.directory.add_key(key_limits=LimitsRow(input_tpm=100))
    go = asyncio.Event()

    async def wait(job: Job) -> None:
        await go.wait()
        await job.finish("x", n=1)

    machine.behaviour = wait
    body = {"model": "tiny", "prompt": list(range(40)), "stream": True}
    async with gw.stream(body, "/v1/completions") as first, gw.stream(body, "/v1/completions") as second:
        left = [int(s.response.headers["x-ratelimit-remaining-input-tokens"]) for s in (first, second)]
        assert left[0] == 60 and 20 <= left[1] <= 22, "a minute gives back 100 of them"
        assert (await gw.post(body, path="/v1/completions")).status_code == 429
        go.set()
        await asyncio.gather(first.rest(), second.rest())
    organization = list(gw.directory.records.values())[-1].organization.id
    await until(lambda: gw.gateway.ends.calibration(organization, DEPLOYMENT).n_answers == 2)
    assert gw.gateway.ends.calibration(organization, DEPLOYMENT).n == 0
