"""The virtual cell itself: undisturbed it answers, bills and comes to rest; and the same seed gives the same story."""

from __future__ import annotations

import random

import pytest

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
