"""A machine quarantined by hand: its successor first, drained, ended; let stay while nothing drains; kept and told."""

from __future__ import annotations

import json
from io import StringIO
from typing import Any

import msgspec
import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from autoscaler import explaining, quarantine, reconcile, selectors, stopping
from autoscaler.models import Decision, Machine, MachineState, PoolDecision, PoolDecisionKind, Replica
from controlplane.errors import ConflictError, InvalidInputError, NotFoundError
from controlplane.management.commands import quarantine as command
from controlplane.tenants.context import tenant
from infra.providers.base import Offering
from tests.autoscaler.conftest import Scaling
from workers.contract import Heartbeat, ReplicaPhase

WHY = "falls over at night"
TOLD = f"quarantined: by hand: {WHY}"
FIXED = Offering(instance_type="t", zone="z", is_spot=False, price_nano_per_h=1)


@pytest.fixture
def serving(scaling: Scaling) -> Machine:
    scaling.configure(max_machines=2, replicas_per_machine=1)
    replica = scaling.serving()
    scaling.tick()
    scaling.beat(replica, 1)
    return scaling.machine()


def replaced(scaling: Scaling) -> tuple[Replica, Replica]:
    """(the replica that was there, its successor, which serves now)."""
    first = scaling.replica()
    scaling.tick()
    scaling.machine_up()
    scaling.tick()
    second = scaling.replica()
    assert second.machine_id != first.machine_id
    scaling.report(second, ReplicaPhase.READY)
    scaling.beat(second, 1)
    return first, second


def test_it_is_replaced_first_then_drained_and_ended(scaling: Scaling, serving: Machine) -> None:
    decision = quarantine.quarantine(serving.id, f" {WHY} ", "ada", scaling.house)
    row = Machine.objects.get(id=serving.id)
    assert (row.state, row.reason, row.pool_slot) == (MachineState.DRAINING, TOLD, None)
    assert scaling.provider.left == [serving.provider_ref]
    with pytest.raises(ConflictError, match="leaves already: quarantined: by hand"):
        quarantine.quarantine(serving.id, "again", "bob", scaling.house)

    first, _ = replaced(scaling)
    first.refresh_from_db()
    assert first.phase == ReplicaPhase.READY.value, "it served until then"
    scaling.tick()
    first.refresh_from_db()
    assert first.phase == ReplicaPhase.DRAINING.value
    with pytest.raises(ConflictError, match="drains already"):
        quarantine.lift(serving.id, "ada", scaling.house)
    scaling.report(first, ReplicaPhase.STOPPED)
    reconcile.reconcile(scaling.house)
    row.refresh_from_db()
    assert (row.state, serving.provider_ref in scaling.provider.terminated) == (MachineState.GONE, True)
    assert not scaling.house.cell.has_user(serving.id.hex), "its credential is dead"
    assert list(PoolDecision.objects.filter(kind=PoolDecisionKind.OPERATOR)) == [decision]
    reasons = " ".join(reason for each in Decision.objects.all() for reason in each.reasons)
    assert TOLD in reasons, "the tenant's own decision says it, too"


def test_it_may_stay_while_nothing_drains_and_serves_on(scaling: Scaling, serving: Machine) -> None:
    quarantine.quarantine(serving.id, WHY, "ada", scaling.house)
    quarantine.lift(serving.id, "bob", scaling.house)
    row = Machine.objects.get(id=serving.id)
    assert (row.state, row.reason, row.ends_at, row.pool_slot) == (MachineState.READY, "", None, 0)
    assert scaling.provider.left == [], "and its provider knows"
    scaling.tick()
    reconcile.reconcile(scaling.house)
    assert scaling.replica().phase == ReplicaPhase.READY.value
    assert (Machine.objects.count(), scaling.provider.terminated) == (1, []), "no successor, nothing ended"
    told = [row.reasons for row in PoolDecision.objects.filter(kind="operator").order_by("id")]
    name = f"mch_{serving.id.hex}"
    assert told == [[f"{name} quarantined by ada: {WHY}"], [f"{name} may stay by bob: {WHY}"]]
    with pytest.raises(ConflictError, match="not quarantined by hand"):
        quarantine.lift(serving.id, "bob", scaling.house)


def test_one_that_its_provider_takes_away_cannot_stay(
    scaling: Scaling, serving: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "NOTICE_GONE_WITHIN_S", 0.0)
    quarantine.quarantine(serving.id, WHY, "ada", scaling.house)
    beat = Heartbeat(machine=serving.id.hex, seq=1, at_ms=0, phase=ReplicaPhase.DRAINING, ends_in_ms=100_000)
    key = scaling.house.cell.keys.machine(serving.id.hex).heartbeat()
    scaling.house.cell.redis.set(key, msgspec.json.encode(beat))
    with pytest.raises(ConflictError, match="its provider takes this machine away"):
        quarantine.lift(serving.id, "ada", scaling.house)
    assert Machine.objects.get(id=serving.id).state == MachineState.DRAINING


def test_nor_one_whose_successor_has_the_last_place(scaling: Scaling, serving: Machine) -> None:
    scaling.configure(max_machines=1)
    quarantine.quarantine(serving.id, WHY, "ada", scaling.house)
    scaling.tick()
    assert Machine.objects.filter(pool_slot=0).exclude(id=serving.id).exists()
    with pytest.raises(ConflictError, match="raise CORRAL_MAX_MACHINES"):
        quarantine.lift(serving.id, "ada", scaling.house)
    assert Machine.objects.get(id=serving.id).state == MachineState.DRAINING


def test_a_stopped_one_ends_at_once(scaling: Scaling) -> None:
    scaling.provider.kinds = [FIXED]
    replica = scaling.serving()
    scaling.house.cell.redis.flushdb()
    scaling.report(replica, ReplicaPhase.DRAINING)
    scaling.report(replica, ReplicaPhase.STOPPED)
    machine = scaling.machine()
    keeper = stopping.Keeper(scaling.house.config, scaling.house.provider, scaling.house.cell)
    assert stopping.stop(machine.id, "rests", keeper)
    quarantine.quarantine(machine.id, WHY, "ada", scaling.house)
    machine.refresh_from_db()
    assert (machine.state, machine.reason) == (MachineState.GONE, TOLD)
    assert scaling.provider.terminated == [machine.provider_ref]


def test_what_cannot_be_says_so_and_changes_nothing(scaling: Scaling) -> None:
    scaling.queue("a")
    scaling.tick()
    machine = scaling.machine()
    for reason in ("", "  ", "x" * 301):
        with pytest.raises(InvalidInputError, match="reason: say why"):
            quarantine.quarantine(machine.id, reason, "ada", scaling.house)
    with pytest.raises(ConflictError, match="is pending: wait until it has come up"):
        quarantine.quarantine(machine.id, WHY, "ada", scaling.house)
    with pytest.raises(NotFoundError):
        quarantine.quarantine(scaling.deployment.id, WHY, "ada", scaling.house)
    Machine.objects.update(state=MachineState.DRAINING, ends_at=timezone.now())
    with pytest.raises(ConflictError, match="not quarantined by hand"):
        quarantine.lift(machine.id, "ada", scaling.house)
    assert not PoolDecision.objects.filter(kind=PoolDecisionKind.OPERATOR).exists()


def test_why_is_told_to_whose_replicas_live_on_it_only(scaling: Scaling, serving: Machine) -> None:
    quarantine.quarantine(serving.id, WHY, "ada", scaling.house)
    with tenant(scaling.world.organization.id):
        assert [machine.reason for machine in selectors.machines()] == [TOLD]
    with tenant(scaling.world.other_organization.id):
        assert selectors.machines() == []


def test_the_command(scaling: Scaling, serving: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "build_house", lambda: scaling.house)
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    name = f"mch_{serving.id.hex}"

    def run(*args: Any) -> str:
        out = StringIO()
        call_command("quarantine", *args, stdout=out)
        return out.getvalue()

    assert run() == f"{name}  ready       1 replica  fake\n"
    with pytest.raises(CommandError, match="machine: expected an id of the form mch_"):
        run("i-0123", "--reason", WHY)
    with pytest.raises(CommandError, match="reason: say why"):
        run(name)
    heard = scaling.house.cell.redis.pubsub(ignore_subscribe_messages=True)
    heard.subscribe(scaling.house.cell.keys.invalidate_channel)
    heard.get_message(timeout=1)
    said = run(name, "--reason", WHY)
    decision = PoolDecision.objects.get(kind=PoolDecisionKind.OPERATOR)
    assert said.startswith(
        f"{name} quarantined by ada: {WHY} ({decision})\nsuccessors for 1 deployment come first"
    )
    message = heard.get_message(timeout=5)
    heard.close()
    assert message["data"] == f"dep:{scaling.deployment.id.hex}".encode(), "somebody decides at once"
    with pytest.raises(CommandError, match="leave it out with --lift"):
        run(name, "--lift", "--reason", WHY)
    told = json.loads(run(name, "--lift", "--json"))
    assert (told["machine"], told["state"], told["n_deployments"]) == (name, "ready", 1)

    assert explaining.replay(decision).same
    out = StringIO()
    call_command("explain", "decision", str(decision), stdout=out)
    assert f"order   quarantine {name} ({WHY})" in out.getvalue()
    assert "ada gave the order" in out.getvalue()
    assert "a person decided this" in out.getvalue()
