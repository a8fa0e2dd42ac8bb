"""A LoRA adapter in the queue: a replica that has it is preferred within the window, and nobody pays less for it."""

from __future__ import annotations

from controlplane.policy.fairness import FairQueue
from controlplane.policy.flows import TOKEN, Flow, Request, service
from controlplane.policy.prefix import mark_of, n_of_prompt

FORMAL, CASUAL = (mark_of(name * 32) for name in "fc")


def ask(name: str, organization: str, *prefixes: str) -> Request:
    return Request(name, Flow(0, organization, "p" + organization, "k" + organization), 0, 100, 10, prefixes)


def test_who_asks_for_an_adapter_that_is_there_goes_first_within_the_window() -> None:
    for window, first in ((10_000 * TOKEN, "second"), (0, "first")):
        queue = FairQueue(window=window)
        queue.enrol("r1", 1, 0)
        queue.admit(ask("before", "b", CASUAL), 0, ("r1",))
        queue.admit(ask("first", "a", FORMAL), 1)
        queue.admit(ask("second", "b", CASUAL), 2)
        assert queue.settle("before", 3, n_prompt=100, n_cached=0, n_output=10) == [(first, "r1")]
        charged = queue.requests[first].charged
        assert charged == service(100, 0, 10)  # a loaded adapter computes no prompt


def test_marks_are_no_part_of_the_prompt() -> None:
    assert n_of_prompt((FORMAL, "00000001"), 2) == 1
    assert n_of_prompt((FORMAL, "00000001"), 1) == n_of_prompt((), 0) == 0
    assert n_of_prompt(("00000001",), 1) == 1
    assert len(FORMAL) == 8
    assert FORMAL != CASUAL
