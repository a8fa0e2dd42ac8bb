"""The virtual cell itself: undisturbed it answers, bills and comes to rest; and the same seed gives the same story."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from tests.protocol.clock import VirtualLoop
from tests.protocol.conftest import MakeWorld
from tests.protocol.faults import GENTLE, unfold
from tests.protocol.world import World


def test_an_undisturbed_cell_answers_bills_and_rests(w: World) -> None:
    for i in range(6):
        w.client.ask(f"question {i}", 5 + 3 * i, streaming=i % 2 == 0)
    w.run(w.rest())
    assert all(answer.complete for answer in w.answers)
    assert len(w.ledger.rows) == 6


def test_the_same_seed_tells_the_same_story(make_world: MakeWorld) -> None:
    def told() -> list[str]:
        with make_world(seed=11) as w:
            w.run(w.ready())
            w.run(unfold(w, random.Random(11), GENTLE))
            w.run(w.rest())
            return [*w.log, *(f"{answer.ended_at_s:.6f} {answer.text}" for answer in w.answers)]

    assert told() == told()


def test_a_broken_promise_is_noticed_and_names_its_seed(make_world: MakeWorld) -> None:
    with pytest.raises(AssertionError, match="text differs") as caught, make_world(seed=5) as w:
        w.run(w.ready())
        answer = w.client.ask("question", 5)
        w.run(w.until(lambda: answer.over))
        answer.text += "!"
        w.run(w.rest())
    assert "CORRAL_PROTOCOL_SEED=5" in caught.value.__notes__[0]


def test_a_timer_is_never_early_so_that_nobody_waits_for_a_rest_that_does_not_pass() -> None:
    loop = VirtualLoop(1)

    async def story() -> int:
        n_waits, deadline_s = 0, loop.time() + 1.0 + 5e-10
        await asyncio.sleep(1.0)
        while (left_s := deadline_s - loop.time()) > 0:
            n_waits += 1
            loop.call_soon(lambda: None)  # the loop never waits: it does not jump
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await asyncio.Event().wait()
        return n_waits

    assert loop.run_until_complete(story()) == 1
    loop.shut_down()
