"""The watcher on a real Redis and a clock of the test: what is routed, withdrawn, woken, told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pytest
import redis

from autoscaler import records
from autoscaler.cell import Cell
from autoscaler.cell.giving_up import ABANDONED_AFTER_MS
from autoscaler.models import Machine, MachineState, Replica, ReplicaPhase
from autoscaler.specs import desired_spec
from autoscaler.watch.recorder import Recorder
from autoscaler.watch.watcher import Watcher
from controlplane.deployments.models import Phase
from tests.autoscaler.conftest import Scaling
from workers.contract import Heartbeat, Notice, ReplicaStatus, ServingReport, Stage
from workers.contract import ReplicaPhase as Reported
from workers.engine.steps import StepWindow
from workers.scripts import CLAIM


@dataclass
class Watch:
    """A watcher and its recorder, turned by hand."""

    scaling: Scaling
    recorder: Recorder
    watcher: Watcher
    now: list[float] = field(default_factory=lambda: [1000.0])

    @property
    def cell(self) -> Cell:
        return self.scaling.house.cell

    def turn(self, after_s: float = 0.25) -> None:
        """Time passes, both threads do what is due."""
        self.now[0] += after_s
        self.watcher.step(0.05)
        self.recorder.step()

    def turn_until(self, condition: Callable[[], object], what: str, n: int = 100) -> None:
        for _ in range(n):
            if condition():
                return
            self.turn(0.01)
        raise AssertionError(f"not within {n} turns: {what}")

    def say(self, replica: Replica, phase: Reported, machine: str = "", **fields: Any) -> None:
        """The machine announces a phase, on its channel only (the event may be all there is)."""
        status = ReplicaStatus(replica=replica.id.hex, phase=phase, **fields)
        keys = self.cell.keys.machine(machine or replica.machine_id.hex)
        self.cell.redis.publish(keys.event_channel, msgspec.json.encode(status))

    def routed(self) -> list[str]:
        return [rid.hex for rid in self.cell.routed(self.scaling.deployment.id.hex)]

    def state(self, replica: Replica) -> bytes | None:
        return self.cell.redis.hget(self.cell.keys.replica(replica.id.hex), "state")

    def queued(self) -> list[bytes]:
        return self.cell.redis.zrange(self.cell.keys.queue(self.scaling.deployment.id.hex), 0, -1)


@pytest.fixture
def watch(scaling: Scaling) -> Watch:
    recorder = Recorder(scaling.house)
    now = [1000.0]
    watcher = Watcher(scaling.house.cell, recorder, stale_after_s=2.0, clock=lambda: now[0])
    found = Watch(scaling, recorder, watcher, now)
    found.turn()
    assert watcher.is_active
    return found


@pytest.fixture
def loading(watch: Watch) -> Replica:
    """A replica that is about to be ready, and a request that waits for it."""
    watch.scaling.queue("first")
    watch.scaling.tick()
    watch.scaling.machine_up()
    replica = watch.scaling.replica()
    watch.say(replica, Reported.LOADING)
    watch.turn_until(lambda: watch.scaling.replica().phase == ReplicaPhase.LOADING, "loading")
    return replica


@pytest.fixture
def serving(watch: Watch, loading: Replica) -> Replica:
    """A replica that is ready, routed to, and runs the request."""
    watch.scaling.beat(loading, 1)
    watch.say(loading, Reported.READY, slots=4)
    watch.turn_until(lambda: watch.scaling.replica().phase == ReplicaPhase.READY, "ready")
    return loading


# -- waking


def test_a_wake_up_ticks_at_once_and_tells_the_client(watch: Watch) -> None:
    stages = watch.cell.redis.pubsub(ignore_subscribe_messages=True)
    stages.subscribe(watch.cell.keys.stage_channel)
    stages.get_message(timeout=1)
    watch.scaling.queue("first")
    watch.cell.redis.publish(watch.cell.keys.wake_channel, watch.scaling.deployment.id.hex)
    watch.turn_until(lambda: Replica.objects.exists(), "a replica was ordered")
    heard = [
        msgspec.json.decode(m["data"], type=Stage)
        for m in iter(lambda: stages.get_message(timeout=0.2), None)
    ]
    assert list(dict.fromkeys(stage.stage for stage in heard)) == ["waking", "launching_machine"]
    assert {stage.deployment for stage in heard} == {watch.scaling.deployment.id.hex}
    stages.close()


def test_a_lost_wake_up_is_made_up_for_by_the_scan(watch: Watch) -> None:
    watch.scaling.queue("first")
    assert not Replica.objects.exists()
    watch.turn(1.1)
    watch.turn_until(lambda: Replica.objects.exists(), "a replica was ordered")
    assert Replica.objects.get().deployment_id == watch.scaling.deployment.id


def test_a_change_by_the_owner_is_acted_on_at_once(watch: Watch) -> None:
    from controlplane.deployments.services import Change, update_deployment

    update_deployment(
        organization_id=watch.scaling.world.organization.id,
        deployment_id=watch.scaling.deployment.id,
        change=Change(min_replicas=1),
    )
    watch.turn_until(lambda: Replica.objects.exists(), "a replica was ordered")
    assert Replica.objects.get().deployment_id == watch.scaling.deployment.id


def test_clients_of_a_deleted_deployment_are_told(watch: Watch) -> None:
    from controlplane.deployments.services import delete_deployment

    watch.scaling.queue("first")
    delete_deployment(
        organization_id=watch.scaling.world.organization.id, deployment_id=watch.scaling.deployment.id
    )
    did = watch.scaling.deployment.id.hex
    watch.turn_until(lambda: watch.cell.last_stage(did) == ("failed", "deployment_deleted"), "told")
    assert Replica.objects.count() == 0


def test_nonsense_on_the_channels_is_survived(watch: Watch, loading: Replica) -> None:
    keys = watch.cell.keys.machine(loading.machine_id.hex)
    watch.cell.redis.publish(watch.cell.keys.wake_channel, b"\xff not an id")
    watch.cell.redis.publish(keys.event_channel, b"{")
    watch.cell.redis.publish(keys.event_channel, b'{"replica": "x", "phase": "ready"}')
    watch.cell.redis.publish(keys.event_channel, b'{"replica": "x", "phase": "sublime"}')
    watch.cell.redis.set(keys.heartbeat(loading.id.hex), b"\x00")
    for _ in range(5):
        watch.turn()
    assert watch.routed() == []


# -- ready


def test_a_ready_replica_is_routed_to_and_given_what_waits(watch: Watch, serving: Replica) -> None:
    assert watch.routed() == [serving.id.hex]
    assert watch.queued() == []
    assert watch.cell.redis.hget(watch.cell.keys.request("first"), "rid") == serving.id.hex.encode()
    watch.turn_until(lambda: watch.scaling.seen().phase == Phase.READY, "the owner sees it")
    assert watch.cell.last_stage(watch.scaling.deployment.id.hex) == ("ready", "")


def test_routing_does_not_wait_for_postgres(watch: Watch, loading: Replica) -> None:
    watch.scaling.beat(loading, 1)
    watch.say(loading, Reported.READY, slots=4)
    for _ in range(50):
        watch.watcher.step(0.05)  # the recorder never gets its turn
        if watch.routed():
            break
    assert watch.routed() == [loading.id.hex]


def test_a_lost_ready_event_is_made_up_for_by_the_heartbeat(watch: Watch, loading: Replica) -> None:
    watch.scaling.beat(loading, 1)
    watch.turn()
    assert watch.routed() == [loading.id.hex]


def test_a_lost_ready_event_is_made_up_for_by_the_report(watch: Watch, loading: Replica) -> None:
    status = ReplicaStatus(replica=loading.id.hex, phase=Reported.READY, slots=4)
    keys = watch.cell.keys.machine(loading.machine_id.hex)
    watch.cell.redis.hset(keys.actual, loading.id.hex, msgspec.json.encode(status))
    watch.turn(1.1)
    assert watch.routed() == [loading.id.hex]
    watch.turn_until(lambda: watch.scaling.replica().phase == ReplicaPhase.READY, "the row says so")


@pytest.mark.parametrize(("offered", "given"), [(2, b"2"), (400, b"4"), (0, b"4")])
def test_a_machine_may_offer_fewer_slots_and_not_more(
    watch: Watch, loading: Replica, offered: int, given: bytes
) -> None:
    watch.say(loading, Reported.READY, slots=offered)
    watch.turn_until(watch.routed, "routed")
    assert watch.cell.redis.hget(watch.cell.keys.replica(loading.id.hex), "slots") == given


@pytest.mark.parametrize(("said", "noted"), [(4096, b"4096"), (0, None), (10**15, b"1000000000"), (-5, None)])
def test_what_a_replica_says_its_memory_holds_is_noted_within_bounds(
    watch: Watch, loading: Replica, said: int, noted: bytes | None
) -> None:
    key = watch.cell.keys.replica(loading.id.hex)
    watch.say(loading, Reported.READY, slots=4, kv_tokens=said)
    watch.turn_until(watch.routed, "routed")
    assert watch.cell.redis.hget(key, "kv") == noted
    if noted:  # a pump enrols it again and does not know: what was said stays
        watch.cell.enrol(replica=loading.id.hex, machine=loading.machine_id.hex, deployment="d", slots=4)
        assert watch.cell.redis.hget(key, "kv") == noted


def test_which_adapters_a_replica_has_in_memory_is_noted_for_gateways(watch: Watch, serving: Replica) -> None:
    """By their ids alone, bounded, and again after Redis came back empty."""
    key = watch.cell.keys.replica(serving.id.hex)
    assert watch.cell.redis.hget(key, "ad") is None  # its engine takes none
    held = ("a" * 32, "not an id", "b" * 32)
    for seq, (told, noted) in enumerate([(held, b"a" * 32 + b" " + b"b" * 32), ((), b"")]):
        beat = Heartbeat(
            machine=serving.machine_id.hex,
            seq=100 + seq,
            at_ms=0,
            replica=serving.id.hex,
            phase=Reported.READY,
            slots=4,
            adapters=told,
        )
        at = watch.cell.keys.machine(serving.machine_id.hex).heartbeat(serving.id.hex)
        watch.cell.redis.set(at, msgspec.json.encode(beat))
        watch.turn(1.1)
        assert watch.cell.redis.hget(key, "ad") == noted


def test_a_machine_cannot_speak_for_anothers_replica(watch: Watch, loading: Replica) -> None:
    watch.say(loading, Reported.READY, machine="e" * 32, slots=4)
    watch.say(loading, Reported.FAILED, machine="e" * 32)
    for _ in range(5):
        watch.turn()
    assert watch.routed() == []
    assert watch.scaling.replica().phase == ReplicaPhase.LOADING


def test_an_event_that_outruns_the_table_is_kept(watch: Watch) -> None:
    watch.scaling.queue("first")
    watch.scaling.tick()  # somebody else's tick: our table does not have its replica yet
    watch.scaling.machine_up()
    replica = watch.scaling.replica()
    assert replica.id.hex not in watch.recorder.table.replicas
    watch.say(replica, Reported.READY, slots=4)
    watch.turn_until(watch.routed, "routed")


def test_free_slots_are_pumped_when_requests_wait_in_spite_of_them(watch: Watch, serving: Replica) -> None:
    slots = {"slots": serving.slots}
    watch.cell.redis.hset(watch.cell.keys.replica(serving.id.hex), "slots", 0)
    watch.scaling.queue("second")
    watch.cell.redis.hset(watch.cell.keys.replica(serving.id.hex), mapping=slots)
    assert watch.queued() == [b"second"]
    watch.scaling.beat(serving, 2)
    watch.turn(1.1)
    assert watch.queued() == []


# -- slots


def measured(watch: Watch, replica: Replica, seq: int, gap_ms: float, n_running: int, **fields: Any) -> None:
    """A heartbeat that saw fifty steps of so many milliseconds."""
    window = StepWindow()
    window.add(gap_ms, n_running, 0, n_steps=50)
    beat = Heartbeat(
        machine=replica.machine_id.hex, seq=seq, at_ms=seq, replica=replica.id.hex, phase=Reported.READY, slots=4,
        n_steps=50, itl_counts=window.take().buckets, **fields,
    )  # fmt: skip
    keys = watch.cell.keys.machine(replica.machine_id.hex)
    watch.cell.redis.set(keys.heartbeat(replica.id.hex), msgspec.json.encode(beat))


def slots(watch: Watch, replica: Replica) -> int:
    return int(watch.cell.redis.hget(watch.cell.keys.replica(replica.id.hex), "slots") or 0)


def test_a_slow_replica_is_given_fewer_slots_and_says_why(watch: Watch, serving: Replica) -> None:
    """Acme's deployment is interactive: 100 ms between tokens, of which the engine may take 95."""
    for seq in range(2, 12):
        measured(watch, serving, seq, gap_ms=300.0, n_running=4)
        watch.turn(0.5)
    assert slots(watch, serving) == 2
    why = watch.cell.redis.hget(watch.cell.keys.replica(serving.id.hex), "why")
    assert why.startswith(b"shrinks from 4: 95 % of gaps within 29")
    assert b"(target 95) at 4.0 running" in why


def test_slots_grow_again_while_requests_wait_and_are_given_out_at_once(
    watch: Watch, serving: Replica
) -> None:
    watch.cell.redis.hset(watch.cell.keys.replica(serving.id.hex), mapping={"slots": 1, "used": 1})
    watch.scaling.queue("second", "third")
    for seq in range(2, 8):
        measured(watch, serving, seq, gap_ms=10.0, n_running=1)
        watch.turn(0.5)
    assert slots(watch, serving) == 4
    assert watch.queued() == []


def test_the_same_beat_is_counted_once_and_a_silent_replica_grows_nothing(
    watch: Watch, serving: Replica
) -> None:
    watch.cell.redis.hset(watch.cell.keys.replica(serving.id.hex), mapping={"slots": 1, "used": 1})
    watch.scaling.queue("second")
    measured(watch, serving, 2, gap_ms=10.0, n_running=1)
    for _ in range(6):
        watch.turn(0.25)
    assert slots(watch, serving) == 1


def test_adapted_slots_survive_a_pump_another_watcher_and_an_emptied_redis(
    watch: Watch, serving: Replica
) -> None:
    for seq in range(2, 12):
        measured(watch, serving, seq, gap_ms=300.0, n_running=4)
        watch.turn(0.5)
    assert slots(watch, serving) == 2
    watch.scaling.queue("second")
    measured(watch, serving, 12, gap_ms=300.0, n_running=1)
    watch.turn(1.1)  # the pump of the slow scan enrols it again
    assert slots(watch, serving) == 2
    other = Watcher(watch.cell, watch.recorder, stale_after_s=2.0, clock=lambda: watch.now[0])
    watch.cell.redis.delete(watch.cell.keys.watcher_lock)
    watch.scaling.queue("third")
    for seq in range(13, 16):
        measured(watch, serving, seq, gap_ms=95.0, n_running=2)
        watch.cell.redis.hset(watch.cell.keys.replica(serving.id.hex), "used", 1)  # one ended: a slot is free
        watch.now[0] += 1.1
        other.step(0.05)
        assert slots(watch, serving) == 2
    assert watch.queued() == []
    watch.cell.redis.delete(
        watch.cell.keys.replica(serving.id.hex), watch.cell.keys.replicas(watch.scaling.deployment.id.hex)
    )
    measured(watch, serving, 16, gap_ms=95.0, n_running=2)
    watch.now[0] += 1.1
    other.step(0.05)
    assert slots(watch, serving) == 2


def test_a_draining_replica_is_not_resized_back_into_the_routes(watch: Watch, serving: Replica) -> None:
    watch.cell.drain(serving.id.hex)
    for seq in range(2, 12):
        measured(watch, serving, seq, gap_ms=300.0, n_running=4)
        watch.turn(0.5)
    assert slots(watch, serving) == 4
    assert watch.routed() == []


def test_absurd_measurements_are_survived(watch: Watch, serving: Replica) -> None:
    for seq in range(2, 12):
        measured(watch, serving, seq, 10.0, 4, engine_queue=-5.0, kv_used_ratio=1e300, n_preempted=-(2**40))
        watch.turn(0.5)
    assert 1 <= slots(watch, serving) <= 4


# -- death


def test_a_standing_heartbeat_withdraws_the_replica_and_requeues_its_request(
    watch: Watch, serving: Replica
) -> None:
    for seq in range(2, 10):
        watch.scaling.beat(serving, seq)
        watch.turn(0.5)
    assert watch.routed() == [serving.id.hex]
    for _ in range(8):
        watch.turn(0.25)
    assert watch.routed() == [serving.id.hex]  # 2.0 s
    watch.turn(0.25)
    assert watch.state(serving) == b"dead"
    lost = Replica.objects.get(id=serving.id)
    assert (lost.phase, lost.reason_code) == (ReplicaPhase.FAILED, "heartbeat_lost")
    assert serving.id.hex not in watch.cell.read_desired(serving.machine_id.hex)  # its agent kills it
    assert watch.queued() == [b"first"]
    watch.turn_until(lambda: watch.scaling.replica().id != serving.id, "its successor was ordered")


def test_a_failed_replica_is_withdrawn_at_once_and_its_reason_told(watch: Watch, serving: Replica) -> None:
    watch.say(serving, Reported.FAILED, code="engine_died", message="the engine core ended")
    watch.turn_until(lambda: watch.state(serving) == b"dead", "withdrawn")
    watch.turn_until(lambda: "engine core ended" in watch.scaling.seen().last_error, "the owner reads why")
    assert Replica.objects.get(id=serving.id).reason_code == "engine_died"


def test_a_draining_replica_gets_nothing_new_and_stops(watch: Watch, serving: Replica) -> None:
    watch.say(serving, Reported.DRAINING)
    watch.turn_until(lambda: watch.state(serving) == b"draining", "draining")
    assert watch.routed() == []
    watch.say(serving, Reported.STOPPED)
    watch.turn_until(lambda: Replica.objects.get(id=serving.id).phase == ReplicaPhase.STOPPED, "stopped")


def test_a_stop_that_nobody_ordered_is_a_failure(watch: Watch, serving: Replica) -> None:
    watch.say(serving, Reported.STOPPED)
    watch.turn_until(lambda: Replica.objects.get(id=serving.id).phase == ReplicaPhase.FAILED, "failed")
    assert watch.routed() == []
    assert Replica.objects.get(id=serving.id).reason_code


def test_poison_is_failed_told_to_its_gateway_and_settled(watch: Watch, serving: Replica) -> None:
    """It was being served when its first replica died, and now again."""
    cell = watch.cell
    notices = cell.redis.pubsub(ignore_subscribe_messages=True)
    notices.subscribe(cell.keys.notice_channel("g1"))
    notices.get_message(timeout=1)
    cell.redis.hset(cell.keys.request("first"), "crashes", 1)
    prefix = cell.keys.machine(serving.machine_id.hex).prefix
    epoch = cell.redis.hget(cell.keys.request("first"), "epoch")
    claimed = cell.redis.eval(CLAIM.source, 0, prefix, 1, "first", epoch, serving.id.hex)
    assert claimed[0] == b"ok"
    watch.say(serving, Reported.FAILED, code="killed")
    watch.turn_until(lambda: cell.redis.hget(cell.keys.request("first"), "state") == b"done", "settled")
    heard = notices.get_message(timeout=2)
    notice = msgspec.msgpack.decode(heard["data"], type=Notice)
    assert (notice.request, notice.error.status, notice.error.code) == ("first", 500, "request_poison")
    assert watch.queued() == []
    notices.close()


def test_our_own_pause_withdraws_nobody(watch: Watch, serving: Replica) -> None:
    watch.scaling.beat(serving, 2)
    watch.turn()
    watch.scaling.beat(serving, 3)
    watch.turn(60)
    assert watch.routed() == [serving.id.hex]


# -- machines


def _agent_beats(watch: Watch, machine: Machine, seq: int, phase: Reported = Reported.READY) -> None:
    beat = Heartbeat(machine=machine.id.hex, seq=seq, at_ms=0, phase=phase)
    watch.cell.redis.set(watch.cell.keys.machine(machine.id.hex).heartbeat(), msgspec.json.encode(beat))


def test_an_enrolled_machine_is_ready_when_its_agent_can_start_replicas(watch: Watch) -> None:
    watch.scaling.queue("first")
    watch.scaling.tick()
    Machine.objects.update(state=MachineState.ENROLLED)
    watch.recorder.want_table()
    machine = watch.scaling.machine()
    _agent_beats(watch, machine, 1, Reported.STARTING)
    for _ in range(5):
        watch.turn(1.1)
    assert watch.scaling.machine().state == MachineState.ENROLLED
    _agent_beats(watch, machine, 2)
    for _ in range(3):
        watch.turn(1.1)
    assert watch.scaling.machine().state == MachineState.READY


def test_a_silent_agent_is_asked_after_and_restarted(watch: Watch, serving: Replica) -> None:
    from datetime import timedelta

    from django.utils import timezone

    from infra.providers.base import ProviderState

    machine = watch.scaling.machine()
    past = timezone.now() - timedelta(seconds=60)
    Machine.objects.update(created_at=past, launched_at=past)
    watch.scaling.provider.set_state(machine.provider_ref, ProviderState.AGENT_DOWN)
    _agent_beats(watch, machine, 1)
    for seq in range(2, 12):
        watch.scaling.beat(serving, seq)
        watch.turn(1.1)
    assert watch.scaling.provider.restarted == [machine.provider_ref]
    assert watch.routed() == [serving.id.hex]  # replicas outlive their agent


def test_a_machine_that_runs_but_never_answers_is_ended_and_replaced(watch: Watch, serving: Replica) -> None:
    machine = watch.scaling.machine()
    _agent_beats(watch, machine, 1)
    seq = 2
    for _ in range(55):  # its replica serves on
        watch.scaling.beat(serving, seq := seq + 1)
        watch.turn(1.1)
    assert watch.scaling.provider.terminated == []
    assert watch.routed() == [serving.id.hex]
    for _ in range(12):
        watch.scaling.beat(serving, seq := seq + 1)
        watch.turn(1.1)
    assert watch.scaling.provider.terminated == [machine.provider_ref]
    lost = Replica.objects.get(id=serving.id)
    assert (lost.phase, lost.reason_code) == (ReplicaPhase.FAILED, "machine_lost")
    assert "silent for" in Machine.objects.get(id=machine.id).reason
    assert watch.queued() == [b"first"], "its request moves on"
    watch.turn_until(lambda: watch.scaling.machine().id != machine.id, "another machine is bought")


def test_a_replica_that_died_unreported_has_its_machine_asked_after_at_once(
    watch: Watch, serving: Replica
) -> None:
    from datetime import timedelta

    from django.utils import timezone

    from infra.providers.base import ProviderState

    machine = watch.scaling.machine()
    past = timezone.now() - timedelta(seconds=60)
    Machine.objects.update(created_at=past, launched_at=past)
    watch.scaling.provider.set_state(machine.provider_ref, ProviderState.AGENT_DOWN)
    _agent_beats(watch, machine, 1)
    for seq in range(2, 5):
        watch.scaling.beat(serving, seq)
        watch.turn()
    for _ in range(10):  # 2.5 s: the agent itself counts as silent after 6
        watch.turn()
    assert watch.routed() == []
    assert watch.scaling.provider.restarted == [machine.provider_ref]


def test_a_notice_orders_the_replacement_and_drains_when_it_serves(watch: Watch, serving: Replica) -> None:
    """From the agent's beat to the drain; the pool may have one machine, and the leaving one counts no more."""
    leaving = watch.scaling.machine()
    beat = Heartbeat(machine=leaving.id.hex, seq=7, at_ms=0, phase=Reported.DRAINING, ends_in_ms=90_000)
    keys = watch.cell.keys.machine(leaving.id.hex)
    watch.cell.redis.set(keys.heartbeat(), msgspec.json.encode(beat))
    look = ReplicaStatus(replica="", phase=Reported.DRAINING)
    watch.cell.redis.publish(keys.event_channel, msgspec.json.encode(look))

    def beating(seq: int) -> None:
        watch.scaling.beat(serving, seq)

    beating(2)
    watch.turn_until(
        lambda: Replica.objects.count() == 2, "a replacement was ordered", n=10
    )  # 0.1 s: no slow scan
    leaving.refresh_from_db()
    assert (leaving.state, leaving.pool_slot) == (MachineState.DRAINING, None)
    assert leaving.ends_at is not None
    assert watch.routed() == [serving.id.hex], "it serves on"
    successor = watch.scaling.replica()
    assert successor.machine_id != leaving.id

    watch.scaling.machine_up()
    watch.turn_until(lambda: successor.id.hex in watch.recorder.table.replicas, "the table")
    beating(3)
    watch.scaling.beat(successor, 1)
    watch.say(successor, Reported.READY, slots=4)
    watch.turn_until(lambda: watch.state(serving) == b"draining", "the old one drains")
    assert watch.routed() == [successor.id.hex]
    assert watch.cell.read_desired(leaving.id.hex)[serving.id.hex], "its agent was told"


def test_little_time_left_shortens_the_grace(watch: Watch, serving: Replica) -> None:
    from autoscaler.act import drain

    records.machine_leaves(serving.machine_id, 11_000)
    drain(serving.id, "test", watch.cell)
    grace_s = desired_spec(Replica.objects.get(id=serving.id)).grace_s
    assert 0 < grace_s < 4, "time to hand back what is left must remain"


def test_a_machine_that_is_no_more_cannot_be_under_notice(watch: Watch, serving: Replica) -> None:
    Machine.objects.update(state=MachineState.PENDING)
    assert records.machine_leaves(serving.machine_id, 1000) == []
    assert watch.scaling.machine().ends_at is None


# -- losing Redis, losing Postgres, several watchers


def test_after_an_empty_redis_users_desired_state_and_routes_are_back(watch: Watch, serving: Replica) -> None:
    cell, mid = watch.cell, serving.machine_id.hex
    cell.redis.flushall()
    cell.redis.acl_deluser(f"m-{mid}")
    watch.watcher._run_id = "of the server before"
    watch.watcher._disconnected()
    watch.scaling.beat(serving, 50)
    watch.turn_until(lambda: watch.routed() == [serving.id.hex], "routed again")
    watch.turn_until(lambda: cell.has_user(mid), "its user is back")
    watch.turn_until(lambda: serving.id.hex in cell.read_desired(mid), "desired again")
    assert Replica.objects.get(id=serving.id).phase == ReplicaPhase.READY


def test_only_one_watcher_is_active_and_another_takes_over(watch: Watch) -> None:
    second = Watcher(watch.cell, watch.recorder, stale_after_s=2.0)
    second.step(0.01)
    assert (watch.watcher.is_active, second.is_active) == (True, False)
    watch.cell.leave_watch(watch.watcher.owner)
    second.step(0.01)
    assert second.is_active
    watch.turn()
    assert not watch.watcher.is_active


@pytest.fixture
def threads(watch: Watch) -> Iterator[Watch]:
    """Both threads running, on the real clock."""
    watch.watcher._clock = __import__("time").monotonic
    watch.watcher._disconnected()
    watch.watcher._next_scan_s = 0.0
    watch.recorder.start()
    watch.watcher.start()
    yield watch
    watch.watcher.stop()
    watch.recorder.stop()


def test_threads_outlive_redis_being_away(threads: Watch, eventually: Callable[..., None]) -> None:
    good = threads.cell.redis.connection_pool
    away = redis.ConnectionPool(host="127.0.0.1", port=1, retry=None)
    threads.watcher._disconnected()
    threads.cell.redis.connection_pool = away
    eventually(lambda: not threads.watcher.is_active, "it noticed")
    threads.cell.redis.connection_pool = good
    threads.scaling.queue("first")
    eventually(lambda: Replica.objects.exists(), "a replica was ordered")
    eventually(lambda: threads.watcher.is_active, "it is active again")
    assert Replica.objects.count() == 1


def test_threads_outlive_postgres_being_away(
    threads: Watch, eventually: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from django.db import OperationalError

    from autoscaler.watch import recorder

    away = threading.Event()
    away.set()
    real, n_failed = recorder.tick, [0]

    def tick(*args: Any) -> Any:
        if away.is_set():
            n_failed[0] += 1
            raise OperationalError("the server closed the connection")
        return real(*args)

    monkeypatch.setattr(recorder, "tick", tick)
    threads.scaling.queue("first")
    threads.cell.redis.publish(threads.cell.keys.wake_channel, threads.scaling.deployment.id.hex)
    eventually(lambda: n_failed[0] >= 2, "it tries again")
    assert not Replica.objects.exists()
    away.clear()
    eventually(lambda: Replica.objects.exists(), "a replica was ordered")
    assert Replica.objects.count() == 1


def test_a_dead_replica_is_withdrawn_while_postgres_is_away(watch: Watch, serving: Replica) -> None:
    for _ in range(12):
        watch.now[0] += 0.25
        watch.watcher.step(0.01)  # the recorder hangs
    assert watch.state(serving) == b"dead"
    assert watch.queued() == [b"first"]
    assert serving.id.hex not in watch.cell.read_desired(serving.machine_id.hex)


def test_an_empty_redis_knows_the_machines_again_while_postgres_is_away(
    watch: Watch, serving: Replica
) -> None:
    cell, mid = watch.cell, serving.machine_id.hex
    watch.turn(3)
    assert cell.has_user(mid)
    cell.redis.flushall()
    cell.redis.acl_deluser(cell.keys.machine(mid).redis_user)
    watch.watcher._disconnected()
    watch.watcher._run_id = "of the server before"
    watch.watcher.step(0.01)  # the recorder hangs
    assert cell.has_user(mid)
    watch.scaling.beat(serving, 3)
    for _ in range(3):
        watch.now[0] += 0.25
        watch.watcher.step(0.01)
    assert watch.routed() == [serving.id.hex], "and its replica is routed to"


def test_having_been_cut_off_ourselves_kills_nobody(watch: Watch, serving: Replica) -> None:
    watch.scaling.beat(serving, 2)
    for _ in range(7):
        watch.turn(0.25)
    watch.watcher._disconnected()  # Redis was away, and with it the beats
    watch.turn(10)
    watch.turn(0.25)
    assert watch.routed() == [serving.id.hex]
    for _ in range(9):
        watch.turn(0.25)
    assert watch.state(serving) == b"dead"


def test_config_of_a_provider_we_do_not_have_is_refused() -> None:
    from autoscaler import house
    from autoscaler.config import AutoscalerConfig, ConfigError

    with pytest.raises(ConfigError, match="CORRAL_PROVIDER='moon'"):
        house._provider(replace(AutoscalerConfig(), provider="moon"))


# -- requests lost on the way to a live replica


def say_serving(watch: Watch, replica: Replica, seq: int, *requests: str) -> None:
    keys = watch.cell.keys.machine(replica.machine_id.hex)
    report = ServingReport(seq=seq, requests=list(requests))
    watch.cell.redis.set(keys.serving(replica.id.hex), msgspec.json.encode(report))


def audited(watch: Watch, replica: Replica, *requests: str) -> bytes | None:
    """Ten seconds of a live replica that says it serves `requests`; the epoch of the first request then."""
    for seq in range(2, 22):
        watch.scaling.beat(replica, seq)
        if seq % 4 == 0:
            say_serving(watch, replica, seq, *requests)
        watch.turn(0.5)
    return watch.cell.redis.hget(watch.cell.keys.request("first"), "epoch")


def test_a_request_whose_message_was_lost_is_bound_again_under_a_new_epoch(
    watch: Watch, serving: Replica
) -> None:
    queue = watch.cell.keys.machine(serving.machine_id.hex).prefix + f"replica.{serving.id.hex}"
    assert watch.cell.redis.delete(queue) == 1, "the answer to the pop went down with a connection"
    assert int(audited(watch, serving) or 0) >= 2
    assert watch.cell.redis.llen(queue) == 1, "delivered again"
    crashes = watch.cell.redis.hget(watch.cell.keys.request("first"), "crashes")
    assert crashes is None, "nobody died of it"
    assert watch.routed() == [serving.id.hex]


def test_requests_that_are_served_or_still_in_the_queue_are_left_alone(
    watch: Watch, serving: Replica
) -> None:
    assert audited(watch, serving) == b"1", "its message lies in the queue"
    say_serving(watch, serving, 24, "first")  # popped
    queue = watch.cell.keys.machine(serving.machine_id.hex).prefix + f"replica.{serving.id.hex}"
    watch.cell.redis.delete(queue)
    assert audited(watch, serving, "first") == b"1", "the replica has it in its hands"


# -- requests whose gateway died


def test_what_waits_for_a_dead_gateway_is_ended_when_its_client_may_not_come_back_any_more(
    watch: Watch,
) -> None:
    cell, did = watch.cell, watch.scaling.deployment.id.hex
    now_ms = time.time_ns() // 1_000_000
    old_ms = now_ms - ABANDONED_AFTER_MS - 1_000
    watch.scaling.queue("old", "heard", "young", "resumed")
    for request, gateway, score in (
        ("old", "dead", 2 * 10**13 + old_ms),
        ("heard", "alive", old_ms),
        ("young", "dead", now_ms),
        ("resumed", "dead", old_ms - 10**13),
    ):
        cell.redis.hset(cell.keys.request(request), "gw", gateway)
        cell.redis.zadd(cell.keys.queue(did), {request: score})
    ears = cell.redis.pubsub()
    ears.subscribe(cell.keys.notice_channel("alive"))
    assert ears.get_message(timeout=5)["type"] == "subscribe"
    watch.turn(60.0)
    watch.turn(1.1)
    assert len(watch.queued()) == 4, "seen once, it may be reconnecting"
    watch.turn(60.0)
    assert sorted(watch.queued()) == [b"heard", b"young"]
    assert cell.redis.hget(cell.keys.request("old"), "state") == b"done"
    ears.close()
