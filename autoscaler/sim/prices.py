"""Price lists as files: what a machine of one type costs by the hour, on demand and as spot, by zone where known.

Told by their columns (docs/simulator.md lists them): lists per instance type, with or without zones; dated change logs,
of which the newest counts; spot price histories by zone, of which the mean counts; markets per GPU and hour.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from autoscaler.sim.workload import open_text

_NAMES: Final = ("instance_type", "gpu")
_DATES: Final = ("date", "timestamp")
_ZONES: Final = ("az", "az_id", "zone", "region")
_PER_GPU: Final = ("median", "avg_usd_per_gpu_hour")  # of a market's offers at one instant


class PriceError(ValueError):
    """A file that is no price list, or does not list what was asked for; says which and what it has."""


@dataclass(frozen=True, slots=True)
class Prices:
    """USD per machine hour of one type; None where the file says nothing. `zones`: spot by the file's zone names."""

    on_demand: float | None
    spot: float | None
    zones: dict[str, float] = field(default_factory=dict)

    def spot_in(self, zone: str) -> float | None:
        """Of the zone whose name the recording's begins with, else of all zones together."""
        named = [name for name in self.zones if zone.startswith(name)]
        return self.zones[max(named, key=len)] if named else self.spot


def read_prices(path: Path, name: str, n_gpus: int = 1) -> Prices:
    """Prices of an instance type or, of lists per GPU, of a machine with `n_gpus`."""
    on_demand: dict[str, list[float]] = defaultdict(list)  # by date, "" without
    spot: dict[str, list[float]] = defaultdict(list)  # by zone
    known: set[str] = set()
    counts: set[str] = set()
    with open_text(path) as lines:
        reader = csv.DictReader(lines)
        columns = reader.fieldnames or ()
        zone_column = next((c for c in _ZONES if c in columns), None)
        date_column = next((c for c in _DATES if c in columns), None)
        keys = [c for c in _NAMES if c in columns]
        per_gpu = next((c for c in _PER_GPU if c in columns), None)
        priced = {"usd_per_hour", "on_demand_usd_per_hour", "spot_usd_per_hour", per_gpu} & set(columns)
        if not keys or not priced:
            raise PriceError(
                f"{path.name}: needs a column {' or '.join(_NAMES)} and one of usd_per_hour, on_demand_usd_per_hour, "
                f"spot_usd_per_hour, {', '.join(_PER_GPU)}; has {', '.join(columns) or 'none'}"
            )
        for number, row in enumerate(reader, start=2):
            known.update(row[key] for key in keys if row[key])
            if name not in (row[key] for key in keys):
                continue
            if row.get("instance_type") != name and row.get("gpu_count"):  # of a GPU, machines with so many
                counts.add(row["gpu_count"])
                if row["gpu_count"] != str(n_gpus):
                    continue
            zone = row[zone_column] if zone_column else ""
            date = row[date_column] if date_column else ""

            def price(column: str | None, row: dict[str, str] = row, number: int = number) -> float | None:
                text = row.get(column) if column else None
                if not text:
                    return None
                try:
                    value = float(text)
                except ValueError:
                    value = math.nan
                if not (math.isfinite(value) and value >= 0):
                    raise PriceError(f"{path.name}, line {number}: {column} = {text!r}: must be a price")
                return value

            listed = price("usd_per_hour")
            if listed is not None and zone_column:  # a history by zone is one of spot prices
                spot[zone].append(listed)
            elif listed is not None:
                on_demand[date].append(listed)
            asked = price(per_gpu)
            if asked is not None:
                on_demand[date].append(asked * n_gpus)
            whole = price("on_demand_usd_per_hour")
            if whole is not None:
                on_demand[""].append(whole)
            bid = price("spot_usd_per_hour")
            if bid is not None:
                spot[zone].append(bid)
    if counts and str(n_gpus) not in counts:
        raise PriceError(
            f"{path.name}: no machine with {n_gpus} {name}; --tp may be {', '.join(sorted(counts, key=int))}"
        )
    if not on_demand and not spot:
        raise PriceError(
            f"{path.name}: no price of {name!r}; it lists {', '.join(sorted(known)[:20]) or 'nothing'}"
        )
    newest = statistics.median(on_demand[max(on_demand)]) if on_demand else None
    zones = {zone: statistics.fmean(values) for zone, values in sorted(spot.items())}
    return Prices(newest, statistics.median(zones.values()) if zones else None, zones)
