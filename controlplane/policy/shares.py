"""How a tenant's limits are divided among cells: pure.

Called by the control worker of every cell (tenants/leases.py), under a lock per tenant. Each cell holds a lease on part
of a total (parts per million of the rates and of concurrency, or nano-dollars of a budget) and uses it without asking
anybody, so what was leased once counts until that lease has run out: a share that shrinks frees its part only then, and
the parts outstanding never sum to more than the total, whatever is lost or late.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

WHOLE_PPM: Final = 1_000_000
# What a cell without demand keeps of the rates, so that its first requests need not wait for the next division.
FLOOR_PPM: Final = 50_000
# A share moves only by more than this part of the whole: every change makes gateways read their keys again.
HYSTERESIS_PPM: Final = 20_000


@dataclass(frozen=True, slots=True)
class Lease:
    """One cell's part. `before` counts until `before_until_s`, because a gateway may not have heard of less yet."""

    cell: str
    granted: int = 0
    until_s: float = 0.0
    before: int = 0
    before_until_s: float = 0.0

    def outstanding(self, now_s: float) -> int:
        """The most that the cell may be using."""
        now_granted = self.granted if self.until_s > now_s else 0
        return max(now_granted, self.before if self.before_until_s > now_s else 0)


def wanted_ppm(
    demand: Mapping[str, float],
    current: Mapping[str, int],
    *,
    floor_ppm: int = FLOOR_PPM,
    units: int = WHOLE_PPM,
) -> dict[str, int]:
    """Parts per million for each cell in `demand` (any unit, >= 0), which should be those alive.

    In proportion to demand above a floor; equal where nobody asks for anything. `units`: the smallest limit that is
    counted in whole requests, at least 1; parts are multiples of 1/units, so that rounding loses none of it (a
    concurrency of 1 is held by one cell). Stays at `current` where the difference is small.
    """
    cells = sorted(demand)
    if not cells:
        return {}
    floor = min(floor_ppm, WHOLE_PPM // len(cells))
    total = sum(demand.values())
    above = WHOLE_PPM - floor * len(cells)
    exact = {c: floor + above * (demand[c] / total if total > 0 else 1 / len(cells)) for c in cells}
    units = min(max(units, 1), WHOLE_PPM)
    parts = {c: int(exact[c] * units) // WHOLE_PPM for c in cells}
    by_rest = sorted(cells, key=lambda c: (parts[c] * WHOLE_PPM - exact[c] * units, c))
    for c in by_rest[: units - sum(parts.values())]:
        parts[c] += 1
    wanted = {c: parts[c] * WHOLE_PPM // units for c in cells}
    step = max(HYSTERESIS_PPM, WHOLE_PPM // units // 2)
    held = {c: current.get(c, 0) for c in cells}
    settled = WHOLE_PPM - step < sum(held.values()) <= WHOLE_PPM and all(
        abs(wanted[c] - held[c]) < step for c in cells
    )
    return held if settled else wanted


def divide(
    total: int,
    leases: Iterable[Lease],
    wanted: Mapping[str, int],
    now_s: float,
    life_s: float,
    used: Mapping[str, int] | None = None,
) -> tuple[Lease, ...]:
    """The leases from now on, by cell: those of the cells in `wanted` renewed for `life_s`, the others left to run out.

    `used`: what a cell has used up for good (money), which nobody else can be given, whatever became of its lease.
    The outstanding parts sum to at most `total`, provided that they did before.
    """
    spent = used or {}
    rows = {lease.cell: lease for lease in leases}
    for cell in wanted:
        rows.setdefault(cell, Lease(cell))

    def outstanding(lease: Lease) -> int:
        return max(lease.outstanding(now_s), spent.get(lease.cell, 0))

    shrunk: dict[str, Lease] = {}
    for cell, lease in rows.items():
        if cell not in wanted:
            continue
        granted = lease.granted if lease.until_s > now_s else 0
        becomes = max(min(granted, wanted[cell]), spent.get(cell, 0))
        if lease.before_until_s > now_s and lease.before > granted:
            becomes = granted  # one step down at a time, or the first would stay outstanding for ever
        if becomes < granted:
            lease = replace(
                lease,
                before=lease.outstanding(now_s),
                before_until_s=max(lease.until_s, lease.before_until_s),
            )
        shrunk[cell] = replace(lease, granted=becomes, until_s=now_s + life_s)
    rows |= shrunk
    free = total - sum(outstanding(lease) for lease in rows.values())
    short = {c: max(wanted[c] - outstanding(rows[c]), 0) for c in sorted(wanted)}
    n_short = sum(short.values())
    for cell, missing in short.items():
        if missing and free > 0:
            more = min(missing, max(free, 0) * missing // n_short) if n_short > free else missing
            lease = rows[cell]
            rows[cell] = replace(lease, granted=outstanding(lease) + more)
        elif rows[cell].granted < wanted[cell]:
            # What it had before is still outstanding: taking that back costs nothing.
            rows[cell] = replace(rows[cell], granted=min(wanted[cell], outstanding(rows[cell])))
    return tuple(rows[cell] for cell in sorted(rows))


def scaled(limit: int, ppm: int) -> int:
    """A cell's part of a limit, rounded down, so that the parts never sum to more; -1 (no limit) stays."""
    return limit if limit < 0 else limit * ppm // WHOLE_PPM


def outstanding(leases: Sequence[Lease], now_s: float) -> int:
    """What all cells together may be using."""
    return sum(lease.outstanding(now_s) for lease in leases)
