"""What Postgres knows that a request needs: keys with their tenant, limits and deployments, and money spent.

`PgDirectory` asks through SECURITY DEFINER functions as the app role, because no tenant is known yet. Called
by the key cache, the change feed and admission; nothing on the path of a request with a cached key. Every
wait is bounded.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol

import msgspec
import psycopg
from psycopg_pool import AsyncConnectionPool, PoolTimeout, TooManyRequests

from billing.money import Nano, NanoPerMillion, Rates
from controlplane.policy.ordering import QueueOrder
from controlplane.policy.periods import Period
from controlplane.policy.promises import Promise, Rule
from workers.keys import DEFAULT_CELL

log = logging.getLogger(__name__)

Limits = tuple[
    int, int, int, int, int
]  # rpm, input_tpm, output_tpm, max_concurrency, budget_nano; -1 = no limit


class DirectoryUnavailable(Exception):  # noqa: N818 - a state of the world, retryable
    """Postgres does not answer, or not in time: nobody can say whether the key is good."""


class LimitsRow(msgspec.Struct, frozen=True):
    rpm: int | None = None
    input_tpm: int | None = None
    output_tpm: int | None = None
    max_concurrency: int | None = None
    budget_nano: int | None = None

    def values(self) -> Limits:
        """As the admission script takes them."""
        row = (self.rpm, self.input_tpm, self.output_tpm, self.max_concurrency, self.budget_nano)
        return tuple(-1 if value is None else value for value in row)  # type: ignore[return-value]


class ScopesRow(msgspec.Struct, frozen=True):
    """What a key is bound to; None = not bound (tenants/key_scopes.py)."""

    routes: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    ip_ranges: tuple[str, ...] | None = None


class KeyRow(msgspec.Struct, frozen=True):
    id: str
    lookup: str
    digest: str
    limits: LimitsRow
    weight: int = 100  # share of its project's place in the fair queue
    expires_at_ms: int | None = None
    revoked_at_ms: int | None = None
    scopes: ScopesRow | None = None
    aliases: dict[str, str] | None = None  # its own names of models: {alias: name}


class ProjectRow(msgspec.Struct, frozen=True):
    id: str
    limits: LimitsRow
    weight: int = 100  # of its organization's
    zero_retention: bool = False


class OrganizationRow(msgspec.Struct, frozen=True):
    id: str
    limits: LimitsRow
    weight: int = 100
    suspended_at_ms: int | None = None


class PriceRow(msgspec.Struct, frozen=True):
    version: str
    input_nano_per_million: int
    cached_nano_per_million: int
    output_nano_per_million: int

    def rates(self) -> Rates:
        return Rates(
            NanoPerMillion(self.input_nano_per_million),
            NanoPerMillion(self.cached_nano_per_million),
            NanoPerMillion(self.output_nano_per_million),
        )


class SloRow(msgspec.Struct, frozen=True):
    """A service class."""

    band: int = 0
    ttft_ms: int = 1_000
    itl_ms: int = 100
    name: str = "interactive"
    deadline_s: int = 300
    objective_ppm: int = 990_000

    def promise(self) -> Promise:
        return Promise(self.name, self.band, self.ttft_ms, self.itl_ms, self.deadline_s, self.objective_ppm)


class RuleRow(msgspec.Struct, frozen=True):
    """What the key's project says of a class."""

    slo_class: str
    deployment: str = ""
    key: str = ""
    is_default: bool = False
    ttft_ms: int | None = None
    itl_ms: int | None = None
    deadline_s: int | None = None
    objective_ppm: int | None = None

    def rule(self) -> Rule:
        return Rule(*(getattr(self, name) for name in self.__struct_fields__))


class SloBook(msgspec.Struct, frozen=True):
    """All classes, the rules of the key's project, deployments that do not refuse as their class does, and what their
    classes cost where that differs: deployment -> class -> price."""

    classes: tuple[SloRow, ...] = ()
    rules: tuple[RuleRow, ...] = ()
    admission: dict[str, str] = {}
    prices: dict[str, dict[str, PriceRow]] = {}


class DeploymentRow(msgspec.Struct, frozen=True):
    id: str
    name: str
    max_model_len: int
    price: PriceRow
    slo: SloRow = SloRow()
    created_at_ms: int = 0
    queue_order: QueueOrder = QueueOrder.EDF
    locality_window_tokens: int = 2_000


class AdapterRow(msgspec.Struct, frozen=True):
    """A LoRA adapter of the key's project that can answer in this cell; `name` is the model that programs send."""

    id: str
    deployment: str
    name: str
    created_at_ms: int = 0


class LeaseRow(msgspec.Struct, frozen=True):
    """This cell's part of a tenant's limits, while there are several cells. `budgets`: by scope, nano-dollars that may
    be spent here; what is not named is not leased (yet)."""

    ppm: int = 0
    left_ms: int = 0
    budgets: dict[str, int] = {}


class BudgetRow(msgspec.Struct, frozen=True):
    """A hard budget with a window; `limit_nano` is this cell's part of it. `scope`: key, prj or org."""

    id: str
    name: str
    scope: str
    limit_nano: int
    period: Period
    timezone: str
    model: str = ""
    rolling_hours: int | None = None


class EndLeaseRow(msgspec.Struct, frozen=True):
    """This cell's part of an end customer's money, while there are several: it may spend `granted` in all, and admits
    under that for `left_ms`. `spent`: booked here; `elsewhere`: what other cells have and have not used."""

    spent: int
    granted: int
    left_ms: int
    elsewhere: int = 0


class ShadowRow(msgspec.Struct, frozen=True):
    """What is sent copies of a deployment's requests: an endpoint elsewhere, or `target`, a deployment of the same
    project. `organization`, `project`: whose it is. Rates are the endpoint's own."""

    id: str
    deployment: str
    organization: str
    project: str
    name: str
    share_ppm: int
    rpm: int
    slots: int
    budget_nano: int
    target: str = ""
    max_model_len: int = 2048
    input_nano_per_million: int = 0
    cached_nano_per_million: int = 0
    output_nano_per_million: int = 0


class EndCustomerRow(msgspec.Struct, frozen=True):
    """Limits of one end customer of the key's project, by its pseudonym; empty: of each that has none of its own."""

    limits: LimitsRow
    customer: str = ""


class KeyRecord(msgspec.Struct, frozen=True):
    """Answer of corral_key_lookup_slo, with budgets, adapters, shadows and limits on end customers: one key with all
    that its requests need."""

    key: KeyRow
    project: ProjectRow
    organization: OrganizationRow
    deployments: tuple[DeploymentRow, ...] = ()
    # None: this is the only cell, and the limits are all its own.
    lease: LeaseRow | None = None
    slo: SloBook = SloBook()
    budgets: tuple[BudgetRow, ...] = ()
    adapters: tuple[AdapterRow, ...] = ()
    shadows: tuple[ShadowRow, ...] = ()
    end_customers: tuple[EndCustomerRow, ...] = ()


class Changes(msgspec.Struct, frozen=True):
    """Answer of corral_changes_since. `reset`: too much or too old to list, so everything may have
    changed."""

    watermark: str
    reset: bool
    changes: tuple[str, ...]


class KeyDirectory(Protocol):
    """What the gateway asks of Postgres; each call raises DirectoryUnavailable when it cannot say."""

    async def find(self, lookup: str, digests: tuple[bytes, ...]) -> KeyRecord | None:
        """The key with this lookup part and one of these digests; None = there is none."""

    async def rehash(self, lookup: str, old: bytes, new_lookup: str, new: bytes, pepper_id: str) -> None:
        """Keep a key under this lookup part and digest, if it still has that digest."""

    async def changes(self, watermark: str | None) -> Changes:
        """What changed since; None = start here."""

    async def spent_nano(self, scope: str, scope_id: str) -> Nano:
        """Money booked against a key, project or organization (`key`, `prj`, `org`) in its budget's
        period."""

    async def spent_here_nano(self, scope: str, scope_id: str) -> Nano:
        """The same, as far as it was spent in this cell."""

    async def spent_for_nano(self, project: str, customer: str) -> Nano:
        """Booked for an end customer of a project, by its pseudonym."""

    async def lease_end(
        self, project: str, customer: str, *, used: Nano, idle: bool, need: Nano
    ) -> EndLeaseRow:
        """Have a part of its money for this cell. `used`: spent or held here; `idle`: nothing is held; `need`: what a
        request wants beyond that."""

    async def spent_in_window(self, budget: str, from_ms: int, until_ms: int, step_ms: int) -> dict[str, int]:
        """Booked in this cell under a window budget: by start of each step (ms), or in all where `step_ms` is 0."""


class PgDirectory:
    """The directory in Postgres. `up` is what the last question showed; a known outage answers at once."""

    def __init__(
        self,
        dsn: str,
        *,
        cell: str = DEFAULT_CELL,
        pool_size: int = 4,
        timeout_s: float = 2.0,
        pooled: bool = False,
    ) -> None:
        self.up = True
        self._cell = cell
        self._timeout_s = timeout_s
        statement_ms = int(timeout_s * 1000)
        self._pool: AsyncConnectionPool[Any] = AsyncConnectionPool(
            dsn,
            min_size=1,
            max_size=pool_size,
            timeout=timeout_s,
            max_waiting=16 * pool_size,
            reconnect_timeout=5.0,
            open=False,
            kwargs={
                "autocommit": True,
                "connect_timeout": 3,
                "application_name": "corral-gateway",
                # PgBouncer in transaction mode refuses startup options; there the role's own limit counts.
                **({} if pooled else {"options": f"-c statement_timeout={statement_ms}"}),
                "prepare_threshold": None,  # a pooler in transaction mode may stand in between
            },
        )

    async def open(self) -> None:
        """Start connecting; returns at once, whether Postgres is there or not."""
        await self._pool.open(wait=False)

    async def close(self) -> None:
        await self._pool.close(timeout=1.0)

    async def find(self, lookup: str, digests: tuple[bytes, ...]) -> KeyRecord | None:
        if not self.up:  # the change feed asks again every half second and lifts this
            raise DirectoryUnavailable
        found = await self._ask(
            "SELECT CASE WHEN corral_key_known(%s, %s) "
            "THEN corral_with_end_customers(corral_with_shadows(corral_with_adapters(corral_with_budgets("
            "corral_key_lookup_slo(%s, %s), %s), %s), %s)) END",
            lookup,
            [digest.hex() for digest in digests],
            lookup,
            *[self._cell] * 4,
        )
        return None if found is None else msgspec.convert(found, KeyRecord)

    async def rehash(self, lookup: str, old: bytes, new_lookup: str, new: bytes, pepper_id: str) -> None:
        statement = "SELECT corral_key_move(%s, %s, %s, %s, %s)"
        await self._ask(statement, lookup, old.hex(), new_lookup, new.hex(), pepper_id)

    async def changes(self, watermark: str | None) -> Changes:
        return msgspec.convert(await self._ask("SELECT corral_changes_since(%s)", watermark), Changes)

    async def spent_nano(self, scope: str, scope_id: str) -> Nano:
        if not self.up:
            raise DirectoryUnavailable
        return Nano(int(await self._ask("SELECT corral_spent(%s, %s)", scope, scope_id)))

    async def spent_here_nano(self, scope: str, scope_id: str) -> Nano:
        if not self.up:
            raise DirectoryUnavailable
        return Nano(int(await self._ask("SELECT corral_spent_in(%s, %s, %s)", scope, scope_id, self._cell)))

    async def spent_for_nano(self, project: str, customer: str) -> Nano:
        if not self.up:
            raise DirectoryUnavailable
        return Nano(int(await self._ask("SELECT corral_spent_for(%s, %s, NULL)", project, customer)))

    async def lease_end(
        self, project: str, customer: str, *, used: Nano, idle: bool, need: Nano
    ) -> EndLeaseRow:
        if not self.up:
            raise DirectoryUnavailable
        statement = "SELECT corral_lease_end(%s, %s, %s, %s, %s, %s)"
        found = await self._ask(statement, project, customer, self._cell, used, idle, need)
        return msgspec.convert(found, EndLeaseRow)

    async def spent_in_window(self, budget: str, from_ms: int, until_ms: int, step_ms: int) -> dict[str, int]:
        if not self.up:
            raise DirectoryUnavailable
        statement = "SELECT corral_budget_spent(%s, %s, %s, %s, %s)"
        return msgspec.convert(
            await self._ask(statement, budget, from_ms, until_ms, step_ms, self._cell), dict[str, int]
        )

    async def _ask(self, statement: str, *params: str | int | list[str] | None) -> Any:
        try:
            async with asyncio.timeout(2 * self._timeout_s), self._pool.connection() as connection:
                cursor = await connection.execute(statement, params)
                row = await cursor.fetchone()
        except (psycopg.Error, PoolTimeout, TooManyRequests, TimeoutError, OSError) as error:
            if self.up and not isinstance(error, TooManyRequests):
                log.warning("postgres does not answer: %s", type(error).__name__)
                self.up = False
            raise DirectoryUnavailable from error
        if not self.up:
            log.info("postgres answers again")
            self.up = True
        assert row is not None  # each statement is a SELECT of one function
        return row[0]
