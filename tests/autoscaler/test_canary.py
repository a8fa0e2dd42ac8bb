"""A rollout from its first replica to its end: who is sent to the canary, what decides, and what a crash leaves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import connections
from django.utils import timezone

from autoscaler.models import Replica
from autoscaler.models import ReplicaPhase as RowPhase
from controlplane.errors import ConflictError, InvalidInputError
from controlplane.ids import new_id
from controlplane.operations.advance import Done
from controlplane.policy.canary import Limits, takes
from controlplane.rollouts import canary, services
from controlplane.rollouts.models import Rollout, RolloutState, Wanted
from tests.autoscaler.conftest import Scaling
from tests.booked import book_usage
from workers.contract import Heartbeat, ReplicaPhase

SHARE_PPM = 200_000
QUICK = Limits(alpha=0.05, tolerance=0.2, slower_tolerance=0.4, min_requests=10, step_max_s=600)


def begin(scaling: Scaling, **values: Any) -> Rollout:
    defaults: dict[str, Any] = {
        "engine_profile": {"engine": "toy", "max_num_seqs": 8}, "steps_ppm": (SHARE_PPM, 500_000), "limits": QUICK,
    }  # fmt: skip
    return services.begin(
        organization_id=scaling.world.organization.id,
        deployment_id=scaling.deployment.id,
        **(defaults | values),
    )


def _text(raw: Any) -> str:
    return str(raw.decode())


def row_of(rollout: Rollout) -> Rollout:
    return Rollout.objects.select_related("candidate", "deployment", "deployment__slo_class").get(
        id=rollout.id
    )


def look(scaling: Scaling, rollout: Rollout) -> Any:
    return canary.advance(row_of(rollout), scaling.house.cell)


def canary_of(rollout: Rollout) -> Replica:
    return Replica.objects.get(spec_digest=row_of(rollout).candidate.digest)


def route(scaling: Scaling, replica: Replica, share: int | None) -> None:
    scaling.report(replica, ReplicaPhase.READY)
    scaling.house.cell.enrol(
        replica=replica.id.hex, machine=replica.machine_id.hex, deployment=scaling.deployment.id.hex,
        slots=replica.slots, share=share,
    )  # fmt: skip


@pytest.fixture
def observing(scaling: Scaling) -> tuple[Scaling, Rollout, Replica, Replica]:
    """A stable replica, and a canary that has its first share: (scaling, rollout, stable, canary)."""
    stable = scaling.serving()
    rollout = begin(scaling)
    scaling.tick()
    tried = canary_of(rollout)
    route(scaling, tried, 0)
    look(scaling, rollout)
    assert row_of(rollout).state == RolloutState.OBSERVING
    return scaling, rollout, stable, Replica.objects.get(id=tried.id)


def share_in_redis(scaling: Scaling, replica: Replica) -> Any:
    return scaling.house.cell.redis.hget(scaling.house.cell.keys.replica(replica.id.hex), "share")


def booked(scaling: Scaling, replica: Replica, n: int, **values: Any) -> None:
    for _ in range(n):
        book_usage(
            scaling.world, age_s=0, deployment_id=scaling.deployment.id, replica_id=replica.id,
            admitted_at=timezone.now(), **values,
        )  # fmt: skip
    connections["default"].close()  # the next one is the control worker's again


def test_a_canary_is_beside_the_wanted_number_and_runs_the_candidate(scaling: Scaling) -> None:
    stable = scaling.serving()
    rollout = begin(scaling)
    scaling.tick()
    tried = canary_of(rollout)
    assert (tried.slots, tried.spec["canary"], tried.spec["profile"]["max_num_seqs"]) == (8, True, 8)
    scaling.tick()  # still there, and not one more; the stable one is neither outdated nor surplus
    assert Replica.objects.exclude(phase__in=("stopped", "failed")).count() == 2
    assert Replica.objects.get(id=stable.id).phase == RowPhase.READY


def test_a_request_is_the_canarys_by_its_id_and_nothing_else_gets_there(
    observing: tuple[Scaling, Rollout, Replica, Replica],
) -> None:
    scaling, _, stable, tried = observing
    cell = scaling.house.cell
    ids = sorted((new_id().hex for _ in range(40)), key=lambda each: takes(each, SHARE_PPM))
    own = [each for each in ids if takes(each, SHARE_PPM)][:4]
    scaling.queue(*[each for each in ids if not takes(each, SHARE_PPM)][:8])
    assert cell.redis.hget(cell.keys.replica(tried.id.hex), "used") == b"0"
    scaling.queue(*own)  # they wait behind the others; the stable one is full
    bound = cell.redis.smembers(cell.keys.replica_live(tried.id.hex))
    assert {_text(each) for each in bound} <= set(own)
    assert cell.redis.hget(cell.keys.replica(stable.id.hex), "used") == b"4"


def test_admission_gives_a_canary_that_a_gateway_names_its_own_requests_only(
    observing: tuple[Scaling, Rollout, Replica, Replica],
) -> None:
    scaling, _, stable, tried = observing
    cell, named = scaling.house.cell, (tried.id.hex, stable.id.hex)
    ids = [new_id().hex for _ in range(200)]
    other = next(each for each in ids if not takes(each, SHARE_PPM))
    own = next(each for each in ids if takes(each, SHARE_PPM))
    scaling.queue(other, own, candidates=named)
    assert cell.redis.hget(cell.keys.request(other), "rid") == stable.id.hex.encode()
    assert cell.redis.hget(cell.keys.request(own), "rid") == tried.id.hex.encode()


def test_a_gateway_names_canaries_to_their_own_requests_first_and_to_others_never() -> None:
    from controlplane.gateway.routes import _in_arms
    from controlplane.policy.canary import threshold

    shares = {"canary": threshold(SHARE_PPM)}
    for request in (new_id().hex for _ in range(300)):
        arms = ("canary", "a", "b") if takes(request, SHARE_PPM) else ("a", "b")
        assert _in_arms(("a", "canary", "b"), shares, request) == arms


def test_what_ran_before_never_goes_to_a_canary(observing: tuple[Scaling, Rollout, Replica, Replica]) -> None:
    """Handed back, it waits for the others although the canary has room."""
    scaling, rollout, stable, tried = observing
    cell = scaling.house.cell
    Rollout.objects.filter(id=rollout.id).update(share_ppm=1_000_000)
    look(scaling, rollout)
    scaling.queue(*[new_id().hex for _ in range(3)], candidates=(stable.id.hex,))  # it has one already
    request = new_id().hex
    scaling.queue(request, candidates=(tried.id.hex,))
    assert cell.redis.hget(cell.keys.request(request), "rid") == tried.id.hex.encode()
    keys = cell.keys.machine(tried.machine_id.hex)
    cell.redis.delete(keys.prefix + keys.queue_name(tried.id.hex))  # taken by its consumer
    assert cell.bind_again(tried.id.hex, tried.machine_id.hex, [request]) == 1
    assert cell.redis.hget(cell.keys.request(request), "state") == b"queued"
    assert cell.redis.sismember(cell.keys.replica_live(tried.id.hex), request) == 0


def test_an_equal_canary_goes_step_by_step_to_all_of_the_traffic(
    observing: tuple[Scaling, Rollout, Replica, Replica],
) -> None:
    scaling, rollout, stable, tried = observing
    for step in (0, 1):
        assert row_of(rollout).step == step
        booked(scaling, stable, 60)
        booked(scaling, tried, 60)
        found = look(scaling, rollout)
    assert isinstance(found, Done)
    row = row_of(rollout)
    assert (row.state, row.share_ppm) == (RolloutState.PROMOTED, 1_000_000)
    assert [entry["seen"]["canary_requests"] for entry in row.evidence] == [60, 60]
    assert row.evidence[0]["figures"][0]["name"] == "errors"
    deployment = scaling.seen()
    assert (deployment.engine_profile["max_num_seqs"], deployment.generation) == (8, 2)
    assert share_in_redis(scaling, tried) is None
    scaling.tick()
    assert Replica.objects.get(id=stable.id).phase == RowPhase.DRAINING
    assert Replica.objects.get(id=tried.id).phase == RowPhase.READY


@pytest.mark.parametrize(
    ("values", "words"),
    [({"status": 500, "finish_reason": "error"}, "errors"),
     ({"first_token_ms": 5_000, "duration_ms": 6_000}, "promises"),
     ({"first_token_ms": 80, "duration_ms": 1_700}, "slower tokens")],
)  # fmt: skip
def test_a_worse_canary_is_rolled_back_by_itself(
    observing: tuple[Scaling, Rollout, Replica, Replica], values: dict[str, Any], words: str
) -> None:
    scaling, rollout, stable, tried = observing
    booked(scaling, stable, 40)
    booked(scaling, tried, 40, **values)
    look(scaling, rollout)
    row = row_of(rollout)
    assert row.state == RolloutState.ROLLING_BACK
    assert words in row.verdict
    assert row.evidence[-1]["action"] == "back"
    assert share_in_redis(scaling, tried) == b"0"
    assert Replica.objects.get(id=tried.id).phase == RowPhase.DRAINING
    scaling.report(tried, ReplicaPhase.STOPPED)
    with pytest.raises(ConflictError, match=words):
        look(scaling, rollout)
    assert row_of(rollout).state == RolloutState.ROLLED_BACK
    scaling.tick()
    assert scaling.seen().engine_profile["max_num_seqs"] == 4
    assert Replica.objects.exclude(phase__in=("stopped", "failed")).count() == 1


def test_what_it_hands_back_counts_against_it_and_is_bound_elsewhere(
    observing: tuple[Scaling, Rollout, Replica, Replica],
) -> None:
    import msgspec

    from autoscaler.watch.recorder import Recorder
    from autoscaler.watch.watcher import Watcher

    scaling, rollout, stable, tried = observing
    cell = scaling.house.cell
    Rollout.objects.filter(id=rollout.id).update(share_ppm=1_000_000)
    look(scaling, rollout)
    scaling.queue(*[new_id().hex for _ in range(6)])
    held = [_text(each) for each in cell.redis.smembers(cell.keys.replica_live(tried.id.hex))]
    keys = cell.keys.machine(tried.machine_id.hex)
    cell.redis.delete(keys.prefix + keys.queue_name(tried.id.hex))  # taken by its consumer
    beat = Heartbeat(
        machine=tried.machine_id.hex, seq=7, at_ms=1, replica=tried.id.hex, phase=ReplicaPhase.READY,
        slots=8, n_errors_total=len(held), handed_back=tuple(held),
    )  # fmt: skip
    cell.redis.set(keys.heartbeat(tried.id.hex), msgspec.json.encode(beat))
    scaling.beat(stable, 7)
    recorder = Recorder(scaling.house)
    recorder.step()
    watcher = Watcher(cell, recorder, stale_after_s=60)
    for _ in range(3):
        watcher.step(0.0)
        watcher._next_scan_s = 0.0
    assert cell.redis.scard(cell.keys.replica_live(tried.id.hex)) == 0
    assert canary.handed_back(row_of(rollout), cell) == len(held)


def test_processes_that_fail_end_it_and_do_not_hold_up_the_stable_arm(scaling: Scaling) -> None:
    scaling.serving()
    rollout = begin(scaling)
    for _ in range(2):
        scaling.tick()
        found = Replica.objects.filter(spec_digest=row_of(rollout).candidate.digest, phase="starting").get()
        scaling.report(found, ReplicaPhase.FAILED, "out_of_memory", "no room")
    with pytest.raises(ConflictError, match="out_of_memory"):
        look(scaling, rollout)
    assert row_of(rollout).state == RolloutState.ROLLED_BACK
    assert "failed in a row" not in str(scaling.tick().decision.reasons)


def test_operators_pause_promote_and_abort(observing: tuple[Scaling, Rollout, Replica, Replica]) -> None:
    scaling, rollout, stable, tried = observing
    ask: dict[str, Any] = {
        "organization_id": scaling.world.organization.id,
        "deployment_id": scaling.deployment.id,
        "rollout_id": rollout.id,
    }
    services.order(**ask, paused=True)
    booked(scaling, stable, 60)
    booked(scaling, tried, 60)
    look(scaling, rollout)
    assert row_of(rollout).step == 0
    services.order(**ask, paused=False)
    look(scaling, rollout)
    assert row_of(rollout).step == 1
    services.order(**ask, wanted=Wanted.PROMOTE)
    assert isinstance(look(scaling, rollout), Done)
    with pytest.raises(ConflictError, match="has ended"):
        services.order(**ask, wanted=Wanted.ABORT)


def test_another_change_of_what_runs_supersedes_it_and_one_of_scale_does_not(
    observing: tuple[Scaling, Rollout, Replica, Replica],
) -> None:
    scaling, rollout, _, tried = observing
    scaling.change(max_replicas=3)
    look(scaling, rollout)
    assert row_of(rollout).state == RolloutState.OBSERVING
    scaling.change(engine_profile={**scaling.seen().engine_profile, "max_num_seqs": 2})
    look(scaling, rollout)
    scaling.report(tried, ReplicaPhase.STOPPED)
    with pytest.raises(ConflictError):
        look(scaling, rollout)
    assert row_of(rollout).state == RolloutState.SUPERSEDED


class CrashError(BaseException):
    """The control worker is gone."""


@pytest.fixture
def crash_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """`crash_after(n)`: the n-th effect of the next steps still happens, what comes after it does not."""
    left = [10**9]

    def effect(name: str, where: Any) -> None:
        before = getattr(where, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            found = before(*args, **kwargs)
            left[0] -= 1
            if left[0] == 0:
                raise CrashError
            return found

        monkeypatch.setattr(where, name, counted)

    for name in ("_move", "_tell", "drain"):
        effect(name, canary)
    effect("adopt", services)
    yield lambda n: left.__setitem__(0, n)


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_worker_that_dies_after_any_effect_is_taken_over(
    observing: tuple[Scaling, Rollout, Replica, Replica],
    crash_after: Callable[[int], None],
    n: int,
    bad: bool,
) -> None:
    """Killed after its n-th write or order of the deciding look, the next looks end where an undisturbed one would."""
    scaling, rollout, stable, tried = observing
    Rollout.objects.filter(id=rollout.id).update(step=1, share_ppm=500_000)
    booked(scaling, stable, 60)
    booked(scaling, tried, 60, **({"status": 500} if bad else {}))
    crash_after(n)
    with contextlib.suppress(CrashError):
        look(scaling, rollout)
    crash_after(10**9)
    for _ in range(3):
        try:
            look(scaling, rollout)
        except ConflictError:
            break
        if bad:
            scaling.report(Replica.objects.get(id=tried.id), ReplicaPhase.STOPPED)
    row = row_of(rollout)
    assert row.state == (RolloutState.ROLLED_BACK if bad else RolloutState.PROMOTED)
    assert scaling.seen().engine_profile["max_num_seqs"] == (4 if bad else 8)
    assert scaling.seen().generation == (1 if bad else 2)
    assert share_in_redis(scaling, tried) in ((b"0",) if bad else (None,))


def test_a_rollout_that_no_operation_carries_on_gets_one(scaling: Scaling) -> None:
    from controlplane.operations.models import Operation, State

    rollout = begin(scaling)
    assert services.mend() == 0
    Operation.objects.filter(kind=services.CANARY).update(state=State.FAILED, finished_at=timezone.now())
    assert services.mend() == 1
    assert row_of(rollout).operation_id != rollout.operation_id


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"engine_profile": {"engine": "toy", "max_num_seqs": 4}}, "engine_profile"),
        ({"engine_profile": {"engine": "toy", "max_num_seqs": 8, "max_model_len": 512}}, "engine_profile"),
        ({"steps_ppm": (0,)}, "steps_ppm"),
        ({"steps_ppm": (500_000, 100_000)}, "steps_ppm"),
        ({"steps_ppm": (900_000,)}, "steps_ppm"),
    ],
)
def test_what_cannot_be_tried_is_refused_with_the_field(
    scaling: Scaling, values: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidInputError) as refused:
        begin(scaling, **values)
    assert refused.value.field == field


def test_two_rollouts_of_a_deployment_at_once_are_refused(scaling: Scaling) -> None:
    begin(scaling)
    with pytest.raises(ConflictError, match="open already"):
        begin(scaling, engine_profile={"engine": "toy", "max_num_seqs": 16})


def test_weights_that_adapters_were_not_made_for_are_not_tried(scaling: Scaling) -> None:
    from controlplane.adapters import services as adapters
    from tests.world import make_version

    organization_id = scaling.world.organization.id
    services_of = {"engine": "toy", "max_num_seqs": 4, "max_loras": 2}
    scaling.change(engine_profile={**scaling.seen().engine_profile, **services_of})
    adapters.register(organization_id=organization_id, deployment_id=scaling.deployment.id, name="formal")
    other = make_version(organization_id, digest="f" * 64)
    with pytest.raises(InvalidInputError, match="adapters are served") as refused:
        begin(scaling, model_version_id=other.id, engine_profile=None)
    assert refused.value.field == "model_version_id"
