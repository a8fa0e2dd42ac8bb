"""The last replica sleeps for as long as the ladder says, and wakes before anything is started."""

from dataclasses import replace
from typing import Any

import pytest

from autoscaler.policy.ladder import Gaps, Rung, Stakes, cheapest, rest
from autoscaler.policy.resting import ASLEEP, GONE
from autoscaler.types import (
    Decision,
    MachineState,
    ReplicaPhase,
    ScalerSpec,
    SleepReplica,
    StageName,
    StopReplica,
    WakeReplica,
)
from tests.autoscaler.policy.scene import Scene, kinds, machine, replica, spec

SLEEPING = ReplicaPhase.SLEEPING
STAKES = Stakes(ttft_target_s=2.0, late_usd=0.02, late_usd_per_s=0.002, waking_usd_per_h=1.0)
FREE = (Rung(ASLEEP, 0.0, 0.1), Rung(GONE, 0.0, 3.0))
PRICED = (Rung(ASLEEP, 0.12, 0.5), Rung(GONE, 0.0, 30.0))


def sleepy(**overrides: Any) -> ScalerSpec:
    return spec(**{"rungs": FREE, "stakes": STAKES, **overrides})


def idle(scene: Scene) -> Decision:
    """Past the idle timeout: the decision that ends the last one's work."""
    for _ in range(40):
        decision = scene.tick()
        if decision.commands:
            return decision
    raise AssertionError("it never went to zero")


def bedded(n_beds: int = 1, **overrides: Any) -> Scene:
    machines = (machine(n_free=1, n_beds=n_beds),)
    return Scene(spec=sleepy(**overrides), replicas=(replica("r1"),), machines=machines)


def test_the_last_one_sleeps_instead_of_ending() -> None:
    scene = bedded(idle_timeout_s=0.0)
    scene.replicas = (replica("r1"), replica("r2", used=0))
    decision = idle(scene)
    assert sorted(kinds(decision)) == ["drain_replica", "sleep_replica"]
    assert decision.status.phase == "idle"


@pytest.mark.parametrize("change", [{"rungs": ()}, {"min_replicas": 1}])
def test_nothing_sleeps_where_it_cannot_or_must_serve(change: dict[str, Any]) -> None:
    scene = bedded(**change)
    if change.get("min_replicas"):
        assert scene.tick_for(300).commands == ()
    else:
        assert kinds(idle(scene)) == ["drain_replica"]


def test_without_a_bed_it_ends() -> None:
    decision = idle(bedded(n_beds=0))
    assert kinds(decision) == ["drain_replica"]
    assert "no machine has room for a sleeper" in decision.reasons


def asleep(**overrides: Any) -> Scene:
    scene = bedded(**overrides)
    idle(scene)
    scene.replicas = (replica("r1", SLEEPING, phase_at_s=scene.now_s),)
    return scene


def test_a_waiting_request_wakes_it_at_once_and_hears_of_it() -> None:
    scene = asleep()
    scene.tick_for(600)
    scene.n_queued = 1
    decision = scene.tick()
    assert kinds(decision) == ["wake_replica"]
    assert (decision.status.phase, decision.status.stage) == ("starting", StageName.WAKING_REPLICA)
    scene.replicas = (replace(scene.replicas[0], phase=ReplicaPhase.WAKING, phase_at_s=scene.now_s),)
    assert scene.tick(0.1).commands == (), "one that wakes is counted"
    assert scene.tick(0.1).status.stage is StageName.WAKING_REPLICA


def test_more_is_started_when_waking_is_not_enough() -> None:
    scene = asleep()
    scene.machines = (machine(n_free=3),)
    scene.n_queued = 20
    assert sorted(kinds(scene.tick())) == ["start_replica", "start_replica", "wake_replica"]


def test_it_does_not_wake_where_somebody_took_its_place() -> None:
    scene = asleep()
    scene.machines = (machine(n_free=0), machine("m2", n_free=1))
    scene.n_queued = 1
    decision = scene.tick()
    assert kinds(decision) == ["start_replica"] and decision.commands[0].machine_id == "m2"  # type: ignore[union-attr]
    started = replica("r2", machine_id="m2", phase_at_s=scene.now_s)
    scene.replicas, scene.n_queued = (*scene.replicas, started), 0
    ended = [c for c in scene.tick().commands if isinstance(c, StopReplica)]
    assert [(c.replica_id, c.reason) for c in ended] == [("r1", "others serve")]


def test_one_that_takes_too_long_to_wake_is_ended_and_counts_as_failed() -> None:
    scene = asleep()
    scene.n_queued = 1
    scene.replicas = (replica("r1", ReplicaPhase.WAKING, phase_at_s=scene.now_s),)
    commands = scene.tick(301.0).commands
    assert [c.failure_code for c in commands if isinstance(c, StopReplica)] == ["start_timeout"]


@pytest.mark.parametrize(
    ("change", "of_spec", "of_machine"),
    [
        ({"outdated": True}, {}, {}),
        ({}, {"deleted": True}, {}),
        ({}, {"suspended_at_s": 1.0}, {}),
        ({}, {}, {"state": MachineState.DRAINING}),
        ({}, {}, {"state": MachineState.DRAINING, "ends_at_s": 2e6}),
        ({}, {"rungs": ()}, {}),
    ],
)
def test_it_ends_when_nobody_could_want_it(
    change: dict[str, object], of_spec: dict[str, object], of_machine: dict[str, object]
) -> None:
    scene = asleep()
    scene.replicas = tuple(replace(r, **change) for r in scene.replicas)  # type: ignore[arg-type]
    scene.spec = replace(scene.spec, **of_spec)  # type: ignore[arg-type]
    scene.machines = tuple(replace(m, **of_machine) for m in scene.machines)  # type: ignore[arg-type]
    assert kinds(scene.tick()) == ["stop_replica"]


def test_with_a_price_it_ends_when_sleeping_has_cost_what_a_start_is_worth() -> None:
    scene = asleep(rungs=PRICED)
    slept_s = 0.0
    while (decision := scene.tick()).commands == ():
        slept_s += 5.0
        assert slept_s < 24 * 3600
    assert kinds(decision) == ["stop_replica"]
    worth_usd = STAKES.wake_usd(PRICED[1]) - STAKES.wake_usd(PRICED[0])
    assert slept_s == pytest.approx(worth_usd / 0.12 * 3600, abs=10.0), "the envelope, until gaps are known"
    assert "gone" in " ".join(decision.reasons)


def test_gaps_are_learned_and_short_ones_keep_it_asleep_longer() -> None:
    scene = asleep(rungs=PRICED)
    for _ in range(12):  # half an hour of rest each time
        scene.tick_for(1800)
        scene.n_queued = 1
        scene.tick()
        scene.n_queued = 0
        scene.replicas = (replica("r1", phase_at_s=scene.now_s),)
        idle(scene)
        scene.replicas = (replica("r1", SLEEPING, phase_at_s=scene.now_s),)
    assert scene.memory.rest is not None and scene.memory.rest.gaps.weight > 8
    assert scene.tick_for(1200).commands == ()


def test_a_schedule_that_must_not_climb_only_descends() -> None:
    gaps = Gaps()
    for _ in range(60):
        gaps = gaps.seen(4 * 3600.0)  # always four hours: going down and climbing again is the cheapest
    rungs = (Rung("a", 1.0, 0.0), Rung("b", 0.0, 60.0))
    stakes = Stakes(2.0, 2.0, 0.05, 1.0)
    free = rest(rungs, stakes, gaps).steps
    assert [s.rung.name for s in free][:3] == ["a", "b", "a"] or [s.rung.name for s in free][:2] == ["b", "a"]
    for climbs in (True, False):
        steps, _ = cheapest(rungs, stakes, gaps, climbs=climbs)
        prices = [s.rung.usd_per_h for s in steps]
        assert (prices == sorted(prices, reverse=True)) is (not climbs)
    assert cheapest(rungs, stakes, gaps, climbs=False)[1] >= cheapest(rungs, stakes, gaps)[1]


def test_equal_inputs_in_another_order_give_the_same_orders() -> None:
    scene = bedded(idle_timeout_s=0.0)
    scene.replicas = (replica("r1"), replica("r2"), replica("r3"))
    decision = idle(scene)
    names = [c.replica_id for c in decision.commands if isinstance(c, SleepReplica | WakeReplica)]
    other = bedded(idle_timeout_s=0.0)
    other.replicas = tuple(reversed(scene.replicas))
    again = idle(other)
    assert decision.commands == again.commands and len(names) == 1
