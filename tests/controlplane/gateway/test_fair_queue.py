"""What the gateway tells the fair queue: weights, band, order, prefixes, lengths, and what was really produced."""

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.gateway.directory import PriceRow, RuleRow, SloBook, SloRow
from controlplane.policy import prefix
from controlplane.policy.flows import TOKEN
from controlplane.policy.ordering import QueueOrder
from controlplane.prediction.lengths.features import BUCKETS, DENSE, features
from controlplane.prediction.lengths.model import Head, LengthModel, save
from controlplane.tenants import api_keys
from tests.controlplane.gateway.harness import (
    CHAT,
    DEPLOYMENT,
    KEYS,
    FakeDirectory,
    Job,
    Machine,
    Running,
    running,
    until,
)

V = f"{KEYS.prefix}dep:{DEPLOYMENT}:v"
ORG, PROJECT = "0" * 32, "1" * 32


class Held:
    """A replica with one slot, whose requests end when they are told to."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.order: list[str] = []
        self._go: dict[str, asyncio.Event] = {}
        self.end: dict[str, Any] = {"text": "x", "n": 1}

    async def serve(self, job: Job) -> None:
        word = job.envelope.payload.decode().split('"content"')[1].split('"')[1]
        self.order.append(word)
        await self._go.setdefault(word, asyncio.Event()).wait()
        await job.finish(**self.end)

    def release(self, word: str) -> None:
        self._go.setdefault(word, asyncio.Event()).set()

    def release_all(self) -> None:
        for word in ("busy", "a", "b", "c", "d", "e"):
            self.release(word)


@pytest.fixture
async def held(gw: Running, redis_url: str) -> AsyncIterator[Held]:
    machine = Machine(redis_url)
    held = Held(machine)
    machine.behaviour = held.serve
    await machine.start(slots=1)
    yield held
    held.release_all()
    await machine.stop()


def says(word: str, **fields: Any) -> dict[str, Any]:
    return {**CHAT, "messages": [{"role": "user", "content": word}], **fields}


async def send(gw: Running, body: dict[str, Any], key: str = "", **headers: str) -> asyncio.Task[Any]:
    """On its way, and waiting in the queue."""
    n = await gw.redis.zcard(KEYS.queue(DEPLOYMENT))

    async def post() -> Any:
        others = {name.replace("_", "-"): value for name, value in headers.items()}
        return await gw.http.post("/v1/chat/completions", json=body, headers=gw.auth(key or None) | others)

    task = asyncio.ensure_future(post())

    async def waits() -> bool:
        return await gw.redis.zcard(KEYS.queue(DEPLOYMENT)) == n + 1

    await until(waits)
    return task


async def occupy(gw: Running, held: Held) -> asyncio.Task[Any]:
    task = asyncio.ensure_future(gw.post(says("busy")))
    await until(lambda: "busy" in held.order)
    return task


def change_deployment(gw: Running, **values: Any) -> None:
    for lookup, record in gw.directory.records.items():
        deployments = tuple(replace(row, **values) for row in record.deployments)
        gw.directory.records[lookup] = replace(record, deployments=deployments)


def change_book(gw: Running, book: SloBook) -> None:
    for lookup, record in gw.directory.records.items():
        gw.directory.records[lookup] = replace(record, slo=book)


async def counters(gw: Running) -> dict[str, int]:
    found = await gw.redis.hgetall(V)
    return {name.decode(): int(value) for name, value in found.items()}


async def test_a_flex_request_waits_behind_all_others(gw: Running, held: Held) -> None:
    await occupy(gw, held)
    tasks = [
        await send(gw, says("a", service_tier="flex")),
        await send(gw, says("b", service_tier="default")),
    ]
    held.release_all()
    assert {(await task).status_code for task in tasks} == {200}
    assert held.order == ["busy", "b", "a"]


async def test_another_tier_is_refused_by_name(gw: Running) -> None:
    response = await gw.post(says("a", service_tier="scale"))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "service_tier")
    assert "flex" in error["message"]


async def test_a_request_names_its_class_by_header_where_it_may(gw: Running, held: Held) -> None:
    """The deployment's class is interactive: those below are everybody's, one that nobody knows is a 400."""
    await occupy(gw, held)
    tasks = [
        await send(gw, says("a"), x_corral_slo_class="batch"),
        await send(gw, says("b"), x_corral_slo_class="standard"),
        await send(gw, says("c", service_tier="priority")),
    ]
    held.release_all()
    assert {(await task).status_code for task in tasks} == {200}
    assert held.order == ["busy", "c", "b", "a"]
    refused = await gw.post(says("a"), **{"x-corral-slo-class": "gold"})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (400, "slo_class_unavailable")
    assert "batch, flex, interactive, standard" in error["message"]


async def test_a_rule_sets_the_default_and_grants_what_is_above(gw: Running, held: Held) -> None:
    """The deployment's class is batch; by rule the key's requests are standard, and nothing makes them interactive."""
    change_deployment(gw, slo=SloRow(2, 600_000, 2_000, "batch"))
    change_book(gw, SloBook(rules=(RuleRow("standard", is_default=True, ttft_ms=7_000),)))
    seen = gw.gateway.key_cache
    key = await seen.authenticate(f"Bearer {gw.key}".encode(), None)
    (served,) = key.deployments.values()
    assert (served.promise.name, served.promise.ttft_ms, served.own_class) == ("standard", 7_000, "batch")
    assert sorted(served.classes) == ["batch", "flex", "standard"]
    refused = await gw.post(says("a"), **{"x-corral-slo-class": "interactive"})
    assert refused.status_code == 400
    await occupy(gw, held)
    tasks = [await send(gw, says("a", service_tier="default")), await send(gw, says("b"))]
    tasks.append(await send(gw, says("c", service_tier="priority")))
    held.release_all()
    assert {(await task).status_code for task in tasks} == {200}
    assert sorted(held.order[1:3]) == ["b", "c"], held.order
    assert held.order[3] == "a"


async def test_a_class_with_a_price_of_its_own_is_charged_at_it(gw: Running, held: Held) -> None:
    cheap = PriceRow("e" * 32, 100_000, 50_000, 200_000)
    change_book(gw, SloBook(prices={DEPLOYMENT: {"flex": cheap}}))
    held.release_all()
    assert (await gw.post(says("a"))).status_code == 200
    assert (await gw.post(says("b", service_tier="flex"))).status_code == 200
    assert [job.envelope.price_version for job in held.machine.jobs] == ["c" * 32, "e" * 32]


async def test_tenants_take_turns_whoever_came_first(gw: Running, held: Held) -> None:
    """Without a window, within which they would be equals and the earliest deadline first."""
    other = gw.directory.add_key(organization="2" * 32, project="3" * 32)
    change_deployment(gw, locality_window_tokens=0)
    held.release("e")
    assert (await gw.post(says("e"))).status_code == 200  # answers have one token: known from now on
    await occupy(gw, held)
    tasks = [await send(gw, says(word)) for word in ("a", "b", "c")]
    tasks.append(await send(gw, says("d"), other))
    held.release_all()
    assert {(await task).status_code for task in tasks} == {200}
    assert held.order.index("d") <= 3, held.order


async def test_weights_and_expected_length_of_the_directory_reach_the_queue(gw: Running, held: Held) -> None:
    lookup = api_keys.lookup_of(gw.key)
    assert lookup
    record = gw.directory.records[lookup]
    gw.directory.records[lookup] = replace(
        record,
        key=replace(record.key, weight=30),
        project=replace(record.project, weight=20),
        organization=replace(record.organization, weight=10),
    )
    await occupy(gw, held)
    task = await send(gw, says("a", max_tokens=12))
    (request,) = await gw.redis.zrange(KEYS.queue(DEPLOYMENT), 0, -1)
    fields = await gw.record(request.decode())
    assert (fields[b"fq"], fields[b"pred"], fields[b"pfx"]) == (b"0,30,20,10", b"12", b"")
    held.release_all()
    await task


async def test_an_answer_is_expected_as_long_as_the_tenants_last_ones(gw: Running, held: Held) -> None:
    held.end |= {"n": 9}
    held.release("e")
    assert (await gw.post(says("e"))).status_code == 200
    await occupy(gw, held)
    task = await send(gw, says("a"))
    (request,) = await gw.redis.zrange(KEYS.queue(DEPLOYMENT), 0, -1)
    assert (await gw.record(request.decode()))[b"pred"] == b"9"
    held.release_all()
    await task


async def test_shortest_first_within_a_key_when_the_deployment_says_so(gw: Running, held: Held) -> None:
    change_deployment(gw, queue_order=QueueOrder.SJF)
    await occupy(gw, held)
    tasks = [await send(gw, says("a", max_tokens=2_000)), await send(gw, says("b", max_tokens=3))]
    held.release_all()
    await asyncio.gather(*tasks)
    assert held.order == ["busy", "b", "a"]


@pytest.mark.parametrize(("window", "n_hashes"), [(0, 0), (2_000, 3)])
async def test_long_prompts_carry_the_hashes_of_their_beginnings(
    gw: Running, held: Held, window: int, n_hashes: int
) -> None:
    change_deployment(gw, locality_window_tokens=window)
    await occupy(gw, held)
    task = await send(gw, says("a" * 1_500))
    (request,) = await gw.redis.zrange(KEYS.queue(DEPLOYMENT), 0, -1)
    assert len((await gw.record(request.decode()))[b"pfx"]) == 8 * n_hashes
    expected = prefix.hashes(ORG, b"user\0" + b"a" * 1_500) if window else ()
    assert (await gw.record(request.decode()))[b"pfx"].decode() == "".join(expected)
    held.release("a" * 1_500)
    held.release_all()
    await task


async def test_the_end_is_charged_exactly_with_what_was_cached(gw: Running, held: Held) -> None:
    await occupy(gw, held)
    held.end |= {"n_prompt": 100, "n_cached": 90}
    waiting = [await send(gw, says(word)) for word in ("a", "b")]
    held.release("busy")
    await until(lambda: len(held.order) == 2)
    held.release(held.order[-1])
    await until(lambda: len(held.order) == 3)
    expected_each = (10 + 9 + 2) * TOKEN  # 10 uncached, 90 at a tenth, one token of output at two

    async def settled() -> bool:
        # The first found a free slot, and others waited when it ended; the second waited; the third is predicted.
        found = (await counters(gw))[f"0o{ORG}"]
        (request,) = await gw.redis.smembers(KEYS.replica_live("r1"))
        predicted = int((await gw.record(request.decode()))[b"chg"]) * TOKEN // 10
        return found == 2 * expected_each + predicted

    await until(settled)
    held.release_all()
    await asyncio.gather(*waiting)

    async def all_settled() -> bool:
        return (await counters(gw))[f"0o{ORG}"] == 3 * expected_each

    await until(all_settled)
    assert (await counters(gw))[f"0o{ORG}"] == 3 * expected_each


async def test_what_nobody_waited_for_is_free(gw: Running, machine: Machine) -> None:
    assert (await gw.post(CHAT)).status_code == 200  # it makes the replica known, through the queue
    await until(lambda: gw.gateway.routes.candidates(DEPLOYMENT))
    await until(lambda: gw.gateway.ends.n_settled == 1)
    before = await gw.redis.hgetall(V)
    assert (await gw.post(CHAT)).status_code == 200
    await until(lambda: gw.gateway.ends.n_settled == 2)
    assert await gw.redis.hgetall(V) == before


async def test_a_long_answer_is_charged_while_it_runs(gw: Running, machine: Machine) -> None:
    go = asyncio.Event()

    async def talk(job: Job) -> None:
        await job.emit("many words", n=600)
        await go.wait()
        await job.finish()

    machine.behaviour = talk
    await machine.enrol(slots=1)
    running_one = asyncio.ensure_future(gw.post(says("a")))
    await until(lambda: machine.jobs)
    waiting = await send(gw, says("b"))

    async def charged() -> bool:
        prompt = int((await gw.record(machine.jobs[0].id))[b"in_est"])
        return (await counters(gw)).get(f"0o{ORG}") == (prompt + 2 * 600) * TOKEN

    await until(charged)
    go.set()
    assert (await running_one).status_code == (await waiting).status_code == 200


async def test_one_organization_leaves_room_in_the_queue_for_others(redis_url: str) -> None:
    async with running(redis_url, queue_bound=4) as gw:
        other = gw.directory.add_key(organization="2" * 32, project="3" * 32)
        tasks = [await send(gw, says(word)) for word in ("a", "b", "c")]
        refused = await gw.post(says("d"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        assert "yours" in refused.json()["error"]["message"]
        tasks.append(await send(gw, says("e"), other))
        for task in tasks:
            task.cancel()


def length_model(path: Path, tokens: dict[str, int]) -> str:
    """A model that knows how long the answers to these words are."""
    bucket = {word: features(word).words[0] for word in tokens}
    words = [(0.0, 0.0, 0.0, 0.0)] * BUCKETS
    for word, n in tokens.items():
        octaves = math.log2(1 + n)
        words[bucket[word]] = (1.0, octaves, octaves, octaves)
    nothing = Head(-0.5, 0.0, 0.5, 1.0, 0.0)
    save(LengthModel(0.8, tuple(words), ((0.0, 0.0, 0.0),) * len(DENSE), {}, nothing), path, {})
    return str(path)


async def test_with_a_length_model_the_text_says_who_is_short_until_it_proves_wrong(
    redis_url: str, tmp_path: Path
) -> None:
    directory = FakeDirectory()
    model = length_model(tmp_path / "lengths.json.gz", {"a": 900, "b": 20})
    async with running(redis_url, directory, length_model=model) as gw:
        change_deployment(gw, queue_order=QueueOrder.SJF)
        machine = Machine(redis_url)
        held = Held(machine)
        machine.behaviour = held.serve
        await machine.start(slots=1)
        busy = await occupy(gw, held)
        waiting = [await send(gw, says("a", max_tokens=900)), await send(gw, says("b", max_tokens=900))]
        (line,) = await gw.redis.keys(f"{KEYS.prefix}dep:{DEPLOYMENT}:r:*")
        scores = [score for _, score in await gw.redis.zrange(line, 0, -1, withscores=True)]
        assert scores[1] - scores[0] > 850, "a is taken to be 880 tokens longer"
        held.release_all()
        await asyncio.gather(busy, *waiting)
        assert held.order == ["busy", "b", "a"]
        pair = (ORG, DEPLOYMENT)
        assert gw.gateway.ends.calibration(*pair).lengths.text_coverage < 0.8, (
            "no answer was as long as it said"
        )
        await machine.stop()
