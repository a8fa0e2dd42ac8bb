"""The autoscaler on a real Postgres and Redis, as the control worker runs it: default connection = operator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec
import pytest

from controlplane.policy.flows import ANY_MS
from infra.local import roles
from tests.autoscaler.fakes import FakeProvider
from tests.world import World, build_world
from workers.contract import Heartbeat, ReplicaPhase, ReplicaStatus
from workers.keys import CellKeys
from workers.scripts import ADMIT

if TYPE_CHECKING:
    from autoscaler.models import Machine, Replica
    from autoscaler.tick import House
    from controlplane.deployments.models import Deployment


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Enrolment asks as operator on a connection of its own, so these tests may use both."""
    for item in items:
        if "operator_db" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.django_db(transaction=True, databases=["default", "operator"]))


@pytest.fixture
def operator_db(transactional_db: None) -> Iterator[None]:
    """Committed rows, and the default connection of every thread acts as corral_operator."""
    from django.conf import settings
    from django.db import connections

    options: dict[str, Any] = settings.DATABASES["default"]["OPTIONS"]
    before = options["assume_role"]
    options["assume_role"] = roles.OPERATOR
    connections["default"].close()
    yield
    options["assume_role"] = before
    connections["default"].close()


@dataclass
class Scaling:
    """One deployment of Acme's on the toy engine, and the house that scales it."""

    world: World
    deployment: Deployment
    house: House
    provider: FakeProvider

    def configure(self, **changes: Any) -> None:
        self.house = replace(self.house, config=replace(self.house.config, **changes))

    def change(self, **fields: Any) -> None:
        """Change the deployment's row, as its owner's update would."""
        from django.db.models import F

        from controlplane.deployments.models import Deployment

        rows = Deployment.objects.filter(id=self.deployment.id)
        rows.update(**fields, generation=F("generation") + 1)

    def tick(self) -> Any:
        from autoscaler.tick import tick

        return tick(self.deployment.id, self.house)

    def queue(self, *requests: str, candidates: tuple[str, ...] = ()) -> None:
        """Requests admitted; they wait where no replica has a free slot."""
        cell, did = self.house.cell, self.deployment.id.hex
        for n, request in enumerate(requests):
            cell.redis.set(cell.keys.body(request), b"body")
            scopes = [arg for scope in "kpo" for arg in (scope, -1, -1, -1, -1, -1, 100)]
            args = (request, did, "g1", n, "pv1", 1, 10, 0, n, 1_000, 60_000, 0, "", 0)
            verdict = cell.redis.eval(
                ADMIT.source,
                0,
                cell.keys.prefix,
                1_000 + n,
                *args,
                *scopes,
                0,
                1,
                "",
                0,
                60_000,
                0,
                0,
                ANY_MS,
                0,
                *candidates,
            )
            assert verdict[0] in (b"queued", b"bound"), verdict

    def machine(self) -> Machine:
        from autoscaler.models import Machine

        return Machine.objects.latest("created_at")

    def replica(self) -> Replica:
        from autoscaler.models import Replica

        return Replica.objects.latest("created_at")

    def seen(self) -> Deployment:
        from controlplane.deployments.models import Deployment

        return Deployment.objects.get(id=self.deployment.id)

    def deployment_row(self) -> Deployment:
        """With its version, as a tick has it."""
        from controlplane.deployments.models import Deployment

        return Deployment.objects.select_related("model_version", "organization").get(id=self.deployment.id)

    def machine_up(self) -> Machine:
        """The last launched machine has enrolled and its agent beats."""
        from autoscaler import records, services

        machine = self.machine()
        services.enrol(
            machine_id=machine.id.hex,
            proof=self.provider.proofs[machine.id.hex],
            capabilities={},
            cell=self.house.cell,
        )
        records.machine_answers(machine.id)
        return self.machine()

    def report(self, replica: Replica, phase: ReplicaPhase, code: str = "", message: str = "") -> UUID | None:
        from autoscaler import records

        status = ReplicaStatus(
            replica=replica.id.hex, phase=phase, code=code, message=message, stages_ms={"load": 5}
        )
        return records.replica_reported(replica.machine_id, status, self.house.cell)

    def beat(
        self, replica: Replica, seq: int, phase: ReplicaPhase = ReplicaPhase.READY, slots: int = 0
    ) -> None:
        """A heartbeat as the replica's front writes it."""
        keys = self.house.cell.keys.machine(replica.machine_id.hex)
        beat = Heartbeat(
            machine=replica.machine_id.hex,
            seq=seq,
            at_ms=time.time_ns() // 1_000_000,
            replica=replica.id.hex,
            phase=phase,
            slots=slots or replica.slots,
        )
        self.house.cell.redis.set(keys.heartbeat(replica.id.hex), msgspec.json.encode(beat))

    def serving(self) -> Replica:
        """A machine that is up and a replica on it that is ready and routed to."""
        self.queue("first")
        self.tick()
        self.machine_up()
        replica = self.replica()
        self.report(replica, ReplicaPhase.READY)
        self.house.cell.enrol(
            replica=replica.id.hex,
            machine=replica.machine_id.hex,
            deployment=self.deployment.id.hex,
            slots=replica.slots,
        )
        return self.replica()


@pytest.fixture
def scaling(operator_db: None, redis_url: str) -> Scaling:
    """Nothing runs yet; one machine may be had."""
    from autoscaler.cell import Cell
    from autoscaler.config import AutoscalerConfig
    from autoscaler.tick import House
    from controlplane.deployments import services, versions
    from controlplane.deployments.models import ModelSource

    world = build_world()
    version = versions.register(
        organization_id=world.organization.id,
        digest="ab" * 32,
        name="toy",
        source_kind=ModelSource.TOY,
        source_uri="",
        size_bytes=0,
        max_model_len=4096,
    )
    deployment = services.create_deployment(
        organization_id=world.organization.id,
        project_id=world.project.id,
        name="toy",
        model_version_id=version.id,
        engine_profile={"engine": "toy", "max_num_seqs": 4},
        idle_timeout_s=60,
    )
    provider = FakeProvider()
    config = AutoscalerConfig(provider="fake", enrol_url="http://127.0.0.1:1/internal/enrol", engine="toy")
    house = House(config=config, provider=provider, cell=Cell(redis_url, CellKeys("c0")))
    return Scaling(world, deployment, house, provider)


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Polls a condition until a deadline, and says what did not come true."""

    def wait(condition: Callable[[], object], what: str, within_s: float = 60.0) -> None:
        deadline_s = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline_s, f"not within {within_s:g} s: {what}"
            time.sleep(0.02)

    return wait
