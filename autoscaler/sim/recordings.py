"""Files of spot markets as zones, told by their columns: capacity, counts and events of nodes, prices, interruptions.

JSON holds capacity by tick (market.py). CSVs are of other makers: counts of instances that were up, nodes that came
and went, price histories, lists of interruption bands. Each is brought to ticks; a tick is worth the lowest count
within it, so that a dip between two ticks is not missed. Called by `simulate`; a file of another kind is refused with
its columns.
"""

from __future__ import annotations

import csv
import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from autoscaler.sim.market import MarketError, Zone, read_zone
from autoscaler.sim.workload import WorkloadError, number_of, open_text

TICK_S: Final = 60.0  # of counts and events
PRICE_TICK_S: Final = 600.0  # of price histories, which move by the hour
_DAY_S: Final = 86400.0
_BAND_DAYS: Final = 30.0  # of an interruption list that is played
_MOST_TICKS: Final = 2_000_000
# Share of instances interrupted in a month, the middle of each band; the last is open.
_BANDS: Final = (0.025, 0.075, 0.125, 0.175, 0.25)
_DOWN_S: Final = 3600.0  # how long an interruption lasts, which the list does not say
_KINDS: Final = (
    "t and instances, timestamp and instances (counts); t_ms, event, node; timestamp, az, instance_type, usd_per_hour "
    "(prices over time); region, instance_type, interruption_band"
)


@dataclass(frozen=True, slots=True)
class Reading:
    """What the files do not say. `usd_per_h` by zone name; `on_demand_usd_per_h`: an offer dearer than that has
    nothing to give; `instance`: the type of lists of several; `seed`: of interruptions that are played from a rate."""

    usd_per_h: Callable[[str], float]
    machines_per_unit: int = 16
    on_demand_usd_per_h: float = math.inf
    instance: str = ""
    seed: int = 0


def recordings(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """(files to be read, files of folders that are no recordings of capacity). A file that is named is read whatever it
    is; of a folder those that say how many machines there were."""
    found: list[Path] = []
    left: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        for file in sorted(f for f in path.rglob("*") if f.is_file()):
            name = file.name.removesuffix(".gz")
            if name.endswith(".json") or (name.endswith(".csv") and _kind(file) in (_counts, _events)):
                found.append(file)
            elif name.endswith((".json", ".csv")):
                left.append(file)
    return found, left


def read_market(path: Path, reading: Reading) -> tuple[Zone, ...]:
    """Zones of one file; MarketError says what it is not."""
    name = path.name.removesuffix(".gz")
    if not name.endswith(".csv"):
        stem = name.removesuffix(".json")
        return (
            read_zone(path, usd_per_h=reading.usd_per_h(stem), machines_per_unit=reading.machines_per_unit),
        )
    try:
        kind = _kind(path)
        if kind is None:
            raise MarketError(
                f"{path.name}: is no recording of a spot market; one has the columns {_KINDS}. A price list goes to "
                f"--prices; this has {', '.join(_columns(path))[:200] or 'none'}"
            )
        return tuple(kind(path, reading))
    except WorkloadError as error:
        raise MarketError(str(error)) from None


def unlike(zones: Sequence[tuple[Path, Zone]]) -> tuple[Zone, ...]:
    """Zones whose names differ: one recorded in several folders is told by its folder."""
    known = Counter(zone.name for _, zone in zones)
    named = [
        replace(zone, name=f"{zone.name} ({path.parent.name})") if known[zone.name] > 1 else zone
        for path, zone in zones
    ]
    twice = [name for name, n in Counter(zone.name for zone in named).items() if n > 1]
    if twice:
        raise MarketError(f"{', '.join(twice[:4])}: recorded twice; give files of one span")
    return tuple(named)


def _columns(path: Path) -> Sequence[str]:
    with open_text(path) as lines:
        return csv.DictReader(lines).fieldnames or ()


def _kind(path: Path) -> Callable[[Path, Reading], Iterator[Zone]] | None:
    columns = set(_columns(path))
    if {"t_ms", "event", "node"} <= columns:
        return _events
    if "instances" in columns and columns & {"t", "timestamp"}:
        return _counts
    if {"timestamp", "az", "instance_type", "usd_per_hour"} <= columns:
        return _prices
    if {"region", "instance_type", "interruption_band"} <= columns:
        return _bands
    return None


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with open_text(path) as lines:
        yield from enumerate(csv.DictReader(lines), start=2)


def _counts(path: Path, reading: Reading) -> Iterator[Zone]:
    """Instances that were up. `t` counts seconds, or hours where any of it is a fraction; rows need not be in order,
    and of two at one instant the later one is a step."""
    steps: list[tuple[float, int]] = []
    is_fraction = False
    for line, row in _rows(path):
        n = int(number_of(row, "instances", path, line))
        if "t" in row:
            at_s = number_of(row, "t", path, line)
            is_fraction = is_fraction or not at_s.is_integer()
        else:
            at_s = _instant(row, path, line)
        steps.append((at_s, n))
    scale = 3600.0 if is_fraction else 1.0
    yield _zone(path, [(at_s * scale, n) for at_s, n in steps], reading)


def _events(path: Path, reading: Reading) -> Iterator[Zone]:
    """Nodes that came and went. One that goes and never came, or comes twice, is refused."""
    rows: list[tuple[float, int, str, str]] = []
    for line, row in _rows(path):
        event, node = row.get("event") or "", row.get("node") or ""
        if event not in ("add", "remove") or not node:
            raise MarketError(
                f"{path.name}, line {line}: event = {event!r}, node = {node!r}: give add or remove, and a node"
            )
        rows.append((number_of(row, "t_ms", path, line) / 1000, line, event, node))
    up: set[str] = set()
    steps = []
    for at_s, line, event, node in sorted(rows, key=lambda r: (r[0], r[1])):
        if (event == "add") == (node in up):
            raise MarketError(
                f"{path.name}, line {line}: {node} {'comes' if event == 'add' else 'goes'} but "
                f"{'is there already' if event == 'add' else 'never came'}"
            )
        up.symmetric_difference_update({node})
        steps.append((at_s, len(up)))
    yield _zone(path, steps, reading)


def _prices(path: Path, reading: Reading) -> Iterator[Zone]:
    """Each zone of a price history of one type: machines can be had while they cost less than on-demand, for the mean
    price of that time. A history knows no shortage below that price."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    known: set[str] = set()
    for line, row in _rows(path):
        known.add(row["instance_type"])
        if row["instance_type"] == reading.instance:
            found[row["az"]].append((_instant(row, path, line), number_of(row, "usd_per_hour", path, line)))
    _asked(path, reading, known)
    first_s = min(at_s for rows in found.values() for at_s, _ in rows)
    last_s = max(at_s for rows in found.values() for at_s, _ in rows)
    for az, rows in sorted(found.items()):
        rows.sort()
        limit = reading.on_demand_usd_per_h
        steps = [(first_s, 0 if rows[0][1] >= limit else reading.machines_per_unit)]
        steps += [(at_s, 0 if usd >= limit else reading.machines_per_unit) for at_s, usd in rows]
        weighed = paid = 0.0
        for (at_s, usd), (until_s, _) in itertools.pairwise([*rows, (last_s, 0.0)]):
            if usd < limit:
                weighed += until_s - at_s
                paid += usd * (until_s - at_s)
        usd_per_h = paid / weighed if weighed else rows[0][1]
        yield Zone(
            f"{az}_{reading.instance}", PRICE_TICK_S, _ticks(path, steps, PRICE_TICK_S, last_s), usd_per_h
        )


def _bands(path: Path, reading: Reading) -> Iterator[Zone]:
    """Each region of an interruption list, for one type: losses at the rate of its band, each for an hour, drawn by the
    seed. The list holds rates, no times; price is on-demand less the savings it states."""
    known: set[str] = set()
    rows: list[tuple[str, int, float]] = []
    for line, row in _rows(path):
        known.add(row["instance_type"])
        if row["instance_type"] == reading.instance:
            band = int(number_of(row, "interruption_band", path, line))
            if band >= len(_BANDS):
                raise MarketError(
                    f"{path.name}, line {line}: interruption_band = {band}: give 0 to {len(_BANDS) - 1}"
                )
            rows.append((row["region"], band, number_of(row, "spot_savings_pct", path, line)))
    _asked(path, reading, known)
    for region, band, savings_pct in rows:
        chance = random.Random(f"{reading.seed}:{region}:{reading.instance}")
        per_s = -math.log1p(-_BANDS[band]) / (_BAND_DAYS * _DAY_S)
        steps, at_s = [(0.0, reading.machines_per_unit)], chance.expovariate(per_s)
        while at_s < _BAND_DAYS * _DAY_S:
            steps += [(at_s, 0), (at_s + _DOWN_S, reading.machines_per_unit)]
            at_s += _DOWN_S + chance.expovariate(per_s)
        usd = reading.on_demand_usd_per_h
        usd = usd * (1 - savings_pct / 100) if math.isfinite(usd) else reading.usd_per_h(region)
        capacity = _ticks(path, steps, PRICE_TICK_S, _BAND_DAYS * _DAY_S)
        yield Zone(f"{region}_{reading.instance}", PRICE_TICK_S, capacity, usd)


def _asked(path: Path, reading: Reading, known: set[str]) -> None:
    if reading.instance not in known:
        asked = f"{reading.instance!r} is not in it" if reading.instance else "name one with --instance"
        raise MarketError(
            f"{path.name}: holds several types, {asked}; it has {', '.join(sorted(known))[:200] or 'none'}"
        )


def _zone(path: Path, steps: list[tuple[float, int]], reading: Reading) -> Zone:
    if not steps:
        raise MarketError(f"{path.name}: has no rows; one for each change is wanted")
    name = path.name.removesuffix(".gz").removesuffix(".csv")
    last_s = max(at_s for at_s, _ in steps)
    return Zone(name, TICK_S, _ticks(path, steps, TICK_S, last_s), reading.usd_per_h(name))


def _ticks(path: Path, steps: list[tuple[float, int]], tick_s: float, until_s: float) -> tuple[int, ...]:
    """The lowest count within each tick, from the first instant on; of steps at one instant the last in the file holds
    from there on."""
    ordered = sorted(steps, key=lambda step: step[0])
    first_s = ordered[0][0]
    n_ticks = max(math.ceil((until_s - first_s) / tick_s), 1)
    if n_ticks > _MOST_TICKS:
        raise MarketError(
            f"{path.name}: spans {(until_s - first_s) / _DAY_S:,.0f} days, more than {_MOST_TICKS:,} ticks of "
            f"{tick_s:g} s; give a shorter recording"
        )
    found: list[int] = []
    at, held = 0, ordered[0][1]
    for tick in range(n_ticks):
        start_s, end_s = first_s + tick * tick_s, first_s + (tick + 1) * tick_s
        while at < len(ordered) and ordered[at][0] <= start_s:
            held = ordered[at][1]
            at += 1
        lowest = held
        while at < len(ordered) and ordered[at][0] < end_s:
            held = ordered[at][1]
            lowest = min(lowest, held)
            at += 1
        found.append(lowest)
    return tuple(found)


def _instant(row: Mapping[str, object], path: Path, line: int) -> float:
    """Seconds of an ISO timestamp; one without a zone is taken as UTC."""
    value = row.get("timestamp")
    try:
        at = datetime.fromisoformat(str(value))
    except ValueError:
        raise MarketError(
            f"{path.name}, line {line}: timestamp = {value!r}: give one such as 2021-12-10T13:07:45"
        ) from None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
