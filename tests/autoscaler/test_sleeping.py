"""The sleeping rung on real rows, Redis and watcher: ordered by the policy, told to the agent, woken by a request."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from django.utils import timezone

from autoscaler import launch, reconcile, records, resting
from autoscaler.models import Decision, Machine, MachineState, Replica, ReplicaPhase, StartTiming
from autoscaler.observe import machine_views
from autoscaler.tick import replay, stored_commands
from autoscaler.watch.recorder import Recorder
from autoscaler.watch.watcher import Watcher
from tests.autoscaler.conftest import Scaling
from tests.autoscaler.test_from_zero import real  # noqa: F401
from tests.cloud.asking import Asker
from workers.contract import ReplicaPhase as Reported
from workers.contract import ReplicaStatus


def serving(scaling: Scaling) -> Replica:
    """A replica whose engine can sleep, and that has nothing to do."""
    profile = {**scaling.deployment.engine_profile, "sleep_level": 1}
    scaling.change(engine_profile=profile, idle_timeout_s=0)
    replica = scaling.serving()
    _idle(scaling, replica)
    return replica


def asleep(scaling: Scaling) -> Replica:
    replica = serving(scaling)
    scaling.tick()
    scaling.report(replica, Reported.LOADING)  # as one that sleeps says it
    assert scaling.replica().phase == ReplicaPhase.SLEEPING
    return replica


def _idle(scaling: Scaling, replica: Replica) -> None:
    cell = scaling.house.cell
    cell.redis.hset(cell.keys.replica(replica.id.hex), "used", 0)
    cell.redis.delete(cell.keys.queue(scaling.deployment.id.hex))
    scaling.beat(replica, 1)


def told(scaling: Scaling, replica: Replica) -> str:
    return scaling.house.cell.read_desired(replica.machine_id.hex)[replica.id.hex]


def state(scaling: Scaling, replica: Replica) -> object:
    return scaling.house.cell.redis.hget(scaling.house.cell.keys.replica(replica.id.hex), "state")


def test_the_last_replica_is_put_to_sleep_and_takes_no_place(scaling: Scaling) -> None:
    replica = serving(scaling)
    prefixes = scaling.house.cell.keys.replica_prefixes(replica.id.hex)
    scaling.house.cell.redis.zadd(prefixes, {"a": 1})
    scaling.tick()
    row = scaling.replica()
    assert (row.id, row.phase) == (replica.id, ReplicaPhase.SLEEPING)
    assert (told(scaling, replica), state(scaling, replica)) == ("sleep", b"draining")
    assert not scaling.house.cell.redis.exists(prefixes), "its cache is gone"
    (view,) = machine_views(scaling.house.config, scaling.house.cell.keys.cell)
    assert (view.n_replicas, view.n_free, view.n_beds) == (0, 4, 1)
    assert view.empty_since_s == pytest.approx(row.phase_at.timestamp())
    stored = Decision.objects.latest("at")
    assert [c["kind"] for c in stored.commands] == ["sleep_replica"]
    assert any("rests: asleep" in reason for reason in stored.reasons)
    assert replay(stored).commands == stored_commands(stored)


def test_a_request_wakes_it_and_how_long_that_takes_is_learned(scaling: Scaling) -> None:
    replica = asleep(scaling)
    scaling.queue("a")
    scaling.tick()
    assert scaling.replica().phase == ReplicaPhase.WAKING
    assert (told(scaling, replica), Replica.objects.count()) == ("", 1)
    did = scaling.deployment.id.hex
    assert scaling.house.cell.last_stage(did) == ("waking_replica", "")
    Replica.objects.update(phase_at=timezone.now() - timedelta(seconds=2))
    scaling.report(replica, Reported.READY)
    assert scaling.replica().phase == ReplicaPhase.READY
    assert StartTiming.objects.get(stage="waking_replica").average_ms == pytest.approx(2000, rel=0.2)
    rungs, _ = resting.rungs(scaling.deployment_row(), scaling.house.config)
    assert rungs[0].wake_s == pytest.approx(2.0, rel=0.2)


def test_a_machine_with_sleepers_only_is_given_back_and_nothing_counts_as_failed(scaling: Scaling) -> None:
    replica = asleep(scaling)
    machine = scaling.machine()
    assert launch.terminate(machine.id, "kept warm long enough", scaling.house.provider, scaling.house.cell)
    assert scaling.replica().phase == ReplicaPhase.STOPPED and scaling.machine().state == MachineState.GONE
    scaling.queue("a")
    decision = scaling.tick().decision
    assert decision.status.last_error == "" and scaling.replica().id != replica.id


def test_one_that_wakes_keeps_its_machine(scaling: Scaling) -> None:
    asleep(scaling)
    scaling.queue("a")
    scaling.tick()
    assert not launch.terminate(scaling.machine().id, "idle", scaling.house.provider, scaling.house.cell)
    assert scaling.replica().phase == ReplicaPhase.WAKING


def test_an_order_that_redis_lost_is_given_again(scaling: Scaling) -> None:
    replica = asleep(scaling)
    keys = scaling.house.cell.keys.machine(replica.machine_id.hex)
    for phase, wanted in ((ReplicaPhase.SLEEPING, "sleep"), (ReplicaPhase.WAKING, "")):
        other = "" if wanted else "sleep"
        Replica.objects.update(phase=ReplicaPhase.SLEEPING if other else ReplicaPhase.READY)
        reconcile.restore(scaling.house)
        assert told(scaling, replica) == other
        Replica.objects.update(phase=phase)
        assert reconcile.restore(scaling.house) >= 1
        assert told(scaling, replica) == wanted
        assert reconcile.restore(scaling.house) == 0
        assert scaling.house.cell.redis.exists(keys.desired)


def test_the_watcher_gives_a_sleeper_nothing_and_routes_to_one_that_woke(scaling: Scaling) -> None:
    replica = asleep(scaling)
    now = [1000.0]
    watcher = Watcher(
        scaling.house.cell, recorder := Recorder(scaling.house), stale_after_s=2.0, clock=lambda: now[0]
    )

    def turn() -> None:
        now[0] += 0.25
        watcher.step(0.02)
        recorder.step()

    did = scaling.deployment.id.hex
    for seq in range(2, 6):  # it has not slept yet, and Redis lost what control knows
        scaling.beat(replica, seq)
        scaling.house.cell.redis.hdel(scaling.house.cell.keys.replica(replica.id.hex), "state")
        turn()
        assert scaling.house.cell.routed(did) == []
    scaling.queue("a")
    scaling.tick()
    recorder.want_table()
    turn()
    assert scaling.replica().phase == ReplicaPhase.WAKING
    keys = scaling.house.cell.keys.machine(replica.machine_id.hex)
    ready = msgspec.json.encode(ReplicaStatus(replica=replica.id.hex, phase=Reported.READY, slots=4))
    watcher._told[replica.id.hex] = (Reported.READY, "")  # woken before it slept: it says nothing new
    scaling.house.cell.redis.hset(keys.actual, replica.id.hex, ready)
    for seq in range(6, 12):
        scaling.beat(replica, seq)
        turn()
    assert [r.hex for r in scaling.house.cell.routed(did)] == [replica.id.hex]
    assert scaling.replica().phase == ReplicaPhase.READY


def test_a_sleeper_that_dies_is_not_a_failed_start(scaling: Scaling) -> None:
    replica = asleep(scaling)
    records.replica_lost(replica.id, "heartbeat_lost", "no heartbeat for 2 s", scaling.house.cell)
    assert scaling.replica().phase == ReplicaPhase.STOPPED


@pytest.mark.full
def test_it_sleeps_and_wakes_with_real_processes(
    real: Scaling,  # noqa: F811
    eventually: Callable[..., None],
) -> None:
    """Provider, agent, zygote and front; the policy orders, a request wakes."""
    cell, did = real.house.cell, real.deployment.id.hex
    profile: dict[str, Any] = {"sleep_level": 1, "toy_weights_bytes": 8 << 20, "kv_cache_bytes": 64 << 20}
    real.change(engine_profile={**real.deployment.engine_profile, **profile}, idle_timeout_s=1)
    asker = Asker(cell, did)
    request = asker.ask("first")
    eventually(lambda: len(cell.routed(did)) == 1, "a replica is routed to", 60)
    first = real.replica()
    machine = real.machine()
    pid = cell.read_actual([(first.id.hex, machine.id.hex)])[first.id.hex].pid
    eventually(lambda: asker.answer(request)[1], "it is answered", 20)
    asker.settle(request)
    eventually(
        lambda: real.tick() and real.replica().phase == ReplicaPhase.SLEEPING, "it is put to sleep", 120
    )

    def sleeps() -> bool:
        return cell.read_actual([(first.id.hex, machine.id.hex)])[first.id.hex].asleep

    eventually(sleeps, "its front sleeps", 20)
    request = asker.ask("second")
    eventually(lambda: [r.hex for r in cell.routed(did)] == [first.id.hex], "it is woken", 20)
    eventually(lambda: real.replica().phase == ReplicaPhase.READY, "its row says so", 20)
    assert cell.read_actual([(first.id.hex, machine.id.hex)])[first.id.hex].pid == pid
    assert Replica.objects.count() == 1 and Machine.objects.count() == 1
    eventually(lambda: asker.answer(request)[1], "and it answers", 20)
    assert StartTiming.objects.filter(stage="waking_replica").exists()
    asker.close()
