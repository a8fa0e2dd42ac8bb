"""The control worker is killed by SIGKILL at every change it makes in Postgres, Redis or EC2, and another one goes on.

As test_crashes, with nothing replaced: the product's processes, real servers, EC2 simulated behind its HTTP interface
with lists that trail. Whatever happened: no command buys two machines, no machine is forgotten, and nothing is left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import pytest
from django.db import connections
from django.utils import timezone

from autoscaler import pool, reconcile, records, services, stopping
from autoscaler.identity import Expected
from autoscaler.models import LIVE_PHASES, Machine, MachineState, Offer, Replica, ScalerState
from autoscaler.models import Decision as DecisionRow
from infra.providers.aws.provider import AwsProvider
from tests.autoscaler.conftest import Scaling
from tests.autoscaler.killing import Strike, Wires
from tests.cloud.conftest import aws, aws_config, ec2, region  # noqa: F401 - fixtures
from tests.cloud.ec2 import REGION, Ec2
from tests.cloud.imds import certificate, signed
from tests.servers import SERVERS
from workers.contract import ReplicaPhase

MAX_CHANGES = 120
MUST_STRIKE = {
    "launch": {
        "Action=CreateFleet",
        "Action=CreateLaunchTemplate",
        'INSERT INTO "autoscaler_machine"',
        "COMMIT",
    },
    "drain": {'UPDATE "autoscaler_replica"', "HSET", "EVALSHA"},
    "stop": {'UPDATE "autoscaler_machine"', "DELUSER", "Action=StopInstances"},
    "resume": {
        'UPDATE "autoscaler_machine"',
        "SETUSER",
        "Action=StartInstances",
        'INSERT INTO "autoscaler_replica"',
        "HINCRBY",
    },
    "terminate": {"Action=TerminateInstances", 'UPDATE "autoscaler_machine"', "DELUSER", "DEL"},
}


@dataclass
class World:
    """One deployment whose machines are bought from the simulated region by a process that can be killed."""

    scaling: Scaling
    ec2: Ec2
    pem: Path
    wires: Wires
    process: subprocess.Popen[str]

    def run(self, steps: list[str], now: datetime, strike: Strike | None = None) -> int:
        """How a process that takes these steps ended."""
        self.wires.strike = strike = strike or Strike()
        config = asdict(self.scaling.house.config)
        self._tell({"steps": steps, "now": now.isoformat(), "config": config})
        strike.pid = self._hear()["pid"]
        self._tell({})
        return self._hear()["ended"]

    def _tell(self, what: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def _hear(self) -> dict[str, int]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("{"), line + (self.pem.parent / "victim.log").read_text()[-3000:]
        heard: dict[str, int] = json.loads(line)
        return heard

    # -- scenes, prepared by this process

    @property
    def did(self) -> str:
        return self.scaling.deployment.id.hex

    def up(self, *, spot: bool = True) -> Replica:
        """A machine that has enrolled by its identity, with a replica that serves."""
        self.scaling.configure(spot=spot)
        self.scaling.queue("a")
        self.scaling.tick()
        machine = self.scaling.machine()
        document = {"instanceId": machine.provider_ref, "region": REGION, "accountId": self.ec2.account}
        document |= {"imageId": self.ec2.ami}
        services.enrol(
            machine_id=machine.id.hex, proof="", capabilities={}, cell=self.scaling.house.cell,
            identity=dict(signed(document)), expected=Expected(self.pem, REGION, self.ec2.ami),
        )  # fmt: skip
        records.machine_answers(machine.id)
        self.scaling.tick()
        replica = self.scaling.replica()
        self.scaling.report(replica, ReplicaPhase.READY)
        self.scaling.house.cell.enrol(
            replica=replica.id.hex, machine=machine.id.hex, deployment=self.did, slots=replica.slots
        )
        return replica

    def recover(self) -> None:
        """What other control workers do, each a process of its own; leases of the dead one have run out."""
        now = timezone.now() + timedelta(seconds=60)
        for _ in range(3):
            ScalerState.objects.update(lease_until=None, lease_owner="")
            assert self.run(["reconcile", self.did], now) == 0
            now += timedelta(seconds=20)

    def check(self, where: str) -> None:
        tokens = Counter(_tag(i, "token") for i in self.ec2.instances())
        assert all(n == 1 for n in tokens.values()), f"{where}: one command bought two machines: {tokens}"
        live = Machine.objects.exclude(state=MachineState.GONE)
        alive = self.ec2.instances("pending", "running", "stopping", "stopped")
        assert {_tag(i, "machine") for i in alive} == {row.id.hex for row in live}, f"{where}: forgotten"
        assert {i.id for i in alive} == {row.provider_ref for row in live}, f"{where}: not written down"
        off = {_tag(i, "machine") for i in alive if i.state in ("stopping", "stopped")}
        for row in live:
            assert (row.state == MachineState.STOPPED) is (row.id.hex in off), f"{where}: {row.state}"
            wanted = {r.id.hex for r in Replica.objects.filter(machine=row, phase__in=LIVE_PHASES)}
            told = set(self.scaling.house.cell.read_desired(row.id.hex)) - {"generation"}
            assert told == wanted, f"{where}: Redis and rows disagree"

    def end_round(self, where: str) -> None:
        """The model is given up, everything is given back by the ordinary loop, and the next round starts anew."""
        self.scaling.change(deleted_at=timezone.now())
        now = timezone.now() + timedelta(seconds=600)
        for _ in range(4):
            ScalerState.objects.update(lease_until=None, lease_owner="")
            _tick(self.scaling, now)
            for replica in Replica.objects.filter(phase__in=LIVE_PHASES):
                self.scaling.report(replica, ReplicaPhase.STOPPED)
            pool.turn(self.scaling.house, now)  # ends what is stopped
            reconcile.reconcile(self.scaling.house, now)
            now += timedelta(seconds=60)
        assert self.ec2.alive() == [], f"{where}: still paid for"
        for rows in (Replica, Machine, DecisionRow, ScalerState):
            rows.objects.all().delete()
        Offer.objects.update(n_refusals=0)
        cell = self.scaling.house.cell
        cell.redis.delete(*cell.redis.keys(f"{cell.keys.prefix}*"))
        self.scaling.change(deleted_at=None)
        self.ec2.reset()


def _launch(world: World) -> list[str]:
    world.scaling.queue("a")
    return [world.did]


def _drain(world: World) -> list[str]:
    world.up()
    world.scaling.change(deleted_at=timezone.now())
    return [world.did]


def _terminate(world: World) -> list[str]:
    replica = world.up()
    world.scaling.change(deleted_at=timezone.now())
    _tick(world.scaling, timezone.now())
    world.scaling.report(replica, ReplicaPhase.STOPPED)
    return ["reconcile"]


def _stop(world: World) -> list[str]:
    """A machine that nobody needs now, of a kind that can be stopped."""
    replica = world.up(spot=False)
    cell = world.scaling.house.cell
    cell.redis.delete(*cell.redis.keys(f"{cell.keys.prefix}*"))
    for phase in (ReplicaPhase.DRAINING, ReplicaPhase.STOPPED):
        world.scaling.report(replica, phase)
    return [f"stop {replica.machine_id.hex}"]


def _resume(world: World) -> list[str]:
    _stop(world)
    house, machine = world.scaling.house, world.scaling.machine()
    assert stopping.stop(machine.id, "rests", stopping.Keeper(house.config, house.provider, house.cell))
    reconcile.reconcile(house)
    assert world.scaling.machine().state == MachineState.STOPPED
    return _launch(world)


SCENES: dict[str, Callable[[World], list[str]]] = {
    "launch": _launch,
    "drain": _drain,
    "stop": _stop,
    "resume": _resume,
    "terminate": _terminate,
}


@pytest.fixture
def killed(
    scaling: Scaling,
    ec2: Ec2,  # noqa: F811
    aws: AwsProvider,  # noqa: F811
    tmp_path: Path,
) -> Iterator[World]:
    scaling.configure(provider="aws", machine_keep_warm_s=0.0, max_machines=2)
    scaling.house = replace(scaling.house, provider=aws)
    (tmp_path / "pem").write_bytes(certificate())
    wires, where = Wires(), connections["operator"].settings_dict
    at = wires.open(str(where["HOST"]), int(where["PORT"]))
    login = f"{where['USER']}:{quote(str(where['PASSWORD']), safe='')}"
    dsn = f"postgresql://{login}@127.0.0.1:{at}/{connections['default'].settings_dict['NAME']}"
    parts = urlsplit(SERVERS.redis.url())
    redis_at = wires.open(parts.hostname or "", parts.port or 0)
    login = parts.netloc.rpartition("@")[0]
    sold = urlsplit(ec2.url)
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")},
        **ec2.environ,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{wires.open(sold.hostname or '', sold.port or 0)}",
        "DJANGO_SETTINGS_MODULE": "controlplane.settings",
        "CORRAL_VAR": str(tmp_path),
        "CORRAL_SECRET_KEY": "only here",
        "CORRAL_KEY_PEPPER": "ab" * 32,
        "CORRAL_DB_ROLE": "operator",
        "CORRAL_PG_DSN_APP": dsn,
        "CORRAL_PG_DSN_OPERATOR": dsn,
        "CORRAL_PG_POOLER": "transaction",  # statements go out as text, never by a name given before
        "CORRAL_REDIS_URL": urlunsplit(parts._replace(netloc=f"{login}@127.0.0.1:{redis_at}")),
        "CORRAL_LOG_LEVEL": "ERROR",
        **_aws_variables(ec2),
    }
    with (tmp_path / "victim.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.autoscaler.victim"],
            env=environ, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
    yield World(scaling, ec2, tmp_path / "pem", wires, process)
    process.kill()
    process.wait(10)
    wires.close()


def _aws_variables(sold: Ec2) -> dict[str, str]:
    config = aws_config(sold)
    return {
        "CORRAL_AWS_REGION": config.region,
        "CORRAL_AWS_SUBNETS": ",".join(f"{zone}={subnet}" for zone, subnet in config.subnets.items()),
        "CORRAL_AWS_AMI": config.ami,
        "CORRAL_AWS_INSTANCE_TYPES": ",".join(config.instance_types),
        "CORRAL_AWS_SECURITY_GROUPS": ",".join(config.security_groups),
    }


def _play(world: World, scene: str, at: int | str, *, before: bool) -> Strike:
    """One round; the strike says whether it struck."""
    steps = SCENES[scene](world)
    world.ec2.visible_after_s = 0.3
    strike = Strike(at, before)
    code = world.run(steps, timezone.now(), strike)
    assert code == (-9 if strike.struck else 0), f"{scene}: ended with {code} after {strike.seen}"
    where = f"{scene}, killed {'before' if before else 'after'} change {at} ({strike.struck})"
    world.recover()
    world.check(where)
    world.end_round(where)
    return strike


def test_killed_when_it_has_bought_and_before_it_knows(killed: World) -> None:
    """The one place that costs money."""
    assert _play(killed, "launch", "Action=CreateFleet", before=False).struck


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("before", [True, False], ids=["undone", "done"])
@pytest.mark.parametrize("scene", sorted(SCENES))
def test_killed_at_every_change(killed: World, scene: str, before: bool) -> None:
    struck: list[str] = []
    for at in range(1, MAX_CHANGES):
        strike = _play(killed, scene, at, before=before)
        if not strike.struck:
            break
        struck.append(strike.struck)
    print(f"{scene}, {'before' if before else 'after'}: {len(struck)} points: {', '.join(struck)}")
    assert MUST_STRIKE[scene] <= set(struck), struck
    assert len(struck) < MAX_CHANGES - 1


def _tick(scaling: Scaling, now: datetime) -> None:
    from autoscaler.tick import tick

    tick(scaling.deployment.id, scaling.house, now)


def _tag(instance: Any, name: str) -> str:
    with suppress(StopIteration):
        return str(next(t["value"] for t in instance.get_tags() if t["key"] == f"corral:{name}"))
    return ""
