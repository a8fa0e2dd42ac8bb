"""Placement by weights at hand, on real rows and Redis: what machines say they hold decides, and is learned from."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import msgspec
import pytest
from django.utils import timezone

from autoscaler import timings
from autoscaler.cell import Cell
from autoscaler.models import Decision, Machine, MachineState, Replica, StartTiming
from autoscaler.policy.startup import Tier
from controlplane import ids
from controlplane.deployments import versions
from controlplane.deployments.models import ModelSource
from tests.autoscaler.conftest import Scaling
from workers.contract import ModelShelf

SIZE = 2_000_000_000


@pytest.fixture
def pair(scaling: Scaling) -> tuple[Scaling, Machine, Machine]:
    """Two machines that are ready, the first by every rule but one; the weights are two gigabytes."""
    scaling.configure(max_machines=2)
    version = versions.register(
        organization_id=scaling.world.organization.id,
        digest="cd" * 32,
        name="heavy",
        source_kind=ModelSource.TOY,
        source_uri="",
        size_bytes=SIZE,
        max_model_len=4096,
    )
    scaling.change(model_version_id=version.id)
    now = timezone.now()
    first, second = (
        Machine.objects.create(
            id=ids.new_id(), provider="fake", command_id=ids.new_id(), enroll_proof_digest=b"p" * 32, cell="c0",
            pool_slot=n, state=MachineState.READY, provider_ref=f"r{n}", ready_at=now - timedelta(minutes=9),
            capabilities={"max_replicas": 4 - n},
        )
        for n in range(2)
    )  # fmt: skip
    return scaling, first, second


def shelve(scaling: Scaling, machine: Machine, *, resident: bool = False) -> None:
    digest = scaling.deployment_row().model_version.digest
    shelf = ModelShelf(digests=(digest,), resident=(digest,) if resident else ())
    keys = scaling.house.cell.keys.machine(machine.id.hex)
    scaling.house.cell.redis.set(keys.models, msgspec.json.encode(shelf))


def test_the_machine_with_the_weights_is_chosen_and_the_decision_says_why(
    pair: tuple[Scaling, Machine, Machine],
) -> None:
    scaling, first, second = pair
    shelve(scaling, second)
    scaling.queue("a")
    scaling.tick()
    replica = scaling.replica()
    assert (replica.machine_id, replica.planned_source) == (second.id, "disk")
    stored = Decision.objects.latest("at")
    why = {a["subject"]: (a["chosen"], a["why"]) for a in stored.alternatives if a["question"] == "machine"}
    assert why[second.id.hex][0] and "weights from disk" in why[second.id.hex][1]
    assert not why[first.id.hex][0] and "weights from store" in why[first.id.hex][1]
    assert stored.observation["loading"]["size_bytes"] == SIZE


def test_what_is_being_loaded_there_already_counts(pair: tuple[Scaling, Machine, Machine]) -> None:
    scaling, first, second = pair
    shelve(scaling, second)
    scaling.queue("a")
    scaling.tick()
    scaling.change(min_replicas=2, max_replicas=2)
    StartTiming.objects.create(provider="fake", stage="gib_from_disk", average_ms=20_000)  # a slow disk
    StartTiming.objects.create(provider="fake", stage="gib_from_store", average_ms=25_000)
    scaling.tick()
    assert scaling.replica().machine_id == first.id, (
        "behind the first one's reading it would take twice as long"
    )
    assert scaling.replica().planned_source == "store"


def test_speeds_are_learned_from_starts(pair: tuple[Scaling, Machine, Machine]) -> None:
    scaling, _, _ = pair

    def started(source: str, seconds: float, **stages_ms: int) -> None:
        scaling.queue(f"a{source}")
        scaling.tick()
        replica = scaling.replica()
        Replica.objects.filter(id=replica.id).update(
            planned_source=source, created_at=timezone.now() - timedelta(seconds=seconds)
        )
        row = Replica.objects.select_related("machine").get(id=replica.id)
        row.ready_at = timezone.now()
        timings.note_replica(row, stages_ms)
        Replica.objects.all().delete()

    started("store", 30.0, fetch=20_000, load=500)
    assert timings.speeds("fake")[Tier.STORE] == pytest.approx(SIZE / 20)
    started("ram", 4.0, load=3_000)
    digest = scaling.deployment_row().model_version.digest
    assert timings.init_s("fake", digest) == pytest.approx(4.0, abs=0.2)
    started("disk", 12.0, load=11_000)
    assert timings.speeds("fake")[Tier.DISK] == pytest.approx(SIZE / 8, rel=0.1)
    started("sibling", 5.0, fetch=1)  # it was there already: says nothing of the link
    assert Tier.SIBLING not in timings.speeds("fake")


def test_with_redis_away_the_freest_is_as_good_as_any(pair: tuple[Scaling, Machine, Machine]) -> None:
    scaling, first, second = pair
    shelve(scaling, second)
    scaling.change(min_replicas=1)
    scaling.house = replace(scaling.house, cell=Cell("redis://127.0.0.1:1/0", scaling.house.cell.keys))
    scaling.tick()
    assert (scaling.replica().machine_id, scaling.replica().planned_source) == (first.id, "")
