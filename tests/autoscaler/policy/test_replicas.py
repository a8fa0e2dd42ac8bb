"""How many replicas are wanted: a clock walked through minutes, and properties over random situations."""

import random
from dataclasses import replace

import pytest

from autoscaler.policy.decide import decide
from autoscaler.policy.replicas import wish
from autoscaler.types import Observation, ReplicaPhase, ReplicaView, ScalerMemory, ScalerSpec
from tests.autoscaler.policy.scene import T0, Scene, kinds, machine, replica, spec

SEEDS = range(200)


def test_from_zero_growth_is_immediate() -> None:
    scene = Scene(n_queued=1, machines=(machine(),))
    decision = scene.tick(0)
    assert kinds(decision) == ["start_replica"]
    assert "nothing serves 1 waiting requests" in decision.reasons[0]


def test_from_zero_a_burst_starts_as_many_as_it_needs() -> None:
    scene = Scene(n_queued=20, machines=(machine(),))
    assert scene.tick(0).wanted == 3  # 20 / (10 slots x 0.7)


def test_without_requests_nothing_starts() -> None:
    scene = Scene(machines=(machine(),))
    decision = scene.tick_for(300)
    assert (decision.wanted, decision.commands) == (0, ())


def test_minimum_is_kept_without_requests() -> None:
    scene = Scene(spec=spec(min_replicas=2), machines=(machine(),))
    decision = scene.tick(0)
    assert kinds(decision) == ["start_replica", "start_replica"]
    assert "bounds 2 to 4 make 0 into 2" in decision.reasons[0]


def test_scale_to_zero_waits_for_the_idle_timeout_and_not_longer() -> None:
    scene = Scene(replicas=(replica("r1", used=3),), machines=(machine(),))
    scene.tick_for(60)
    scene.replicas = (replica("r1"),)
    assert scene.tick_for(55).commands == ()
    decision = scene.tick(10)
    assert kinds(decision) == ["drain_replica"]
    assert "idle for 65 of 60 s" in decision.reasons[0]


def test_short_requests_between_ticks_restart_the_idle_window() -> None:
    scene = Scene(replicas=(replica("r1"),), machines=(machine(),))
    for n in range(40):  # 200 s in which every tick finds it idle, but its counter moves
        scene.replicas = (replica("r1", n_requests_total=n),)
        assert scene.tick().commands == ()


def test_a_queued_request_keeps_the_last_replica() -> None:
    scene = Scene(n_queued=1, replicas=(replica("r1"),), machines=(machine(),))
    assert scene.tick_for(300).wanted == 1


def test_a_replica_with_stale_beats_counts_as_full_when_shrinking() -> None:
    scene = Scene(replicas=(replica("r1", beat_seq=7),), machines=(machine(),), frozen=frozenset({"r1"}))
    decision = scene.tick_for(300)
    assert decision.wanted == 1
    assert "(at most 10.0): 1 stay" in decision.reasons[0]


def test_a_replica_with_stale_beats_counts_as_idle_when_growing() -> None:
    scene = Scene(
        replicas=(replica("r1", used=10, beat_seq=7),), machines=(machine(),), frozen=frozenset({"r1"})
    )
    scene.tick_for(30)
    assert scene.tick_for(300).wanted == 1
    scene.frozen = frozenset()
    assert scene.tick_for(120).wanted == 2


def test_fewer_slots_for_latency_ask_for_more_replicas_and_are_no_smaller_demand() -> None:
    scene = Scene(n_queued=6, replicas=(replica("r1", used=5, slots_now=5),), machines=(machine(),))
    scene.tick_for(30)
    decision = scene.tick_for(60)
    assert decision.wanted == 4  # 11 requests / (5 slots x 0.7)
    assert "5 slots x 0.7" in decision.reasons[0]
    scene = Scene(n_queued=0, replicas=(replica("r1", used=6, slots_now=10),), machines=(machine(),))
    scene.tick_for(90)
    scene.n_queued, scene.replicas = 2, (replica("r1", used=4, slots_now=4),)  # the same six requests
    assert scene.tick_for(90).wanted == 3  # 6 / 2.8


def test_slots_shrunk_by_their_host_ask_for_a_bounded_number_of_replicas() -> None:
    """Replicas that slow each other down must not multiply for it: a quarter of the profile's slots is the least."""
    scene = Scene(
        spec=spec(max_replicas=100, slots=40),
        n_queued=20,
        replicas=(replica("r1", used=1, slots=40, slots_now=1),),
        machines=(machine(),),
    )
    assert scene.tick_for(120).wanted == 3  # 21 / (10 x 0.7), not 21 / 0.7


def test_slots_of_a_replica_that_is_not_heard_of_are_those_of_its_profile() -> None:
    scene = Scene(
        n_queued=6,
        replicas=(replica("r1", used=1, slots_now=2, beat_seq=7),),
        machines=(machine(),),
        frozen=frozenset({"r1"}),
    )
    scene.tick_for(120)
    assert scene.tick_for(60).wanted == 1  # 6 / (10 x 0.7)


def test_unreachable_redis_neither_grows_nor_shrinks() -> None:
    ready = tuple(replica(f"r{i}", used=None, beat_seq=None) for i in range(3))
    scene = Scene(n_queued=None, replicas=ready, machines=(machine(),), frozen=frozenset({"r0", "r1", "r2"}))
    decision = scene.tick_for(600)
    assert (decision.wanted, decision.commands) == (3, ())


def test_steady_overload_adds_a_replica_within_the_stable_window() -> None:
    scene = Scene(replicas=(replica("r1", used=10),), machines=(machine(),))
    decision = scene.tick_for(60)
    assert decision.wanted == 2
    assert kinds(decision) == ["start_replica"]


def test_starting_replicas_count_for_scaling() -> None:
    starting = replica("r2", ReplicaPhase.STARTING)
    scene = Scene(replicas=(replica("r1", used=10), starting), machines=(machine(),))
    assert scene.tick_for(60).commands == ()


def test_panic_grows_at_once_and_does_not_shrink_for_a_stable_window() -> None:
    scene = Scene(replicas=(replica("r1", used=2),), machines=(machine(n_free=8),))
    scene.tick_for(60)
    scene.n_queued = 40
    decision = scene.tick_for(10)
    assert decision.wanted == 4
    assert decision.reasons[0].startswith("panic")
    scene.replicas = tuple(replica(f"r{i}", used=0) for i in range(1, 5))
    scene.n_queued = 0
    assert scene.tick_for(50).wanted == 4


def test_shrinking_waits_for_the_delay() -> None:
    scene = Scene(replicas=tuple(replica(f"r{i}", used=7) for i in range(3)), machines=(machine(),))
    assert scene.tick_for(60).wanted == 3
    scene.replicas = (replica("r0", used=7), replica("r1", used=0), replica("r2", used=0))
    assert scene.tick_for(25).wanted == 3
    decision = scene.tick_for(90)
    assert decision.wanted == 1
    assert [c.replica_id for c in decision.commands if c.KIND == "drain_replica"] == ["r1", "r2"]


def test_a_shrinking_maximum_drains_the_surplus_at_once() -> None:
    scene = Scene(
        spec=spec(max_replicas=1),
        replicas=(replica("r1", used=1), replica("r2", used=5), replica("r3", ReplicaPhase.LOADING)),
        machines=(machine(),),
    )
    decision = scene.tick()
    assert [(c.KIND, c.replica_id) for c in decision.commands] == [
        ("stop_replica", "r3"),
        ("drain_replica", "r1"),
    ]


def test_deleted_means_none() -> None:
    scene = Scene(
        spec=spec(deleted=True, min_replicas=2),
        n_queued=5,
        replicas=(replica("r1", used=5),),
        machines=(machine(),),
    )
    decision = scene.tick()
    assert kinds(decision) == ["drain_replica"]
    assert decision.status.code == "deployment_deleted"


def test_a_suspended_tenant_gets_nothing_new_and_keeps_nothing_after_the_grace() -> None:
    scene = Scene(
        spec=spec(suspended_at_s=T0, suspension_grace_s=60.0, min_replicas=2),
        n_queued=50,
        replicas=(replica("r1", used=5),),
        machines=(machine(),),
    )
    assert scene.tick_for(55).commands == ()
    decision = scene.tick(10)
    assert kinds(decision) == ["drain_replica"]
    assert "suspended" in decision.reasons[0]


def test_a_suspended_tenant_at_zero_wakes_nothing_and_replaces_nothing() -> None:
    suspended = spec(suspended_at_s=T0, min_replicas=1)
    assert Scene(spec=suspended, n_queued=5, machines=()).tick_for(30).commands == ()
    outdated = Scene(spec=suspended, replicas=(replica("r1", outdated=True),), machines=(machine(),))
    assert outdated.tick_for(30).commands == ()


def test_bounds_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="max_replicas = 1 is out of range"):
        spec(min_replicas=2, max_replicas=1)


# -- properties


def _situation(seed: int) -> tuple[Observation, ScalerSpec, ScalerMemory]:
    rng = random.Random(seed)
    wanted_spec = spec(
        min_replicas=rng.randint(0, 2),
        max_replicas=rng.randint(2, 9),
        slots=rng.randint(1, 20),
        max_machines=3,
    )
    replicas: tuple[ReplicaView, ...] = tuple(
        replica(
            f"r{i}",
            rng.choice(list(ReplicaPhase)),
            used=rng.choice([None, 0, 1, wanted_spec.slots]),
            slots=wanted_spec.slots,
            phase_at_s=T0 - rng.randint(0, 500),
            machine_id=f"m{rng.randint(1, 3)}",
            outdated=rng.random() < 0.2,
        )
        for i in range(rng.randint(0, 8))
    )
    machines = tuple(machine(f"m{i}", n_free=rng.randint(0, 3)) for i in range(1, rng.randint(1, 4)))
    scene = Scene(
        spec=wanted_spec, n_queued=rng.choice([None, 0, 1, 50]), replicas=replicas, machines=machines
    )
    for _ in range(rng.randint(0, 20)):
        scene.tick(rng.choice([0.1, 1, 5, 30]))
    scene.now_s += 1
    return scene.observation(), wanted_spec, scene.memory


@pytest.mark.parametrize("seed", SEEDS)
def test_wish_is_bounded_and_stable_on_repeat_and_blind_to_order(seed: int) -> None:
    observation, wanted_spec, memory = _situation(seed)
    decision = decide(observation, wanted_spec, memory)
    assert wanted_spec.min_replicas <= decision.wanted <= wanted_spec.max_replicas
    assert decide(observation, wanted_spec, memory) == decision
    shuffled = replace(
        observation,
        replicas=tuple(reversed(observation.replicas)),
        machines=tuple(reversed(observation.machines)),
    )
    assert decide(shuffled, wanted_spec, memory) == decision


@pytest.mark.parametrize("seed", SEEDS)
def test_wish_is_monotone_in_load(seed: int) -> None:
    observation, wanted_spec, memory = _situation(seed)
    wanted = [
        wish(replace(observation, n_queued=n), wanted_spec, memory).n
        for n in (0, 1, 5, 20, 100, 1000, 100_000)
    ]
    assert wanted == sorted(wanted), seed


@pytest.mark.parametrize("seed", SEEDS)
def test_commands_never_exceed_room_or_bounds(seed: int) -> None:
    observation, wanted_spec, memory = _situation(seed)
    decision = decide(observation, wanted_spec, memory)
    started = [c.machine_id for c in decision.commands if c.KIND == "start_replica"]
    for seen in observation.machines:
        assert started.count(seen.id) <= seen.n_free
    launched = kinds(decision).count("launch_machine")
    assert launched <= 1
    assert observation.n_machines + launched <= max(wanted_spec.max_machines, observation.n_machines)
    ids = [c.command_id for c in decision.commands]
    assert len(set(ids)) == len(ids)
    touched = [c.replica_id for c in decision.commands if c.KIND in ("drain_replica", "stop_replica")]
    assert len(set(touched)) == len(touched)


def test_memory_stays_bounded_over_a_day_of_ticks() -> None:
    scene = Scene(replicas=(replica("r1", used=3),), machines=(machine(),))
    for _ in range(2000):
        scene.tick(0.4)
    assert len(scene.memory.samples) <= 61
    assert len(scene.memory.beats) == 1
