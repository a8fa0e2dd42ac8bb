"""Virtual time: order of events, ties, limits."""

from __future__ import annotations

import pytest

from autoscaler.sim.kernel import Kernel


def test_events_run_in_time_order_and_ties_in_order_of_scheduling() -> None:
    kernel = Kernel()
    seen: list[object] = []
    for at_s, name in ((2.0, "late"), (1.0, "a"), (1.0, "b")):
        kernel.at(at_s, seen.append, name)
    kernel.at(1.0, lambda: kernel.after(0.0, seen.append, "after b"))
    assert kernel.run() is False
    assert seen == ["a", "b", "after b", "late"]
    assert kernel.now_s == 2.0


def test_the_past_is_refused() -> None:
    kernel = Kernel()
    kernel.at(1.0, lambda: kernel.at(0.5, print))
    with pytest.raises(ValueError, match="before now"):
        kernel.run()


def test_a_run_stops_at_its_instant_and_can_go_on() -> None:
    kernel = Kernel()
    seen: list[object] = []
    kernel.at(1.0, seen.append, 1)
    kernel.at(3.0, seen.append, 3)
    assert kernel.run(until_s=2.0) is True
    assert (seen, kernel.now_s) == ([1], 2.0)
    assert kernel.run(max_events=1) is False
    assert seen == [1, 3]
