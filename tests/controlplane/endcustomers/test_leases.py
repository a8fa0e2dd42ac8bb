"""Two cells, each with a Redis of its own, one Postgres: a customer's money holds over both, and no cell sits on it."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Awaitable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import psycopg
import pytest
import redis
from django.db import connections

from billing.models import UsageEvent
from billing.money import Nano
from controlplane import ids
from controlplane.endcustomers import services
from controlplane.endcustomers.leases import SETTLES, give_back
from controlplane.endcustomers.models import EndCustomerLease
from controlplane.gateway import endlimits
from controlplane.gateway.directory import DirectoryUnavailable, PgDirectory
from controlplane.tenants import key_services
from controlplane.tenants.limits import Limits
from controlplane.tenants.models import CellLease
from infra.local.postgres import EmbeddedPostgres
from infra.local.redis import EmbeddedRedis
from tests.billing.usage import STANDARD
from tests.controlplane.tenants.test_leases import CellSide, _machine, second_redis
from tests.database import acting_as
from tests.world import World, build_world
from workers import scripts
from workers.redis_client import Client

__all__ = ["second_redis"]  # a fixture
pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "operator"])
ANN = "ab" * 12
MOST, ONE = 5_000, 50  # nano-dollars: her money; what a request holds, and costs
T = TypeVar("T")


class Side(CellSide):
    """A cell that asks for leases as its gateway does."""

    def __init__(
        self, name: str, client: redis.Redis, url: str, dsn: str, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(name, client)
        self.loop = loop
        self.machine = _machine(name)
        self.directory = PgDirectory(dsn, cell=name)
        self.fast = Client(url, name=name, scripts=scripts.TRUSTED_SCRIPTS)
        self.n_asked = 0
        self.await_(self._open())

    async def _open(self) -> None:
        await self.directory.open()
        self.fast.start()
        await self.fast.connect()

    async def _close(self) -> None:
        await self.directory.close()
        await self.fast.close()

    def await_(self, what: Awaitable[T]) -> T:
        return self.loop.run_until_complete(what)  # type: ignore[arg-type]

    @property
    def hash(self) -> str:
        return self.keys.limits("end", self.scope[0])

    def begin(self, world: World) -> None:
        key, _ = key_services.create_api_key(
            organization_id=world.organization.id, project_id=world.project.id, name=self.name
        )
        self.world, self.key = world, key
        # The lookup with end customers, as a gateway asks: here from the parts.
        context = self.context(key)
        assert context.lease_ms is None or not context.unleased
        self.plain = context
        self.scope: Any = (f"{world.project.id.hex}.{ANN}", -1, -1, -1, -1, MOST, 0, 1)

    def ask(self) -> list[Any]:
        """One request for Ann."""
        for _ in range(3):
            now_ms = time.time_ns() // 1_000_000
            verdict = self.admit(self.plain, now_ms, ends=self.scope)
            if verdict[0] != b"seed":
                return verdict
            self.n_asked += 1
            name = verdict[2].decode()
            self.await_(endlimits.seed(self.fast, self.keys, self.directory, name, Nano(ONE), leased=True))
        raise AssertionError("a third question for one request")

    def drain(self, most: int = 1_000) -> int:
        """Requests until one is refused, or so many."""
        n = 0
        while n < most and self.ask()[0] == b"queued":
            n += 1
        return n

    def settle(self, most: int = 10_000) -> None:
        """So many of those that run end, and are booked."""
        for name in list(self.client.scan_iter(self.keys.request("*")))[:most]:
            request = name.decode().rpartition(":")[2]
            self.client.evalsha(scripts.SETTLE.sha, 0, self.keys.prefix, 1, request, 10, 20, ONE, 1_000, 0)
            self.client.delete(name)
            _book(self.world, self.key.id, self.machine)

    def taken(self) -> int:
        """Spent and held here."""
        return sum(int(value or 0) for value in self.client.hmget(self.hash, "spent", "held"))

    def lapse(self) -> None:
        """A minute without a request for her."""
        self.client.hset(self.hash, mapping={"until": 0, "dry": 0})
        EndCustomerLease.objects.using("operator").filter(cell=self.name).update(
            expires_at=datetime.now(tz=UTC) - timedelta(seconds=1)
        )

    def give_back(self, after: timedelta = timedelta(0)) -> int:
        return give_back(self.name, self.client, datetime.now(tz=UTC) + after)

    def wet(self) -> None:
        """Two seconds later: it may ask again."""
        self.client.hset(self.hash, "dry", 0)


@pytest.fixture
def sides(
    redis_url: str, second_redis: EmbeddedRedis, pg_server: EmbeddedPostgres
) -> Iterator[tuple[Side, Side]]:
    loop = asyncio.new_event_loop()
    world = build_world()
    services.set_limits(
        organization_id=world.organization.id, project_id=world.project.id, limits=Limits(budget_nano=MOST)
    )
    with redis.Redis.from_url(redis_url) as one, second_redis.connect() as two:
        two.flushall()
        dsn = pg_server.dsn("app")
        both = (Side("c0", one, redis_url, dsn, loop), Side("c1", two, second_redis.url(), dsn, loop))
        for _ in range(2):
            for side in both:
                side.leases.renew(datetime.now(tz=UTC))
        for side in both:
            side.begin(world)
        yield both
        for side in both:
            side.await_(side._close())
    loop.close()
    connections["operator"].close()


def _book(world: World, key_id: uuid.UUID, machine: uuid.UUID) -> None:
    request = ids.new_id()
    made_at = datetime.fromtimestamp(ids.created_ms(request) / 1000, tz=UTC)
    with acting_as("corral_operator"):
        UsageEvent.objects.create(
            day=made_at.date(), request_id=request, organization_id=world.organization.id,
            project_id=world.project.id, api_key_id=key_id, deployment_id=uuid.uuid4(), machine_id=machine,
            model="m", n_prompt_tokens=10, n_cached_tokens=0, n_completion_tokens=20, attempts=1, finish_reason="stop",
            status=200, admitted_at=made_at, duration_ms=1, price_version_id=uuid.UUID(STANDARD), cost_nano=ONE,
            witness="stream", received_at=made_at, end_customer=ANN,
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_two_cells_never_exceed_and_use_all_of_it(sides: tuple[Side, Side], seed: int) -> None:
    """Both take at random, end some, let their leases lapse and give back, in any order."""
    dice = random.Random(seed)
    spent_or_held = 0
    for _ in range(60):
        side = sides[dice.randrange(2)]
        match dice.randrange(5):
            case 0 | 1:
                side.drain(dice.randrange(1, 12))
            case 2:
                side.settle(dice.randrange(1, 12))
            case 3:
                side.lapse()
            case 4:
                side.give_back()
        spent_or_held = sum(each.taken() for each in sides)
        assert spent_or_held <= MOST, f"seed {seed}"
    for _ in range(12):
        for side in sides:
            side.settle()
            side.lapse()
            side.give_back()
            side.wet()
            side.drain()
    assert MOST - ONE < sum(each.taken() for each in sides) <= MOST, f"seed {seed}"


def test_a_cell_whose_neighbour_is_idle_uses_all_of_it(sides: tuple[Side, Side]) -> None:
    busy, idle = sides
    assert idle.ask()[0] == b"queued"
    half = busy.drain()
    refused = busy.ask()
    assert refused[:3] == [b"refused", b"end", b"budget"] and 0 < refused[3] <= 2_000, "it is with the other"
    assert half < MOST // ONE * 0.7
    idle.settle()
    idle.lapse()
    assert idle.give_back() == 1
    busy.wet()
    assert half + busy.drain() == MOST // ONE - 1
    assert busy.ask()[3] == -1, "and now it is used up"
    assert busy.n_asked <= 20, "each time it asks for half of what is left"


def test_what_runs_elsewhere_is_not_given_back(sides: tuple[Side, Side]) -> None:
    busy, other = sides
    assert other.drain(3) == 3
    granted = EndCustomerLease.objects.using("operator").get(cell="c1").granted
    other.lapse()
    assert other.give_back() == 0
    assert busy.drain() * ONE == MOST - granted
    other.settle()
    assert other.give_back() == 1
    busy.wet()
    busy.drain()
    assert busy.taken() + other.taken() == MOST


def test_of_a_redis_that_forgot_it_counts_until_all_of_it_must_have_ended(sides: tuple[Side, Side]) -> None:
    busy, lost = sides
    lost.drain(3)
    granted = EndCustomerLease.objects.using("operator").get(cell="c1").granted
    lost.lapse()
    lost.client.flushall()
    assert lost.give_back() == 0
    assert busy.drain() * ONE == MOST - granted
    lost.give_back(after=SETTLES + timedelta(seconds=66))
    assert not EndCustomerLease.objects.using("operator").filter(cell="c1").exists()


def test_leases_asked_for_at_once_never_sum_to_more(
    sides: tuple[Side, Side], pg_server: EmbeddedPostgres
) -> None:
    """The second question waits for the first one's transaction, or it would not see what that grants."""
    project = sides[0].world.project.id.hex
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"

    async def both() -> None:
        async with await psycopg.AsyncConnection.connect(pg_server.dsn("app")) as first:
            await first.execute("SELECT corral_lease_end(%s, %s, 'c0', 0, true, 1000)", [project, ANN])
            second = asyncio.ensure_future(
                sides[1].directory.lease_end(project, ANN, used=Nano(0), idle=True, need=Nano(1_000))
            )
            while not second.done():  # bounded by the directory's own time
                found = await (await first.execute(waiting)).fetchone()
                if found and found[0]:
                    break
                await asyncio.sleep(0.01)
            await first.commit()
            await second

    sides[0].await_(both())
    granted = EndCustomerLease.objects.using("operator").values_list("granted", flat=True)
    assert sorted(granted) == [1_000, 4_000]


def test_a_cell_without_a_share_of_its_tenants_limits_gets_none(sides: tuple[Side, Side]) -> None:
    with acting_as("corral_operator"):
        CellLease.objects.filter(cell="c1").update(granted=0)
    with pytest.raises(DirectoryUnavailable):
        sides[1].ask()
    assert not EndCustomerLease.objects.using("operator").exists()


def test_a_tenant_who_limits_only_its_customers_is_leased_shares(sides: tuple[Side, Side]) -> None:
    shares = CellLease.objects.using("operator").values_list("cell", "granted")
    assert dict(shares) == {"c0": 500_000, "c1": 500_000}
