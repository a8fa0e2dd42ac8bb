"""Many requests under random faults on two machines: every answer whole, the same as undisturbed, billed once.

Faults: connections cut, messages delivered twice, replicas declared dead while they go on generating (their requests
move, under a newer epoch, to the other machine or back to the same one), clients that go. A failure prints its seed.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workers.serving import Cell, Serving, serving
from tests.workers.waiting import until
from workers import scripts
from workers.contract import FinishReason
from workers.engine.base import EngineProfile

N_REQUESTS = 40
PROFILE = EngineProfile(engine="toy", toy_step_ms=2, max_model_len=512)
DEATHS_ALLOWED = 1000  # poison is another test's


@pytest.fixture
def cell(redis_url: str) -> Iterator[Cell]:
    made = Cell(redis_url)
    yield made
    made.close()


class Consumer:
    """Takes a replica's messages and delivers them, some of them twice."""

    def __init__(self, cell: Cell, front: Serving, chance: random.Random) -> None:
        self.cell, self.front, self.chance = cell, front, chance
        keys = front.config.keys
        self.queue = keys.prefix + keys.queue_name(front.config.replica)

    def pump(self) -> None:
        while (message := self.cell.r.rpop(self.queue)) is not None:
            args, _, _ = json.loads(json.loads(message)["body"])
            for _ in range(2 if self.chance.random() < 0.2 else 1):
                self.front.deliver(*args)


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_storm(cell: Cell, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    async with (
        serving(cell, tmp_path, replica="r1", machine="m1", profile=PROFILE) as first,
        serving(cell, tmp_path, replica="r2", machine="m2", profile=PROFILE) as second,
    ):
        fronts = (first, second)
        consumers = [Consumer(cell, front, chance) for front in fronts]
        lengths: dict[str, int] = {}
        cancelled: set[str] = set()

        def given_up() -> set[str]:
            """Cancelled while nothing was made and its replica was lost: nobody serves or bills it."""
            return {raw.decode() for raw in cell.r.smembers(cell.keys.failed)} & cancelled

        def over(request: str) -> bool:
            return request in given_up() or any(
                cell.lease(request, machine).get(b"state") == b"done" for machine in ("m1", "m2")
            )

        async def disturb() -> None:
            front = chance.choice(fronts)
            replica, machine = front.config.replica, front.config.machine
            match chance.randrange(6):
                case 0 | 1 if front.client._conn is not None:
                    front.client._conn.abort()
                case 2 | 3:
                    args = (cell.keys.prefix, 0, replica, "dead", DEATHS_ALLOWED)
                    cell.run(scripts.WITHDRAW, *args)
                    cell.enrol(replica, machine)
                case 4 if lengths:
                    request = chance.choice(list(lengths))
                    cancelled.add(request)
                    cell.cancel(request)
                case _:
                    pass
            await asyncio.sleep(chance.random() * 0.03)

        for i in range(N_REQUESTS):
            n = chance.randrange(1, 120)
            stream = chance.random() < 0.5
            candidates = tuple(chance.sample(["r1", "r2"], 2))
            request = cell.admit(
                f"badi {i}", max_tokens=n, stream=stream, candidates=candidates, sampling={"ignore_eos": True}
            )
            lengths[request] = n
            for consumer in consumers:
                consumer.pump()
            await disturb()
        for _ in range(40):
            for consumer in consumers:
                consumer.pump()
            await disturb()

        def all_over() -> bool:
            for consumer in consumers:
                consumer.pump()
            return all(over(request) for request in lengths)

        await until(all_over, f"every request to end (seed {seed})")
        await asyncio.gather(*first.tasks, *second.tasks, return_exceptions=True)
        usage = {}
        for machine in ("m1", "m2"):
            for event in cell.usage(machine):
                assert event.request_id not in usage, f"billed twice (seed {seed})"
                usage[event.request_id] = event
        assert usage.keys() == lengths.keys() - given_up(), f"seed {seed}"
        for request, n in lengths.items():
            if request in given_up():
                continue
            machine = usage[request].machine
            entries = cell.journal(request, machine)
            ids = [token for entry in entries for token in entry.token_ids]
            ends = [entry.end for entry in entries if entry.end is not None]
            assert len(ends) == 1 and entries[-1].end is not None, f"seed {seed}"
            assert ends[0].n_completion == usage[request].n_completion == len(ids), f"seed {seed}"
            if request in cancelled and ends[0].reason is FinishReason.ABORT:
                assert len(ids) <= n
            else:
                assert (ends[0].reason, len(ids)) == (FinishReason.LENGTH, n), f"seed {seed}"
            probe = second.engine.tokenize_chat(
                [{"role": "user", "content": f"badi {list(lengths).index(request)}"}]
            )
            assert ids == undisturbed(probe, len(ids)), f"seed {seed}"
        for front in fronts:
            assert all(record.confirmed for record in front.spool.pending()), f"seed {seed}"
            assert front.engine.stats().n_running == 0 and front.server.n_running == 0
        attempts = Counter(event.attempts for event in usage.values())
        assert max(attempts) > 1, "the storm was too mild to mean anything"


def undisturbed(prompt: list[int], n: int) -> list[int]:
    """What the toy engine answers when nothing disturbs it."""
    from workers.engine import toy_text

    seed = toy_text.seed_of(prompt, None)
    return [toy_text.token_at(seed, at) for at in range(n)]
