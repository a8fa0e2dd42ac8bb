"""The virtual cell itself: undisturbed it answers, bills and comes to rest; and the same seed gives the same story."""

from __future__ import annotations

from tests.protocol.world import World


def test_an_undisturbed_cell_answers_bills_and_rests(w: World) -> None:
    for i in range(6):
        w.client.ask(f"question {i}", 5 + 3 * i, streaming=i % 2 == 0)
    w.run(w.rest())
    assert all(answer.complete for answer in w.answers)
    assert len(w.ledger.rows) == 6
