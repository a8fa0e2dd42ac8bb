"""Back-off, bound and cool-down of things that do not come up."""

import pytest

from autoscaler.policy.failures import gate
from autoscaler.types import DeploymentPhase, StageName
from tests.autoscaler.policy.scene import T0, Scene, failure, kinds, machine, replica, spec


def test_nothing_failed_leaves_the_gate_open() -> None:
    assert gate((), None, spec()).is_open(T0)


@pytest.mark.parametrize(("n", "delay_s"), [(1, 1), (2, 2), (3, 4), (4, 8), (5, 300), (9, 300)])
def test_delay_doubles_and_ends_in_the_cool_down(n: int, delay_s: float) -> None:
    found = gate(tuple(failure(T0 + i) for i in range(n)), None, spec())
    assert found.retry_at_s == T0 + n - 1 + delay_s
    assert found.exhausted == (n >= 5)


def test_delay_is_bounded() -> None:
    found = gate(tuple(failure(T0 + i) for i in range(20)), None, spec(max_failures=50))
    assert found.delay_s == 60


def test_the_first_death_of_one_that_served_is_met_at_once() -> None:
    assert gate((failure(T0, ready_s=5.0),), None, spec()).is_open(T0)
    assert not gate((failure(T0), failure(T0 + 1, ready_s=5.0)), None, spec()).is_open(T0 + 1)


def test_failures_before_a_proven_replica_are_forgiven() -> None:
    found = gate((failure(T0), failure(T0 + 10)), T0 + 5, spec())
    assert found.n == 1
    assert gate((failure(T0),), T0, spec()).n == 0


def test_crash_loops_are_not_met_at_once_for_ever() -> None:
    """Each replica gets ready, serves a second and dies: the pauses grow all the same."""
    delays = [
        gate(tuple(failure(T0 + i, ready_s=1.0) for i in range(n)), None, spec()).delay_s for n in range(1, 6)
    ]
    assert delays == [0, 1, 2, 4, 300]


def test_failing_replicas_are_retried_one_at_a_time() -> None:
    scene = Scene(n_queued=100, machines=(machine(),), failures=(failure(T0),))
    assert scene.tick(0.5).commands == ()
    assert kinds(scene.tick(0.6)) == ["start_replica"]


@pytest.mark.parametrize(("code", "stage"), [("bad_weights", "failed"), ("engine_died", "starting_replica")])
def test_clients_are_told_of_what_another_attempt_cannot_mend(code: str, stage: str) -> None:
    scene = Scene(n_queued=1, machines=(machine(),), failures=(failure(T0, code),))
    decision = scene.tick(0.5)
    assert decision.status.phase is DeploymentPhase.FAILED
    assert decision.status.stage == stage
    assert decision.status.last_error == f"failed: {code}: it broke; retrying in 1 s (1 of 5)"


def test_clients_are_told_when_the_attempts_are_used_up() -> None:
    scene = Scene(n_queued=1, machines=(machine(),), failures=tuple(failure(T0 + i) for i in range(5)))
    status = scene.tick(10).status
    assert (status.stage, status.code, status.retry_after_s) == (StageName.FAILED, "engine_died", 294)
    scene.now_s = T0 + 4 + 300
    assert kinds(scene.tick(0)) == ["start_replica"]


def test_a_serving_deployment_is_ready_though_its_growth_fails() -> None:
    scene = Scene(
        spec=spec(min_replicas=2),
        replicas=(replica("r1"),),
        machines=(machine(),),
        failures=(failure(T0, "out_of_memory"),),
    )
    status = scene.tick(0.5).status
    assert (status.phase, status.stage) == (DeploymentPhase.READY, StageName.READY)
    assert "out_of_memory" in status.last_error


def test_failed_without_requests_stays_visible_and_starts_nothing() -> None:
    scene = Scene(machines=(machine(),), failures=(failure(T0, "bad_weights"),))
    status = scene.tick(0.5).status
    assert (status.phase, status.stage) == (DeploymentPhase.FAILED, None)
    decision = scene.tick(60)
    assert (decision.status.phase, decision.commands) == (DeploymentPhase.IDLE, ())
    assert "bad_weights" in decision.status.last_error


def test_machines_that_do_not_come_up_are_not_bought_all_the_time() -> None:
    scene = Scene(n_queued=1, machine_failures=(failure(T0, "machine_unavailable"),))
    decision = scene.tick(0.5)
    assert decision.commands == ()
    assert decision.status.last_error.startswith("failed: machine_unavailable")
    assert kinds(scene.tick(1)) == ["launch_machine"]
