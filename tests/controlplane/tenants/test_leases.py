"""Two cells, each with a Redis of its own, one Postgres: a tenant's limits hold over both, whatever one does."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from django.db import connections
from django.test import override_settings

from controlplane.budgets import services as budgets
from controlplane.gateway import endlimits, windows
from controlplane.gateway.directory import KeyRecord
from controlplane.gateway.keycontext import KeyContext, context_of
from controlplane.policy.flows import ANY_MS
from controlplane.policy.periods import Period
from controlplane.policy.shares import WHOLE_PPM
from controlplane.tenants import key_services, limit_services
from controlplane.tenants.leases import LIFE, Leases
from controlplane.tenants.limits import Limits
from controlplane.tenants.models import ApiKey, CellLease
from infra.local.redis import EmbeddedRedis
from tests.billing.usage import STANDARD
from tests.database import acting_as
from tests.world import World, build_world
from workers import scripts
from workers.keys import CellKeys

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "operator"])
# Of each test: the lookup compares with the server's clock; the tests walk on from here.
START = datetime.now(tz=UTC)


class CellSide:
    """One cell: its Redis, its control worker's leases, and what its gateway would do."""

    def __init__(self, name: str, client: redis.Redis) -> None:
        self.name, self.client, self.keys = name, client, CellKeys(name)
        self.leases = Leases(name, client, alone=timedelta(0))
        self.n_admitted = 0
        for script in scripts.TRUSTED_SCRIPTS:
            client.script_load(script.source)

    def context(self, key: ApiKey) -> KeyContext:
        """What the gateway knows of the key, as it would read it now."""
        with connections["operator"].cursor() as cursor:
            cursor.execute(
                "SELECT corral_with_budgets(corral_key_lookup_in(%s, %s), %s)",
                [key.lookup, self.name, self.name],
            )
            found = cursor.fetchone()[0]
        return context_of(msgspec.convert(msgspec.json.decode(found), KeyRecord))

    def admit(
        self,
        context: KeyContext,
        now_ms: int,
        *,
        n_in: int = 10,
        n_out: int = 20,
        rate: int = 2,
        ends: endlimits.Scope | None = None,
    ) -> list[Any]:
        """One request under that context, for an end customer with these limits."""
        request = uuid.uuid4().hex
        last: tuple[Any, ...] = windows.argument(context.budgets, "")
        if ends is not None:
            last = endlimits.argument(ends, last)
        self.client.set(self.keys.body(request), b"B")
        verdict: list[Any] = self.client.evalsha(
            scripts.ADMIT.sha, 0, self.keys.prefix, now_ms, request, "d1", "g1", 1, "pv", n_in, n_out,
            n_in + rate * n_out, now_ms, 100_000, n_in, rate, "", 0, *context.scope_args, 0, n_out, b"", 0, 60_000, 0,
            0, ANY_MS, 0,
            *map(msgspec.msgpack.encode, last),
        )  # fmt: skip
        if verdict[0] == b"queued":
            self.n_admitted += 1
        elif verdict[0] == b"seed" and verdict[1] != b"end":
            scope, scope_id = verdict[1].decode(), verdict[2].decode()
            if scope == "bud":
                args = (scope_id, int(verdict[3]), int(verdict[4]), 0, 0, 86_400_000)
                self.client.evalsha(scripts.SEED_WINDOW.sha, 0, self.keys.prefix, *args)
                return self.admit(context, now_ms, n_in=n_in, n_out=n_out, rate=rate)
            with connections["operator"].cursor() as cursor:
                cursor.execute("SELECT corral_spent_in(%s, %s, %s)", [scope, scope_id, self.name])
                spent = cursor.fetchone()[0]
            self.client.evalsha(scripts.SEED.sha, 0, self.keys.prefix, scope, scope_id, spent)
            return self.admit(context, now_ms, n_in=n_in, n_out=n_out, rate=rate)
        return verdict


@pytest.fixture(autouse=True)
def _begin_now() -> None:
    """A lease lives a minute, and the suite may come to these tests many minutes after it was collected."""
    global START
    START = datetime.now(tz=UTC)


@pytest.fixture(scope="module")
def second_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(Path(tmp_path_factory.mktemp("cell-b")) / "redis")
    server.start()
    server.wait_ready()
    yield server
    server.destroy()


@pytest.fixture
def cells(redis_url: str, second_redis: EmbeddedRedis) -> Iterator[tuple[CellSide, CellSide]]:
    with redis.Redis.from_url(redis_url) as one, second_redis.connect() as two:
        two.flushall()
        yield CellSide("c0", one), CellSide("c1", two)
    connections["operator"].close()


def _key(world: World, **limits: int) -> ApiKey:
    limit_services.set_organization_limits(organization_id=world.organization.id, limits=Limits(**limits))
    key, _ = key_services.create_api_key(
        organization_id=world.organization.id, project_id=world.project.id, name="k"
    )
    return key


def _shares() -> dict[str, int]:
    rows = CellLease.objects.using("operator").filter(scope=CellLease.SHARE)
    return {row.cell: row.granted for row in rows}


def _both(cells: tuple[CellSide, CellSide], now: datetime) -> None:
    """Both control workers do their rounds, twice, so that each has seen the other."""
    for _ in range(2):
        for cell in cells:
            cell.leases.renew(now)


def test_a_cell_alone_has_everything_and_stores_nothing(cells: tuple[CellSide, CellSide]) -> None:
    key = _key(build_world(), rpm=7)
    assert cells[0].leases.renew(START).n_tenants == 0
    assert not CellLease.objects.using("operator").exists()
    context = cells[0].context(key)
    assert (context.scopes[2][2][0], context.lease_ms, context.unleased) == (7, None, False)


def test_two_cells_together_admit_no_more_than_the_limit(cells: tuple[CellSide, CellSide]) -> None:
    """Each kind of limit; demand is uneven, and both ask for far more than there is."""
    limits = {"rpm": 40, "input_tpm": 900, "output_tpm": 1_900, "max_concurrency": 31}
    key = _key(build_world(), **limits)
    _both(cells, START)
    now_ms = int(START.timestamp() * 1000)
    contexts = [cell.context(key) for cell in cells]
    assert not any(context.unleased for context in contexts)
    for _ in range(60):
        for cell, context in zip(cells, contexts, strict=True):
            cell.admit(context, now_ms)
    n_admitted = sum(cell.n_admitted for cell in cells)
    assert n_admitted <= 31
    assert n_admitted >= 31 - 2, "and little is lost to rounding"


@pytest.mark.parametrize("limit", ["rpm", "max_concurrency"])
def test_a_limit_of_one_is_one_over_both(cells: tuple[CellSide, CellSide], limit: str) -> None:
    key = _key(build_world(), **{limit: 1})
    _both(cells, START)
    for cell in cells:
        context = cell.context(key)
        for _ in range(3):
            cell.admit(context, int(START.timestamp() * 1000))
    assert sum(cell.n_admitted for cell in cells) == 1


def test_shares_follow_demand_and_old_leases_are_honoured(cells: tuple[CellSide, CellSide]) -> None:
    key = _key(build_world(), rpm=1_000_000)
    busy, idle = cells
    _both(cells, START)
    assert _shares() == {"c0": 500_000, "c1": 500_000}
    stale = idle.context(key)
    now = START
    seen = []
    for _ in range(8):
        now += timedelta(seconds=10)
        context = busy.context(key)
        for _ in range(20):
            busy.admit(context, int(now.timestamp() * 1000))
        for cell in cells:
            cell.leases.renew(now)
        seen.append(_shares())
        assert sum(_shares().values()) <= WHOLE_PPM
    assert seen[0]["c0"] == 500_000, "the other's gateways may still hold the old lease"
    assert seen[-1] == {"c0": 950_000, "c1": 50_000}
    assert stale.lease_ms is not None and stale.lease_ms <= LIFE.total_seconds() * 1000


def test_a_dead_cells_share_comes_back_after_its_lease(cells: tuple[CellSide, CellSide]) -> None:
    key = _key(build_world(), rpm=100)
    alive, dead = cells
    _both(cells, START)
    alive.leases.renew(START + LIFE - timedelta(seconds=1))
    assert _shares()["c0"] == 500_000
    alive.leases.renew(START + LIFE)
    assert _shares()["c0"] == WHOLE_PPM
    with acting_as("corral_operator"):
        CellLease.objects.filter(cell="c1").update(expires_at=START - timedelta(days=1))
    assert dead.context(key).unleased, "and it serves nothing that is limited, should it be alive after all"


def test_a_second_cell_waits_until_the_first_ones_gateways_know_of_it(
    cells: tuple[CellSide, CellSide],
) -> None:
    _key(build_world(), rpm=100)
    first, second = cells
    for cell in cells:
        cell.leases = Leases(cell.name, cell.client)
    first.leases.renew(START - timedelta(days=9))
    second.leases.renew(START)
    for seconds in range(0, 900, 50):
        _both(cells, START + timedelta(seconds=seconds))
        assert _shares()["c1"] == 0
    _both(cells, START + timedelta(seconds=901))
    assert _shares()["c1"] == 500_000


def test_a_change_is_noted_for_gateways_and_a_renewal_is_not(cells: tuple[CellSide, CellSide]) -> None:
    world = build_world()
    _key(world, rpm=100)
    _both(cells, START)
    ref = f"lim:{world.organization.id.hex}"

    before = _count(ref)
    assert before > 0
    _both(cells, START + timedelta(seconds=10))
    assert _count(ref) == before


def test_a_budget_is_never_exceeded_over_both_cells(cells: tuple[CellSide, CellSide]) -> None:
    """Each cell spends what it was leased; what is left is leased again until it is gone."""
    world = build_world()
    key = _key(world, budget_nano=5_000)
    machines = {cell.name: _machine(cell.name) for cell in cells}
    now = START
    _both(cells, now)
    for round_ in range(12):
        for cell in cells:
            context = cell.context(key)
            for _ in range(30 if cell.name == "c0" else 3):
                if cell.admit(context, int(now.timestamp() * 1000))[0] == b"queued":
                    _book(world, key, machines[cell.name], 50)
                    _settle_all(cell)
        now += timedelta(seconds=61)
        _both(cells, now)
        assert sum(cell.n_admitted for cell in cells) * 50 <= 5_000, round_
    n_admitted = sum(cell.n_admitted for cell in cells)
    assert n_admitted * 50 > 5_000 - 2 * 50 - 50, (
        "the whole budget can be used, to less than a request a cell"
    )


def _settle_all(cell: CellSide) -> None:
    for name in cell.client.scan_iter(cell.keys.request("*")):
        request = name.decode().rpartition(":")[2]
        cell.client.evalsha(scripts.SETTLE.sha, 0, cell.keys.prefix, 1, request, 10, 20, 50, 1_000, 0)
        cell.client.delete(name)


def _machine(cell: str) -> uuid.UUID:
    from autoscaler.models import Machine, MachineState

    with acting_as("corral_operator"):
        row = Machine.objects.create(
            provider="test",
            command_id=uuid.uuid4(),
            enroll_proof_digest=b"x" * 32,
            cell=cell,
            state=MachineState.READY,
        )
    return row.id


def _book(world: World, key: ApiKey, machine: uuid.UUID, cost: int) -> None:
    from billing.models import UsageEvent
    from controlplane import ids

    request = ids.new_id()
    made_at = datetime.fromtimestamp(ids.created_ms(request) / 1000, tz=UTC)
    with acting_as("corral_operator"):
        UsageEvent.objects.create(
            day=made_at.date(), request_id=request, organization_id=world.organization.id,
            project_id=world.project.id, api_key_id=key.id, deployment_id=uuid.uuid4(), machine_id=machine,
            model="m", n_prompt_tokens=10, n_cached_tokens=0, n_completion_tokens=20, attempts=1, finish_reason="stop",
            status=200, admitted_at=made_at, duration_ms=1, price_version_id=uuid.UUID(STANDARD), cost_nano=cost,
            witness="stream", received_at=made_at,
        )  # fmt: skip


def _count(ref: str) -> int:
    from infra.local import roles

    with acting_as(roles.OWNER):
        from django.db import connection

        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM corral_change WHERE ref = %s", [ref])
            return int(cursor.fetchone()[0])


def test_the_task_registers_its_cell_and_outlives_what_is_away(cells: tuple[CellSide, CellSide]) -> None:
    from controlplane.tenants import tasks
    from controlplane.tenants.models import Cell
    from infra.local.ports import free_port

    _key(build_world(), rpm=100)
    tasks.lease_shares()
    assert list(Cell.objects.using("operator").values_list("name", flat=True)) == ["c0"]
    cells[1].leases.renew(datetime.now(tz=UTC))
    tasks.lease_shares()
    assert set(_shares()) == {"c0", "c1"}
    url = f"redis://127.0.0.1:{free_port()}/0"
    with override_settings(ENV=replace(tasks.settings.ENV, redis_url=url)):
        tasks.lease_shares()


def test_a_window_budget_is_spent_once_over_both_cells(cells: tuple[CellSide, CellSide]) -> None:
    """Both spend until they are refused, twice, with a division in between: together never more than the budget."""
    world = build_world()
    key = _key(world)
    made = budgets.create_budget(
        organization_id=world.organization.id, name="team", limit_nano=10_000, period=Period.MONTH
    )
    n_given = 0
    for n in range(8):
        now = START + timedelta(seconds=10 * n)
        for cell in cells:
            cell.leases.renew(now)
        contexts = [cell.context(key) for cell in cells]
        granted = [context.budgets[0].limit_nano for context in contexts]
        assert sum(granted) <= 10_000
        if n >= 2:
            n_given += all(granted)
        for cell, context in zip(cells, contexts, strict=True):
            if context.unleased:
                continue
            while cell.admit(context, int(now.timestamp() * 1000))[0] == b"queued":
                pass
    held = [int(cell.client.hget(cell.keys.budget(made.id.hex), "held") or 0) for cell in cells]
    assert all(held) and n_given
    assert 10_000 - 2 * 50 < sum(held) <= 10_000
