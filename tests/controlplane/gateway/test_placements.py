"""Routing by prompts' beginnings, through two real gateways: each knows what it placed, and hears of the other's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from controlplane.gateway.placements import Placements
from controlplane.policy.routing import Ask
from tests.controlplane.gateway.harness import DEPLOYMENT, KEYS, Job, Machine, Running, running, until

HANDS = 4


@pytest.fixture
async def house(redis_url: str) -> AsyncIterator[tuple[list[Running], list[Machine]]]:
    """Two gateways that know each other's keys, four replicas that both of them see."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(running(redis_url))
        second = await stack.enter_async_context(running(redis_url, first.directory))
        second.key = first.key
        machines = [Machine(redis_url, f"m{n}", f"r{n}") for n in range(HANDS)]
        for machine in machines:
            await machine.start()
            stack.push_async_callback(machine.stop)
        for gateway in (first, second):
            assert (await gateway.post(says("hello"))).status_code == 200
            await until(lambda g=gateway: len(g.gateway.routes.candidates(DEPLOYMENT)) == HANDS)
        yield [first, second], machines


def says(text: str) -> dict[str, object]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 5}


def talk(name: str, turn: int) -> dict[str, object]:
    """A conversation of 5,000 bytes and more, its beginning its own."""
    return says(f"{name} " * (5_000 // (len(name) + 1)) + " and so on." * turn)


async def answer(job: Job) -> None:
    """With the count that a prompt of that length has, for the gateways' estimates learn from it."""
    await job.finish("done", n=1, n_prompt=len(job.envelope.payload) // 4)


async def where(gateway: Running, machines: list[Machine], body: dict[str, object]) -> str:
    """The replica that served it."""
    before = [len(machine.jobs) for machine in machines]
    assert (await gateway.post(body)).status_code == 200
    (served,) = [m for m, n in zip(machines, before, strict=True) if len(m.jobs) > n]
    return served.replica


async def test_conversations_find_their_replica_again_through_either_gateway(
    house: tuple[list[Running], list[Machine]],
) -> None:
    gateways, machines = house
    for machine in machines:
        machine.behaviour = answer
    names = [f"talk-{n}" for n in range(8)]
    first = {name: await where(gateways[0], machines, talk(name, 0)) for name in names}
    assert len(set(first.values())) >= 3, "new conversations are spread"
    again = [names[n] for n in (6, 1, 3, 0, 7, 2, 5, 4)]  # taken in turn, replicas would fall elsewhere
    assert {name: await where(gateways[0], machines, talk(name, 1)) for name in again} == first
    await until(lambda: gateways[1].gateway.placements.n_heard == 2 * len(names))
    assert {name: await where(gateways[1], machines, talk(name, 2)) for name in again} == first


async def test_a_replica_that_says_how_much_its_memory_holds_is_believed(
    house: tuple[list[Running], list[Machine]],
) -> None:
    (gateway, _), machines = house
    for machine in machines:
        await machine.enrol(kv_tokens=7_000)

    def said() -> list[int]:
        view = gateway.gateway.routes._views[DEPLOYMENT]
        return [load.kv_tokens for load in view.board.loads.values()]

    await until(lambda: said() == [7_000] * HANDS)
    await machines[0].enrol(kv_tokens=9_000)
    await until(lambda: 9_000 in said())
    assert sorted(said()) == [7_000] * (HANDS - 1) + [9_000]


async def test_a_burst_through_one_gateway_is_spread_although_its_view_is_old(
    house: tuple[list[Running], list[Machine]],
) -> None:
    """Twelve requests at once that all see the same view; by used slots alone, one replica would stay empty."""
    gateways, machines = house
    go = asyncio.Event()

    async def held(job: Job) -> None:
        await go.wait()
        await job.finish("done", n=1)

    before = [len(machine.jobs) for machine in machines]
    for machine in machines:
        machine.behaviour = held
    burst = asyncio.gather(*(gateways[0].post(says(f"short {n}")) for n in range(3 * HANDS)))
    await until(lambda: sum(len(m.jobs) for m in machines) == sum(before) + 3 * HANDS)
    assert min(len(m.jobs) - n for m, n in zip(machines, before, strict=True)) >= 1
    go.set()
    assert {response.status_code for response in await burst} == {200}


async def test_messages_are_bounded_and_bad_ones_ignored(gw: Running) -> None:
    placements = Placements(gw.gateway.redis, KEYS, "other", gw.gateway.routes)
    for _ in range(501):
        placements.note(DEPLOYMENT, "r1", Ask(100, ("00000000",), (64,)))
    placements.note(DEPLOYMENT, "r1", Ask(100))
    assert placements.n_dropped == 1
    placements.close()
    assert placements.n_heard == 0
    for payload in (b"", b"\xff", b"\x92\xa1x\x91\x95\xa1d\xa1r\x64\xa100\x91\x40"):
        placements.on_placed(payload)
