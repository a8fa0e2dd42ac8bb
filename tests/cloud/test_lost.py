"""A cloud machine that runs and is silent: replaced, its requests go on elsewhere, nothing is left of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace

import pytest

from autoscaler.models import Machine, MachineState
from infra.local.process import find_marked
from tests.autoscaler.conftest import eventually, operator_db, scaling  # noqa: F401 - fixtures
from tests.cloud.hypervisor import MARK
from tests.cloud.test_from_zero import Cloud, cloud  # noqa: F401 - fixture

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "operator"])


@pytest.mark.full  # the agent has to be silent for longer than a pause of ours
def test_a_machine_that_froze_is_ended_and_another_serves(
    cloud: Cloud,  # noqa: F811
    eventually: Callable[..., None],  # noqa: F811
) -> None:
    cloud.recorder.house = replace(
        cloud.scaling.house, config=replace(cloud.scaling.house.config, agent_lost_s=10.0)
    )
    cloud.wake("first")
    eventually(lambda: len(cloud.routed()) == 1, "a replica is routed to", 60)
    [frozen] = cloud.machines()
    old = cloud.routed()[0]
    for pid in find_marked(f"{MARK}={frozen.provider_ref}"):
        os.kill(pid, signal.SIGSTOP)
    eventually(lambda: old not in cloud.routed(), "its replica is withdrawn", 10)
    eventually(lambda: frozen.provider_ref not in cloud.ec2.alive(), "the instance is ended", 30)
    eventually(lambda: Machine.objects.get(id=frozen.id).state == MachineState.GONE, "and known to be gone")
    assert "silent for" in Machine.objects.get(id=frozen.id).reason
    cloud.wake("second")
    eventually(lambda: len(cloud.routed()) == 1, "another serves", 60)
    [machine] = cloud.machines()
    assert cloud.ec2.alive() == [machine.provider_ref]
