"""LoRA adapters of a replica: loaded when asked for, kept within the limit, waited for, never put out in use."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from tests.workers.adapter_files import write_adapter
from tests.workers.serving import PROFILE, Cell, Serving, serving
from tests.workers.waiting import until
from workers.adapters import Adapters, AdapterUnavailable
from workers.config import ServeTuning
from workers.contract import AdapterSpec, FinishReason
from workers.engine.base import AdapterRefused
from workers.modelcache.adapter import import_adapter
from workers.modelcache.store import ModelStore

TWO = replace(PROFILE, max_loras=2)
HURRIED = ServeTuning(adapter_patience_s=0.5)


@pytest.fixture
def cell(redis_url: str) -> Iterator[Cell]:
    made = Cell(redis_url)
    yield made
    made.close()


class Shelf:
    """A control plane's store with adapters in it, and what machines are told of them."""

    def __init__(self, cell: Cell, directory: Path) -> None:
        self.cell, self.directory = cell, directory
        self.store = ModelStore(directory / "shelf")

    def make(self, name: str, seed: int, *, deployment: str = "d1", machine: str = "m1") -> str:
        made = import_adapter(
            write_adapter(self.directory / name, seed=seed), self.store, base=None, max_rank=16
        )
        spec = AdapterSpec(deployment=deployment, digest=made.digest, source=self.store.root.as_uri())
        self.cell.r.hset(self.cell.keys.machine(machine).adapters, name, msgspec.json.encode(spec))
        return made.digest


@pytest.fixture
def shelf(cell: Cell, tmp_path: Path) -> Shelf:
    return Shelf(cell, tmp_path)


async def answer(cell: Cell, front: Serving, adapter: str = "") -> str:
    request = cell.admit(max_tokens=12, sampling={"ignore_eos": True}, adapter=adapter, cache_salt=adapter)
    await front.deliver(request)
    end = cell.end(request)
    assert end.error is None, end.error
    return cell.text(request)


async def test_each_adapter_answers_in_its_own_words(cell: Cell, shelf: Shelf, tmp_path: Path) -> None:
    shelf.make("a", 1)
    shelf.make("b", 2)
    shelf.make("twin", 1)
    async with serving(cell, tmp_path, profile=TWO) as front:
        base = await answer(cell, front)
        assert front.server.adapters.resident == ()  # nobody asked for one
        a, b = await asyncio.gather(answer(cell, front, "a"), answer(cell, front, "b"))
        assert len({base, a, b}) == 3
        assert set(front.server.adapters.resident) == {"a", "b"}
        assert await answer(cell, front) == base
        assert await answer(cell, front, "twin") == a  # equal weights, which put another one out
        assert await answer(cell, front, "b") == b
        assert len(front.server.adapters.resident) == 2


async def test_one_in_use_is_not_put_out_and_who_waits_gets_its_place(
    cell: Cell, shelf: Shelf, tmp_path: Path
) -> None:
    for at, name in enumerate("abc"):
        shelf.make(name, at)
    async with serving(cell, tmp_path, profile=TWO) as front:
        adapters = front.server.adapters
        async with adapters.use("a", "d1"):
            async with adapters.use("b", "d1"):
                waiting = asyncio.create_task(answer(cell, front, "c"))
                await until(lambda: adapters.n_waiting == 1, "the third waits")
                assert set(adapters.resident) == {"a", "b"}
            await waiting
            assert set(adapters.resident) == {"a", "c"}


async def test_what_was_asked_for_more_often_stays(cell: Cell, shelf: Shelf, tmp_path: Path) -> None:
    for at, name in enumerate("abc"):
        shelf.make(name, at)
    async with serving(cell, tmp_path, profile=TWO) as front:
        for name in ("a", "a", "a", "a", "a", "b", "c"):  # by last use alone, `a` would go
            await answer(cell, front, name)
        assert set(front.server.adapters.resident) == {"a", "c"}


async def test_concurrent_first_requests_load_once(cell: Cell, shelf: Shelf, tmp_path: Path) -> None:
    shelf.make("a", 1)
    async with serving(cell, tmp_path, profile=TWO) as front:
        texts = await asyncio.gather(*(answer(cell, front, "a") for _ in range(5)))
        assert len(set(texts)) == 1
        assert front.server.adapters.n_loads == 1


async def test_an_adapter_that_comes_late_is_waited_for(cell: Cell, shelf: Shelf, tmp_path: Path) -> None:
    async with serving(cell, tmp_path, profile=TWO) as front:
        early = asyncio.create_task(answer(cell, front, "a"))
        await until(lambda: front.server.n_running == 1, "it was claimed")
        shelf.make("a", 1)
        assert await early


@pytest.mark.parametrize("case", ["unknown", "foreign", "tampered", "expired"])
async def test_one_that_cannot_be_had_ends_with_503_and_leaves_no_place_taken(
    cell: Cell, shelf: Shelf, tmp_path: Path, case: str
) -> None:
    shelf.make("good", 1)
    if case == "foreign":
        shelf.make("bad", 2, deployment="d2")
    elif case == "tampered":
        weights = shelf.store.path(shelf.make("bad", 2)) / "adapter_model.safetensors"
        weights.chmod(0o644)
        weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    elif case == "expired":
        spec = AdapterSpec(deployment="d1", digest="0" * 64, source="s3://b", urls={"manifest.json": []})
        cell.r.hset(cell.keys.machine("m1").adapters, "bad", msgspec.json.encode(spec))
    async with serving(cell, tmp_path, profile=replace(TWO, max_loras=1), tuning=HURRIED) as front:
        request = cell.admit(adapter="bad")
        await front.deliver(request)
        end = cell.end(request)
        assert end.reason is FinishReason.ERROR
        assert (end.error.status, end.error.code) == (503, "adapter_unavailable")
        assert str(tmp_path) not in end.error.message
        assert (end.n_prompt, end.n_completion) == (0, 0)
        assert await answer(cell, front, "good")  # the only place is free, and the engine alive


async def test_a_deployment_without_adapters_says_so(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path) as front:
        request = cell.admit(adapter="a")
        await front.deliver(request)
        assert cell.end(request).error.code == "adapter_unavailable"


async def test_a_client_that_leaves_while_it_loads_takes_it_from_nobody(
    cell: Cell, shelf: Shelf, tmp_path: Path
) -> None:
    async with serving(cell, tmp_path, profile=TWO) as front:
        leaver, stayer = cell.admit(adapter="a"), cell.admit(adapter="a", max_tokens=3)
        tasks = [front.deliver(request) for request in (leaver, stayer)]
        await until(lambda: front.server.adapters.n_using("a") == 2, "both wait for it")
        cell.cancel(leaver)
        await tasks[0]
        assert cell.end(leaver).reason is FinishReason.ABORT
        shelf.make("a", 1)
        await tasks[1]
        assert cell.end(stayer).error is None
        assert front.server.adapters.n_using("a") == 0


async def test_a_retired_one_is_put_out_once_nobody_uses_it(cell: Cell, shelf: Shelf, tmp_path: Path) -> None:
    shelf.make("a", 1)
    shelf.make("b", 2)
    async with serving(cell, tmp_path, profile=TWO) as front:
        adapters = front.server.adapters
        await answer(cell, front, "b")
        async with adapters.use("a", "d1"):
            cell.r.delete(cell.keys.machine("m1").adapters)
            await adapters.retire(await adapters.known())
            assert adapters.resident == ("a",)
        await adapters.retire(await adapters.known())
        assert adapters.resident == ()


class Recorder:
    """An engine that checks what it is told, slowly and sometimes failing."""

    def __init__(self, limit: int, chance: random.Random) -> None:
        self.limit, self.chance = limit, chance
        self.loaded: set[str] = set()
        self.n_using: dict[str, int] = {}

    async def load_adapter(self, adapter: str, directory: Path) -> None:
        await asyncio.sleep(0)
        assert adapter not in self.loaded
        assert len(self.loaded) < self.limit
        if self.chance.random() < 0.1:
            raise AdapterRefused("by chance")
        self.loaded.add(adapter)

    async def unload_adapter(self, adapter: str) -> None:
        assert not self.n_using.get(adapter)
        await asyncio.sleep(0)
        self.loaded.discard(adapter)


@pytest.mark.parametrize("seed", range(5))
async def test_random_histories_keep_the_limit_and_end(
    cell: Cell, shelf: Shelf, tmp_path: Path, seed: int
) -> None:
    """Never more than the limit, never one put out in use, everybody served or told, nobody left waiting."""
    chance = random.Random(seed)
    limit = chance.randint(1, 3)
    async with serving(cell, tmp_path, profile=replace(PROFILE, max_loras=limit)) as front:
        engine = Recorder(limit, chance)
        adapters = Adapters(front.config, engine, front.client)  # type: ignore[arg-type]
        path = tmp_path / "nowhere"

        async def fetched(spec: object) -> tuple[Path, object]:
            await asyncio.sleep(0)
            return path, type("Claim", (), {"close": lambda self: None})()

        async def known(adapter: str, deployment: str) -> None:
            await asyncio.sleep(0)

        adapters._fetch, adapters._spec = fetched, known  # type: ignore[method-assign, assignment]
        n_served = 0

        async def one(name: str) -> None:
            nonlocal n_served
            try:
                async with adapters.use(name, "d1"):
                    assert name in engine.loaded
                    engine.n_using[name] = engine.n_using.get(name, 0) + 1
                    try:
                        for _ in range(chance.randint(0, 5)):
                            await asyncio.sleep(0)
                    finally:
                        engine.n_using[name] -= 1
                    n_served += 1
            except AdapterUnavailable as error:
                assert "by chance" in str(error), error

        tasks = []
        for _ in range(60):
            tasks.append(asyncio.create_task(one(f"a{chance.randint(0, 5)}")))
            for _ in range(chance.randint(0, 3)):
                await asyncio.sleep(0)
            if chance.random() < 0.2:
                chance.choice(tasks).cancel()
            if chance.random() < 0.1:
                await adapters.retire(["a0"])
        async with asyncio.timeout(10):
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        strange = [o for o in outcomes if o is not None and not isinstance(o, asyncio.CancelledError)]
        assert not strange, (seed, strange)
        assert n_served > 10
        assert adapters.n_waiting == 0
        assert all(adapters.n_using(f"a{i}") == 0 for i in range(6))
        assert set(adapters.resident) == engine.loaded
