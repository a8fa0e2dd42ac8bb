"""A replica's sleep on its loop: orders, guests that were bound before, and engines that cannot wake."""

import asyncio
from contextlib import suppress

import pytest

from workers.engine.base import EngineDead
from workers.rest import Rest


class Engine:
    sleep_level = 1

    def __init__(self) -> None:
        self.asleep = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.dies = False

    async def sleep(self) -> None:
        await self.gate.wait()
        self.asleep = True

    async def wake(self) -> None:
        if self.dies:
            raise EngineDead("it does not wake")
        self.asleep = False


class Scene:
    def __init__(self, patience_s: float = 60.0) -> None:
        self.engine = Engine()
        self.said: list[bool] = []
        self.stages_ms: dict[str, int] = {}
        self.rest = Rest(self.engine, self.said.append, self.stages_ms, patience_s)
        self.task = asyncio.create_task(self.rest.run())

    async def until(self, asleep: bool) -> None:
        async with asyncio.timeout(30):
            while self.engine.asleep is not asleep or self.rest.is_asleep is not asleep:
                await asyncio.sleep(0)

    async def close(self) -> None:
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task


async def test_an_order_is_carried_out_once_however_often_it_is_repeated() -> None:
    scene = Scene()
    for _ in range(3):
        scene.rest.order(True)
        await scene.until(asleep=True)
    for _ in range(3):
        scene.rest.order(False)
        await scene.until(asleep=False)
    assert scene.said == [True, False]
    assert scene.stages_ms.keys() == {"sleep", "wake"}
    await scene.close()


async def test_it_sleeps_only_when_the_last_request_has_ended() -> None:
    scene = Scene()
    async with scene.rest:
        scene.rest.order(True)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not scene.engine.asleep and scene.said == []
    await scene.until(asleep=True)
    await scene.close()


async def test_a_request_bound_before_wakes_it_and_it_sleeps_again_after() -> None:
    scene = Scene()
    scene.rest.order(True)
    await scene.until(asleep=True)
    async with asyncio.timeout(30), scene.rest:
        assert not scene.engine.asleep
    await scene.until(asleep=True)
    assert scene.said == [True, False, True]
    await scene.close()


async def test_a_request_that_comes_while_it_falls_asleep_waits_until_it_is_awake() -> None:
    scene = Scene()
    scene.engine.gate.clear()
    scene.rest.order(True)
    while not scene.rest.is_asleep:
        await asyncio.sleep(0)

    async def guest() -> bool:
        async with scene.rest:
            return scene.engine.asleep

    asked = asyncio.create_task(guest())
    await asyncio.sleep(0)
    assert not asked.done()
    scene.engine.gate.set()
    async with asyncio.timeout(30):
        assert await asked is False
    await scene.until(asleep=True)
    await scene.close()


async def test_a_guest_that_leaves_before_it_is_awake_does_not_keep_it_awake() -> None:
    scene = Scene()
    scene.engine.gate.clear()
    scene.rest.order(True)
    while not scene.rest.is_asleep:
        await asyncio.sleep(0)

    async def guest() -> None:
        async with scene.rest:
            pass

    asked = asyncio.create_task(guest())
    await asyncio.sleep(0)
    asked.cancel()
    with suppress(asyncio.CancelledError):
        await asked
    scene.engine.gate.set()
    await scene.until(asleep=True)
    async with asyncio.timeout(30), scene.rest:
        assert not scene.engine.asleep
    await scene.until(asleep=True)
    await scene.close()


async def test_an_engine_that_cannot_wake_is_heard_of() -> None:
    scene = Scene()
    scene.rest.order(True)
    await scene.until(asleep=True)
    scene.engine.dies = True
    scene.rest.order(False)
    async with asyncio.timeout(30):
        with pytest.raises(EngineDead, match="does not wake"):
            await scene.task


async def test_an_engine_that_does_not_come_back_from_falling_asleep_is_dead() -> None:
    scene = Scene(patience_s=0.01)
    scene.engine.gate.clear()
    scene.rest.order(True)
    async with asyncio.timeout(30):
        with pytest.raises(EngineDead, match="sleep: not done in"):
            await scene.task
