"""Waiting for a machine that is being stopped, against buying one: by what each takes, and never without end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.policy.comeback import Stopping, StopTimes, left_s, worth_awaiting
from autoscaler.types import StageName
from tests.autoscaler.policy.scene import T0, Scene, kinds, machine, spec

TIMES = StopTimes(stop_s=30.0, resume_s=60.0, boot_s=100.0)
SECONDS = st.floats(0, 1e4)


def told(since_s: float = T0, mid: str = "s1", n_free: int = 1) -> Stopping:
    return Stopping(mid, since_s, n_free)


@pytest.mark.parametrize(
    ("after_s", "is_awaited"), [(0, True), (29, True), (31, True), (69, True), (71, False), (1e6, False)]
)
def test_it_is_awaited_until_it_is_late_by_what_its_start_saves(after_s: float, is_awaited: bool) -> None:
    assert bool(worth_awaiting((told(),), TIMES, T0 + after_s)) is is_awaited


@pytest.mark.parametrize(
    "times",
    [
        StopTimes(stop_s=50.0, resume_s=60.0, boot_s=100.0),  # stops for longer than its start saves
        StopTimes(stop_s=0.0, resume_s=100.0, boot_s=100.0),
        StopTimes(stop_s=1.0, resume_s=200.0, boot_s=100.0),
        StopTimes(),
    ],
)
def test_what_would_not_serve_sooner_is_not_awaited(times: StopTimes) -> None:
    assert worth_awaiting((told(),), times, T0) == ()


@given(stop_s=SECONDS, resume_s=SECONDS, boot_s=SECONDS, before_s=SECONDS)
def test_whoever_waits_in_vain_has_a_bound(
    stop_s: float, resume_s: float, boot_s: float, before_s: float
) -> None:
    """A request that comes when it has been stopping for `before_s`, of a machine that never stops."""
    times, machine = StopTimes(stop_s, resume_s, boot_s), told()
    if not worth_awaiting((machine,), times, T0 + before_s):
        return
    bound_s = left_s(machine, times, T0 + before_s) + boot_s - resume_s
    assert bound_s <= 2 * boot_s
    assert not worth_awaiting((machine,), times, T0 + before_s + bound_s + 0.01)


def test_the_soonest_comes_first_and_ties_go_by_id() -> None:
    machines = (told(mid="c"), told(mid="b"), told(T0 - 10, mid="a"))
    assert [m.id for m in worth_awaiting(machines, TIMES, T0)] == ["a", "b", "c"]


def waiting(**fields: object) -> Scene:
    return Scene(n_queued=1, stopping=(told(),), stop_times=TIMES, **fields)  # type: ignore[arg-type]


def test_growth_waits_tells_how_long_and_starts_it_when_it_has_stopped() -> None:
    scene = waiting()
    decided = scene.tick()
    assert (kinds(decided), decided.memory.awaited) == ([], ("s1",))
    assert decided.status.stage is StageName.STARTING_MACHINE
    assert decided.status.stage_since_s == T0 + 30, "the stage begins when it has stopped"
    assert not any("one machine more" in reason for reason in decided.reasons)
    scene.stopping, scene.stopped = (), ("s1",)
    decided = scene.tick()
    assert (kinds(decided), decided.memory.awaited) == (["start_machine"], ())


def test_one_that_hangs_is_bought_for() -> None:
    scene = waiting()
    for _ in range(int(70 / 5) - 1):
        assert kinds(scene.tick()) == []
    assert kinds(scene.tick()) == ["launch_machine"]


def test_what_it_does_not_hold_is_bought_at_once() -> None:
    scene = waiting(spec=spec(min_replicas=4))
    [order] = scene.tick().commands
    assert (order.KIND, getattr(order, "n_replicas", None)) == ("launch_machine", 3)


def test_room_elsewhere_and_a_stopped_one_come_first() -> None:
    assert waiting(machines=(machine(),)).tick().memory.awaited == ()
    decided = waiting(stopped=("s0",)).tick()
    assert (kinds(decided), decided.memory.awaited) == (["start_machine"], ())
