"""A reserve of stopped machines on the simulated region: what a notice takes is served by it before the notice is over,
though a new machine boots for longer, and it lies down again when spot serves."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoscaler import pool, reconcile, specs, tick
from autoscaler.models import Machine, MachineState, Replica, ReplicaPhase
from autoscaler.types import ScalerSpec
from tests.autoscaler.conftest import eventually, operator_db, scaling  # noqa: F401 - fixtures
from tests.cloud.conftest import TYPE
from tests.cloud.ec2 import ZONES
from tests.cloud.test_end_to_end import N_WEIGHTS, stored
from tests.cloud.test_from_zero import Cloud, cloud  # noqa: F401 - fixture

NOTICE_S = 30.0
BOOT_S = 45.0  # of a new machine, from the notice on: it cannot be there in time
HAND_OVER_S = 4.0


class Beat:
    """Turns of the pool and passes of reconcile, as beat asks for them, only sooner; and somebody who asks all the
    while."""

    def __init__(self, cloud: Cloud) -> None:  # noqa: F811
        self.cloud, self._due_s = cloud, 0.0
        self.open: list[str] = []
        self.n_answered = 0

    def turn(self) -> bool:
        if time.monotonic() < self._due_s:
            return False
        self._due_s = time.monotonic() + 0.5
        house = self.cloud.scaling.house
        for touched in pool.turn(house):
            self.cloud.recorder.want_tick(touched.hex)
        reconcile.reconcile(house)
        self.cloud.recorder.want_tick(self.cloud.scaling.deployment.id.hex)
        return False

    def ask(self) -> bool:
        if len(self.open) < 2:
            self.open.append(self.cloud.asker.ask("are you there?"))
        return self.hear()

    def hear(self) -> bool:
        self.turn()
        for request in list(self.open):
            _, end = self.cloud.asker.answer(request)
            if end is not None:
                assert (end.error, end.n_completion) == (None, 8)
                self.cloud.asker.settle(request)
                self.open.remove(request)
                self.n_answered += 1
        return not self.open


@pytest.mark.full  # three machines boot, and a notice lasts
@pytest.mark.timeout(600)
@pytest.mark.django_db(transaction=True, databases=["default", "operator"])
def test_the_reserve_serves_before_a_notice_is_over_and_lies_down_when_spot_does(
    cloud: Cloud,  # noqa: F811
    s3: dict[str, str],
    tmp_path: Path,
    eventually: Callable[..., None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def late(*args: Any) -> ScalerSpec:
        return replace(specs.scaler_spec(*args), hand_over_s=HAND_OVER_S)

    monkeypatch.setattr(tick, "scaler_spec", late)
    weights = os.urandom(N_WEIGHTS)
    digest, _ = stored(cloud, weights, tmp_path / "origin")
    house = cloud.scaling.house
    config = replace(
        house.config, spot_reserve=1, max_spares=0, disruption_share=1.0, machine_boot_s=180.0, max_machines=1
    )
    cloud.rehouse(replace(house, config=config))
    cloud.scaling.change(min_replicas=1)
    beat = Beat(cloud)
    cloud.answered(eventually, cloud.asker.ask("who serves?"))
    [spot] = cloud.machines()
    assert spot.offering == f"spot/{ZONES[0]}/{TYPE}"

    def kept() -> Machine:
        return Machine.objects.exclude(state=MachineState.GONE).get(reserve_place=0)

    def lies() -> bool:
        beat.turn()
        return Machine.objects.filter(reserve_place=0, state=MachineState.STOPPED).exists()

    eventually(lies, "a machine lies stopped", 120)
    reserve = kept()
    assert reserve.offering.startswith("on-demand/")
    stored_there = cloud.hypervisor.root / reserve.provider_ref / "models" / digest / "model.safetensors"
    assert stored_there.read_bytes() == weights, "before it was stopped"
    assert sorted(i.state for i in cloud.ec2.instances()) == ["running", "stopped"]

    cloud.ec2.boot_s, cloud.ec2.start_s, cloud.ec2.stop_s = BOOT_S, 0.3, 0.5
    old = cloud.routed()
    cloud.hypervisor.notice(spot.provider_ref, NOTICE_S)
    gone_at_s = time.monotonic() + NOTICE_S
    served_at_s: list[float] = []

    def stands_in() -> bool:
        beat.ask()
        if set(cloud.routed()) - set(old) and not served_at_s:
            served_at_s.append(time.monotonic())
        return spot.provider_ref not in cloud.ec2.alive()

    eventually(stands_in, "the machine is taken", NOTICE_S + 15)
    assert served_at_s, "the reserve serves"
    assert served_at_s[0] < gone_at_s - HAND_OVER_S, "before anything had to move for want of time"
    assert [r.hex for r in _serving(reserve)] == cloud.routed()
    replacement = Machine.objects.get(replaces=reserve.id)
    assert (replacement.offering.split("/")[0], replacement.ready_at) == ("spot", None), "still booting"

    def lies_again() -> bool:
        beat.ask()
        return kept().state == MachineState.STOPPED

    eventually(lies_again, "spot serves, and the reserve lies down", 180)
    assert [r.hex for r in _serving(replacement)] == cloud.routed()
    eventually(lambda: beat.ask() or beat.n_answered > 20, "and who asks is answered", 60)
    eventually(beat.hear, "the last of them too", 60)
    assert kept().id == reserve.id
    assert (cloud.ec2.count("CreateFleet"), cloud.ec2.count("StartInstances")) == (3, 1)
    bought = [Machine.objects.filter(offering__startswith=kind).count() for kind in ("spot/", "on-demand/")]
    assert bought == [2, 1], "one for the reserve"

    cloud.ec2.boot_s = 0.3
    cloud.rehouse(replace(cloud.scaling.house, config=replace(config, spot_reserve=0)))
    eventually(lambda: beat.turn() or reserve.provider_ref not in cloud.ec2.alive(), "it is returned", 30)
    cloud.all_given_back(eventually)


def _serving(machine: Machine) -> list[Any]:
    ready = Replica.objects.filter(machine=machine, phase=ReplicaPhase.READY)
    return list(ready.values_list("id", flat=True))
