"""Where replicas go, which ones leave, and when machines are given back."""

from autoscaler.policy.machines import to_release
from autoscaler.policy.placement import place
from autoscaler.types import MachineState, ReplicaPhase
from tests.autoscaler.policy.scene import T0, Scene, kinds, machine, replica, spec


def _order(*machines: object, n: int, **limits: object) -> tuple[tuple[str, ...], bool, int]:
    scene = Scene(machines=machines)  # type: ignore[arg-type]
    found = place(n, scene.observation(), spec(**limits))
    return found.machine_ids, found.launch, found.n_unplaced


def test_machines_we_have_come_first_ready_ones_before_others() -> None:
    pending = machine("m0", 9, state=MachineState.PENDING)
    assert _order(pending, machine("m1", 1), n=2) == (("m1", "m0"), False, 0)


def test_replicas_spread_over_the_freest() -> None:
    assert _order(machine("m1", 2), machine("m2", 3), n=4) == (("m2", "m1", "m2", "m1"), False, 0)


def test_without_room_one_machine_is_bought_up_to_the_limit() -> None:
    assert _order(machine("m1", 0), n=3) == ((), True, 3)
    assert _order(machine("m1", 0), machine("m2", 1), n=3) == (("m2",), False, 2)


def test_draining_machines_take_nothing() -> None:
    assert _order(machine("m1", 5, state=MachineState.DRAINING), n=1, max_machines=1) == ((), False, 1)


def test_replicas_on_a_draining_machine_are_replaced_first_and_drained() -> None:
    scene = Scene(
        spec=spec(min_replicas=2),
        replicas=(replica("r1"), replica("r2", ReplicaPhase.LOADING), replica("r3", machine_id="m2")),
        machines=(machine("m1", state=MachineState.DRAINING), machine("m2")),
    )
    decision = scene.tick()
    assert kinds(decision) == ["drain_replica", "stop_replica", "start_replica"]
    assert decision.commands[2].machine_id == "m2"  # type: ignore[union-attr]


def _under_notice(left_s: float = 120.0) -> Scene:
    """r1 serves on m1, which will be taken away `left_s` after the first tick (5 s from now)."""
    leaving = machine("m1", state=MachineState.DRAINING, n_replicas=1, ends_at_s=T0 + 5 + left_s)
    return Scene(spec=spec(min_replicas=1, max_machines=1), replicas=(replica("r1"),), machines=(leaving,))


def test_under_notice_the_successor_serves_before_the_drain_begins() -> None:
    scene = _under_notice()
    assert kinds(scene.tick()) == ["launch_machine"], "its own machine holds no place any more"
    scene.machines = (*scene.machines, machine("m2", state=MachineState.PENDING))
    decision = scene.tick()
    assert [(c.KIND, c.machine_id) for c in decision.commands] == [("start_replica", "m2")]  # type: ignore[union-attr]
    for phase in (ReplicaPhase.STARTING, ReplicaPhase.LOADING):
        scene.replicas = (replica("r1"), replica("r2", phase, machine_id="m2"))
        assert scene.tick().commands == ()
    scene.replicas = (replica("r1"), replica("r2", machine_id="m2"))
    assert [(c.KIND, c.replica_id) for c in scene.tick().commands] == [("drain_replica", "r1")]  # type: ignore[union-attr]


def test_under_notice_what_runs_moves_on_in_time_whether_replaced_or_not() -> None:
    scene = _under_notice(left_s=21)
    assert "drain_replica" not in kinds(scene.tick())
    decision = scene.tick(1)
    assert [c.replica_id for c in decision.commands if c.KIND == "drain_replica"] == ["r1"]  # type: ignore[union-attr]
    assert "taken away in 20 s" in decision.reasons[0]


def test_under_notice_nobody_makes_room_that_nobody_can_use() -> None:
    scene = _under_notice()
    full = machine("m2", n_free=0, n_replicas=4)
    scene.machines = (*scene.machines, full)
    assert scene.tick().commands == (), "draining it would free a place on a machine that takes nothing"


def test_a_replica_that_only_starts_on_a_machine_under_notice_is_stopped() -> None:
    scene = _under_notice()
    scene.replicas = (replica("r1", ReplicaPhase.LOADING),)
    assert kinds(scene.tick())[0] == "stop_replica"


def test_a_replica_that_does_not_start_in_time_is_ended_as_failed() -> None:
    scene = Scene(replicas=(replica("r1", ReplicaPhase.LOADING),), machines=(machine(),), n_queued=1)
    decision = scene.tick(301)
    command = decision.commands[0]
    assert (command.KIND, command.failure_code) == ("stop_replica", "start_timeout")  # type: ignore[union-attr]
    assert "still loading after 301 s, allowed 300 s" in decision.reasons[0]


def test_a_replica_that_does_not_finish_draining_is_ended() -> None:
    scene = Scene(replicas=(replica("r1", ReplicaPhase.DRAINING),), machines=(machine(),))
    assert scene.tick(119).commands == ()
    assert kinds(scene.tick(2)) == ["stop_replica"]


def test_victims_are_the_least_used_and_ties_go_by_age_then_id() -> None:
    scene = Scene(
        spec=spec(max_replicas=1),
        replicas=(
            replica("r1", used=2),
            replica("r2", used=1, created_at_s=T0 - 9),
            replica("r3", used=1),
            replica("r4", used=None),
        ),
        machines=(machine(),),
    )
    assert [c.replica_id for c in scene.tick().commands] == ["r3", "r2", "r1"]  # type: ignore[union-attr]


def test_outdated_replicas_serve_until_their_successors_do() -> None:
    old = replica("r1", outdated=True, used=1)
    scene = Scene(replicas=(old,), machines=(machine(),))
    assert kinds(scene.tick()) == ["start_replica"]
    scene.replicas = (old, replica("r2", ReplicaPhase.LOADING))
    assert scene.tick().commands == ()
    scene.replicas = (old, replica("r2"))
    assert [(c.KIND, c.replica_id) for c in scene.tick().commands] == [("drain_replica", "r1")]  # type: ignore[union-attr]


def test_an_outdated_replica_makes_room_where_there_is_none() -> None:
    old = replica("r1", outdated=True, used=1)
    scene = Scene(spec=spec(max_machines=1), replicas=(old,), machines=(machine(n_free=0),))
    decision = scene.tick()
    assert [(c.KIND, c.replica_id) for c in decision.commands] == [("drain_replica", "r1")]  # type: ignore[union-attr]
    scene.replicas = (replica("r1", ReplicaPhase.DRAINING, outdated=True),)
    assert scene.tick().commands == ()


def test_clients_hear_of_missing_room_after_a_while() -> None:
    scene = Scene(spec=spec(max_machines=1), n_queued=1, machines=(machine(n_free=0),))
    assert scene.tick().status.stage == "waking"
    assert scene.tick(10).status.stage == "waking"
    status = scene.tick(11).status
    assert (status.stage, status.code, status.retry_after_s) == ("failed", "no_capacity", 20)
    scene.machines = (machine(n_free=1),)
    assert scene.tick().status.stage == "starting_replica"
    assert scene.memory.no_room_since_s is None


def _released(*machines: object, now_s: float = T0 + 1000) -> list[str]:
    found = to_release(machines, now_s, keep_warm_s=900, pending_timeout_s=300)  # type: ignore[arg-type]
    return [command.machine_id for command in found]


def test_a_machine_is_kept_warm_and_then_given_back() -> None:
    assert _released(machine("m1", empty_since_s=T0 + 101)) == []
    assert _released(machine("m1", empty_since_s=T0 + 100)) == ["m1"]
    assert _released(machine("m1", n_replicas=1)) == []


def test_a_machine_that_does_not_come_up_is_given_back_even_if_replicas_wait_for_it() -> None:
    late = machine("m1", state=MachineState.PENDING, n_replicas=1)
    assert _released(late, now_s=T0 + 301) == ["m1"]
    assert _released(late, now_s=T0 + 300) == []


def test_a_drained_machine_is_given_back_at_once() -> None:
    assert _released(machine("m1", state=MachineState.DRAINING)) == ["m1"]
    assert _released(machine("m1", state=MachineState.DRAINING, n_replicas=1)) == []
