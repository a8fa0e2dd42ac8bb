"""Divides every tenant's limits among the cells, as long as there are several.

Run by the control worker of each cell (tasks.py), as operator. One run reports this cell's demand and renews its
leases; the arithmetic is controlplane/policy/shares.py, a row lock per tenant keeps two cells from granting the same
part twice. Must never grant what another cell may still be using. With a single cell nothing is stored and nothing is
asked of anybody.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, cast
from uuid import UUID

import redis
from django.db import connections, transaction

from controlplane.budgets import selectors as budgets
from controlplane.budgets.models import Budget
from controlplane.policy.shares import WHOLE_PPM, Lease, divide, scaled, wanted_ppm
from controlplane.tenants.models import Cell, CellLease, Organization
from workers.keys import CellKeys

DATABASE: Final = "operator"
# A cell that cannot renew stops serving tenants with limits after this; its part is another's from then on.
LIFE: Final = timedelta(seconds=60)
# How long gateways of a cell that was alone may go on with what they cached (GatewayConfig.key_stale_s).
ALONE: Final = timedelta(seconds=900)
_SMOOTHING: Final = 0.3  # weight of the latest interval in the demand
_NEVER: Final = datetime(1970, 1, 1, tzinfo=UTC)

# Tenants with any limit at any level, and the smallest limit that is counted in whole requests.
_LIMITED: Final = """
SELECT organization_id, min(least(rpm, max_concurrency)) FROM (
    SELECT id AS organization_id, rpm, max_concurrency, input_tpm, output_tpm, budget_nano FROM tenants_organization
    UNION ALL
    SELECT organization_id, rpm, max_concurrency, input_tpm, output_tpm, budget_nano FROM tenants_project
    UNION ALL
    SELECT organization_id, rpm, max_concurrency, input_tpm, output_tpm, budget_nano FROM tenants_apikey
    WHERE revoked_at IS NULL
    UNION ALL
    SELECT organization_id, NULL, NULL, NULL, NULL, limit_nano FROM budgets_budget WHERE hard
    UNION ALL
    -- Of end customers each cell lets at least one of a kind pass (gateway/endlimits.py): no units.
    SELECT organization_id, NULL, NULL, 0, NULL, NULL FROM endcustomers_endcustomerlimits
) AS limited
WHERE coalesce(rpm, max_concurrency, input_tpm, output_tpm, budget_nano) IS NOT NULL
GROUP BY organization_id ORDER BY organization_id
"""
_BUDGETS: Final = """
SELECT 'org', id, budget_nano FROM tenants_organization WHERE id = %(id)s AND budget_nano IS NOT NULL
UNION ALL
SELECT 'prj', id, budget_nano FROM tenants_project WHERE organization_id = %(id)s AND budget_nano IS NOT NULL
UNION ALL
SELECT 'key', id, budget_nano FROM tenants_apikey
WHERE organization_id = %(id)s AND budget_nano IS NOT NULL AND revoked_at IS NULL
"""


@dataclass(frozen=True, slots=True)
class Renewed:
    """What a run did."""

    n_tenants: int = 0
    n_changed: int = 0


class Leases:
    """The leases of one cell. `client` is the cell's Redis; `now` is for tests."""

    def __init__(self, cell: str, client: redis.Redis, *, alone: timedelta = ALONE) -> None:
        self.cell = cell
        self._keys = CellKeys(cell)
        self._client = client
        self._alone = alone

    def renew(self, now: datetime) -> Renewed:
        """Report, renew and divide. Raises what Redis and Postgres raise when they are away; call again later."""
        seen = {"seen_at": now}
        Cell.objects.using(DATABASE).update_or_create(
            name=self.cell, defaults=seen, create_defaults={**seen, "created_at": now}
        )
        cells = list(Cell.objects.using(DATABASE).all())
        if len(cells) == 1:
            return Renewed()
        with connections[DATABASE].cursor() as cursor:
            cursor.execute(_LIMITED)
            tenants: list[tuple[UUID, int | None]] = cursor.fetchall()
        asked = self._asked([organization for organization, _ in tenants])
        n_changed = 0
        for organization, units in tenants:
            with transaction.atomic(using=DATABASE):
                n_changed += self._renew_tenant(organization, units, cells, asked[organization], now)
        return Renewed(len(tenants), n_changed)

    def _asked(self, organizations: list[UUID]) -> dict[UUID, int]:
        """Requests of each tenant counted by this cell, admitted or refused."""
        pipeline = self._client.pipeline(transaction=False)
        for organization in organizations:
            pipeline.hget(self._keys.limits("org", organization.hex), "n")
        return {o: int(n or 0) for o, n in zip(organizations, pipeline.execute(), strict=True)}

    def _renew_tenant(
        self, organization: UUID, units: int | None, cells: list[Cell], n_asked: int, now: datetime
    ) -> int:
        # The tenant's row is the lock: two cells' runs must not both see the same part as free.
        list(
            Organization.objects.using(DATABASE)
            .select_for_update(no_key=True)
            .filter(id=organization)
            .values_list("id")
        )
        rows = list(CellLease.objects.using(DATABASE).filter(organization_id=organization))
        shares = {row.cell: row for row in rows if row.scope == CellLease.SHARE}
        for cell in cells:
            if cell.name not in shares:
                shares[cell.name] = self._first_share(organization, cell, cells)
        _report(shares[self.cell], n_asked, now)
        alive = {cell.name for cell in cells if cell.name == self.cell or cell.seen_at > now - LIFE}
        wanted = wanted_ppm(
            {name: shares[name].demand for name in alive},
            {name: row.granted for name, row in shares.items() if row.expires_at > now},
            units=units or WHOLE_PPM,
        )
        # Only this cell's own: another one's lease is renewed, and cut, by whoever lives there.
        changed = _apply(shares.values(), WHOLE_PPM, {self.cell: wanted[self.cell]}, now, None)
        windows = {budget.id: budget for budget in self._window_budgets(organization)}
        for scope, scope_id, budget in [
            *self._budgets(organization),
            *((each.scope, each.id, each.limit_nano) for each in windows.values()),
        ]:
            held = {row.cell: row for row in rows if row.scope == scope and row.scope_id == scope_id}
            for cell in cells:
                if cell.name not in held:
                    held[cell.name] = self._first_budget(organization, scope, scope_id, budget, cell, cells)
            window = windows.get(scope_id)
            used = {
                cell.name: self._spent(scope, scope_id, cell.name)
                if window is None
                else self._spent_in_window(window, cell.name, now)
                for cell in cells
            }
            left = max(budget - sum(used.values()), 0)
            part = used[self.cell] + scaled(left, wanted[self.cell])
            changed += _apply(held.values(), budget, {self.cell: part}, now, used)
        return changed

    def _first_share(self, organization: UUID, cell: Cell, cells: list[Cell]) -> CellLease:
        """A cell that was alone until another one came has had everything, and its gateways may not know better."""
        return self._first(organization, CellLease.SHARE, organization, WHOLE_PPM, cell, cells)

    def _first_budget(
        self, organization: UUID, scope: str, scope_id: UUID, budget: int, cell: Cell, cells: list[Cell]
    ) -> CellLease:
        return self._first(organization, scope, scope_id, budget, cell, cells)

    def _first(
        self, organization: UUID, scope: str, scope_id: UUID, whole: int, cell: Cell, cells: list[Cell]
    ) -> CellLease:
        second = sorted(c.created_at for c in cells)[1]
        alone = cell.created_at < second
        return CellLease(
            organization_id=organization,
            cell=cell.name,
            scope=scope,
            scope_id=scope_id,
            granted=0,
            expires_at=_NEVER,
            before=whole if alone else 0,
            before_until=second + self._alone if alone else _NEVER,
        )

    def _budgets(self, organization: UUID) -> list[tuple[str, UUID, int]]:
        with connections[DATABASE].cursor() as cursor:
            cursor.execute(_BUDGETS, {"id": organization})
            return cast("list[tuple[str, UUID, int]]", cursor.fetchall())

    def _window_budgets(self, organization: UUID) -> list[Budget]:
        """A part of one is as good in the next window, since all cells begin it at the same moment."""
        found = Budget.objects.using(DATABASE).filter(organization_id=organization, hard=True)
        return list(found.select_related("organization").order_by("id"))

    def _spent_in_window(self, budget: Budget, cell: str, now: datetime) -> int:
        """As `_spent`, in the present window."""
        window = budgets.window_of(budget, now)
        booked = budgets.spent_nano(budget, window, now, cell=cell, using=DATABASE)
        if cell != self.cell:
            return booked
        win, spent, held = cast(
            "list[Any]", self._client.hmget(self._keys.budget(budget.id.hex), "win", "spent", "held")
        )
        known = int(spent or 0) + int(held or 0) if int(win or -1) == window.counter_ms else 0
        return max(booked, known)

    def _spent(self, scope: str, scope_id: UUID, cell: str) -> int:
        """Booked, and for this cell what its Redis knows beyond that."""
        with connections[DATABASE].cursor() as cursor:
            cursor.execute("SELECT corral_spent_in(%s, %s, %s)", [scope, scope_id, cell])
            booked = int(cursor.fetchone()[0])
        if cell != self.cell:
            return booked
        counters: list[Any] = cast(
            "list[Any]", self._client.hmget(self._keys.limits(scope, scope_id.hex), "spent", "held")
        )
        return max(booked, sum(int(value or 0) for value in counters))


def _report(row: CellLease, n_asked: int, now: datetime) -> None:
    """Requests per second since the last report; a counter that went back began anew with its Redis."""
    if row.reported_at is not None:
        seconds = max((now - row.reported_at).total_seconds(), 0.1)
        n_new = n_asked - row.n_asked if n_asked >= row.n_asked else n_asked
        row.demand += _SMOOTHING * (n_new / seconds - row.demand)
    row.n_asked, row.reported_at = n_asked, now


def _apply(
    rows: Iterable[CellLease], total: int, wanted: dict[str, int], now: datetime, used: dict[str, int] | None
) -> int:
    """Divide and store; how many parts changed."""
    by_cell = {row.cell: row for row in rows}
    now_s = now.timestamp()
    leases = [
        Lease(r.cell, r.granted, r.expires_at.timestamp(), r.before, r.before_until.timestamp())
        for r in by_cell.values()
    ]
    n_changed = 0
    for lease in divide(total, leases, wanted, now_s, LIFE.total_seconds(), used):
        row = by_cell[lease.cell]
        n_changed += row.granted != lease.granted
        row.granted, row.before = lease.granted, lease.before
        row.expires_at = datetime.fromtimestamp(lease.until_s, tz=UTC)
        row.before_until = datetime.fromtimestamp(lease.before_until_s, tz=UTC)
        row.save(using=DATABASE)
    return n_changed
