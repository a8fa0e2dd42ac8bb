"""What the studies of machines share: recorded markets, demand and load, and the replica that serves it.

One replica is llama-3.1-8b on an L4, 8 slots; its hour is charged at the market's price. That the
V100 whose spot market was recorded would not hold the model is left aside: prices and preemptions are the market's.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from autoscaler.policy.forecast import ForecastMemory, learn
from autoscaler.sim.enginemodel import EngineSpec
from autoscaler.sim.job import Job
from autoscaler.sim.market import Steps, Zone, read_zone
from autoscaler.sim.rates import WINDOW_S, Lengths, Rate, arrivals, read_lengths, read_rates
from autoscaler.sim.replicas import engine_spec
from autoscaler.sim.workload import Arrival, jobs, read_requests

SPOT_USD_PER_H: Final = 0.918
ON_DEMAND_USD_PER_H: Final = 3.06
SLOTS: Final = 8
TTFT_S: Final = 5.0
REPLICA: Final = (
    f"llama-3.1-8b on one L4 (step times fitted on other GPUs), {SLOTS} slots, charged at the market's price"
)
PRICES: Final = (
    f"spot {SPOT_USD_PER_H} USD/h where the file has none (AWS p3.2xlarge), on-demand {ON_DEMAND_USD_PER_H} USD/h, "
    "by the second"
)


def engine() -> EngineSpec:
    return engine_spec("llama-3.1-8b", "l4")


@dataclass(frozen=True, slots=True)
class Market:
    """Zones of one machine type recorded together."""

    name: str
    zones: tuple[Zone, ...]

    def window(self, seed: int, length_s: float) -> tuple[Zone, ...]:
        """A span of the recording, the same one for all zones, chosen by the seed."""
        start_s = random.Random(f"market:{seed}").random() * min(zone.end_s for zone in self.zones)
        return tuple(zone.window(start_s, length_s) for zone in self.zones)


def markets(traces: Path, zone_machines: int) -> list[Market]:
    """All recorded markets: a folder's files of one machine type. Where one machine was probed, availability means
    `zone_machines`; folders of several nodes hold counts."""
    root = traces / "spot" / "skypilot_spot_traces"
    found: dict[tuple[str, str], list[Zone]] = defaultdict(list)
    for path in sorted(root.rglob("*.json")):
        unit = zone_machines if path.parent.parent.name == "1-node" else 1
        zone = read_zone(path, usd_per_h=SPOT_USD_PER_H, machines_per_unit=unit)
        folder = f"{path.parent.parent.parent.name} {path.parent.parent.name} {path.parent.name}"
        found[folder, path.stem.split("_", 1)[1]].append(zone)
    if not found:
        raise FileNotFoundError(f"{root.name}: no capacity file (*.json) there")
    return [Market(f"{folder}, {kind}", tuple(zones)) for (folder, kind), zones in found.items()]


def total_rates(rates: list[Rate]) -> dict[float, float]:
    """Requests per second of all clients by window; windows in which almost nothing was recorded are left out."""
    total: dict[float, float] = defaultdict(float)
    for rate in rates:
        total[rate.start_s] += rate.rps
    middle = statistics.median(total.values())
    return {at_s: rps for at_s, rps in sorted(total.items()) if rps > 0.1 * middle}


def demand(total: dict[float, float], seed: int, length_s: float, mean_machines: float) -> Steps:
    """Machines wanted over a span chosen by the seed: proportional to the recorded rate."""
    mean = statistics.fmean(total.values())
    instants = sorted(total)
    start_s = random.Random(f"demand:{seed}").random() * (instants[-1] - length_s)
    start_s -= start_s % WINDOW_S
    span = [at_s for at_s in instants if start_s <= at_s < start_s + length_s]
    wanted = tuple(max(1, math.ceil(total[at_s] / mean * mean_machines)) for at_s in span)
    return Steps(tuple(at_s - start_s for at_s in span), wanted)


@dataclass(frozen=True, slots=True)
class Load:
    """A recorded workload, thinned to `keep`; each seed takes another span of it."""

    name: str
    rates: list[Rate]
    lengths: Lengths | None
    requests: tuple[Arrival, ...]
    keep: float

    def jobs(self, seed: int, length_s: float, start_s: float | None = None) -> Iterator[Job]:
        if self.lengths is not None:
            end_s = self.rates[-1].start_s + WINDOW_S
            if start_s is None:
                start_s = self.whole(
                    random.Random(f"load:{seed}").random() * (end_s - length_s) * 0.9, length_s
                )
            found = arrivals(
                self.rates,
                self.lengths,
                keep=self.keep,
                seed=seed,
                start_s=start_s,
                until_s=start_s + length_s,
            )
            return jobs(found)
        return jobs(self._repeated(seed, length_s))

    def whole(self, start_s: float, length_s: float) -> float:
        """The first start from there on whose span has no hole in the recording: load that vanishes for ten minutes and
        comes back at once is the recorder's, not the tenants'. ValueError when there is none."""
        total = total_rates(self.rates)
        last_s = self.rates[-1].start_s + WINDOW_S - length_s
        start_s -= start_s % WINDOW_S
        while start_s <= last_s:
            n = math.ceil(length_s / WINDOW_S)
            missing = [i for i in range(n) if start_s + i * WINDOW_S not in total]
            if not missing:
                return start_s
            start_s += (missing[-1] + 1) * WINDOW_S
        raise ValueError(f"{self.name}: no span of {length_s:g} s without a hole is left")

    def _repeated(self, seed: int, length_s: float) -> Iterator[Arrival]:
        """The recorded hour again and again, other requests of it each time."""
        hour_s = 3600.0 * math.ceil(self.requests[-1].at_s / 3600)
        for lap in range(math.ceil(length_s / hour_s)):
            chance = random.Random(f"{seed}:{lap}")
            for arrival in self.requests:
                if chance.random() < self.keep:
                    yield replace(arrival, at_s=arrival.at_s + lap * hour_s)


def past(
    load: Load, seed: int, start_s: float, lead_s: float, held_s: float, hours: float = 6.0
) -> ForecastMemory:
    """What the scaler's forecast had learned before `start_s`: the days' profile from the recorded rates, its errors
    from the requests of the last hours, each taken to stay `held_s`."""
    memory: ForecastMemory | None = None
    near_s = max(start_s - hours * 3600, 0.0)
    total = total_rates(load.rates)
    at_s = 0.0
    while at_s < near_s:
        if at_s - at_s % WINDOW_S in total:
            rps = total[at_s - at_s % WINDOW_S] * load.keep
            memory = replace(learn(at_s, rps * held_s, lead_s, memory), pending=(), errors=(), n_checked=0)
        at_s += WINDOW_S
    ends: deque[float] = deque()
    at_s = near_s
    for job in load.jobs(seed, start_s - near_s, near_s):
        while near_s + job.arrived_s >= at_s:
            while ends and ends[0] <= at_s:
                ends.popleft()
            memory = learn(at_s, float(len(ends)), lead_s, memory)
            at_s += 15.0
        ends.append(near_s + job.arrived_s + held_s)
    assert memory is not None
    return memory


def servegen(traces: Path, model: str, keep: float) -> Load:
    folder = traces / "requests" / "servegen"
    rates = read_rates(folder / f"{model}_rates.csv.gz")
    return Load(f"ServeGen {model}", rates, read_lengths(folder / f"{model}_lengths.csv.gz"), (), keep)


def azure(traces: Path, keep: float) -> Load:
    requests = tuple(read_requests(traces / "requests" / "azure_llm_2023_conv.csv"))
    return Load("Azure conversation, its hour repeated", [], None, requests, keep)
