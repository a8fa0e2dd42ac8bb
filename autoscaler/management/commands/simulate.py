"""`manage.py simulate`: what a policy would have done with a recorded workload, market and price list.

For whoever decides on a policy before money is touched. Runs the production policies and the rules they are compared
with on the same seeds, prints a table or JSON. Reads files only; needs no database.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from autoscaler.policy.ladder import Stakes
from autoscaler.sim import report
from autoscaler.sim.checkers import InvariantError
from autoscaler.sim.enginemodel import EngineSpec
from autoscaler.sim.fleet import Terms
from autoscaler.sim.idle_policies import RUNGS, compare
from autoscaler.sim.job import Job
from autoscaler.sim.market import MarketError, Zone
from autoscaler.sim.oracle import OracleError, bound_of
from autoscaler.sim.policies import MAKERS, NEEDS_MARKET, policy
from autoscaler.sim.prices import PriceError, read_prices
from autoscaler.sim.rates import arrivals, read_lengths, read_rates
from autoscaler.sim.recordings import Reading, read_market, recordings, unlike
from autoscaler.sim.replicas import engine_spec, told
from autoscaler.sim.scenario import Result, Setting, run
from autoscaler.sim.statistics import interval
from autoscaler.sim.workload import WorkloadError, jobs, read_requests, thin
from controlplane.policy.capacity import Mix, capacity
from controlplane.policy.gpus import GPUS
from controlplane.policy.models import MODELS
from controlplane.policy.perfmodel import DTYPES

_SAMPLE = 2000  # requests whose mean sizes the slots
_COLUMNS = (
    ("TTFT p50", "ttft_p50_s", "{:.3f} s"),
    ("p99", "ttft_p99_s", "{:.2f} s"),
    ("ITL p99", "itl_p99_s", "{:.4f} s"),
    ("mean latency", "latency_mean_s", "{:.2f} s"),
    ("in SLO", "slo_attainment", "{:.2%}"),
    ("prefix hits", "hit_ratio", "{:.1%}"),
    ("USD", "usd", "{:.2f}"),
    ("available", "availability", "{:.3%}"),
    ("req/CPU s", "requests_per_cpu_s", "{:,.0f}"),
)


class Command(BaseCommand):
    help = "Simulates policies on recorded workloads; prints what they cost and how they served."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        load = parser.add_argument_group("workload")
        load.add_argument("--requests", type=Path, help="request file: CSV or JSON lines, gzipped or not")
        load.add_argument("--rates", type=Path, help="rate file of many clients (instead of --requests)")
        load.add_argument("--lengths", type=Path, help="length file for --rates (default: its sibling)")
        load.add_argument("--keep", type=float, default=1.0, help="share of the requests kept (default 1)")
        load.add_argument("--speed", type=float, default=1.0, help="replay faster (--requests only)")
        load.add_argument(
            "--start-h", type=float, default=0.0, help="begin this many hours into the recording"
        )
        load.add_argument("--hours", type=float, default=math.inf, help="simulate at most so many hours")
        house = parser.add_argument_group("house")
        house.add_argument("--model", choices=sorted(MODELS), default="llama-3.1-8b", metavar="NAME")
        house.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="width of the weights")
        house.add_argument("--gpu", choices=sorted(GPUS), default="l4")
        house.add_argument("--tp", type=int, default=1, help="GPUs per replica")
        house.add_argument(
            "--replicas", type=int, default=16, help="replicas without a market, or of `static`"
        )
        house.add_argument(
            "--slots", type=int, default=0, help="requests per replica (default: what ITL and KV allow)"
        )
        house.add_argument("--itl-s", type=float, default=0.1, help="target time between tokens")
        house.add_argument("--ttft-s", type=float, default=2.0, help="target time to the first token")
        house.add_argument(
            "--target-ratio", type=float, default=0.7, help="share of slots that should be busy"
        )
        market = parser.add_argument_group("market")
        market.add_argument(
            "--spot",
            type=Path,
            nargs="+",
            help="recordings of capacity, counts, events, prices or interruptions; or a folder",
        )
        market.add_argument(
            "--zone-machines", type=int, default=16, help="machines that availability 1 means"
        )
        market.add_argument(
            "--spot-usd", type=float, default=0.918, help="USD an hour where files have no price"
        )
        market.add_argument("--on-demand-usd", type=float, default=3.06)
        market.add_argument("--prices", type=Path, help="price list, instead of the two figures above")
        market.add_argument(
            "--instance", help="machine type in --prices and --spot (or GPU, of lists per GPU)"
        )
        market.add_argument("--boot-s", type=float, default=120.0, help="order of a machine to serving")
        market.add_argument(
            "--notice-s", type=float, default=120.0, help="warning before a spot machine goes"
        )
        market.add_argument(
            "--reserve",
            type=int,
            default=0,
            help="on-demand machines that lie stopped, to stand in for spot ones that go (default 0)",
        )
        market.add_argument(
            "--resume-s", type=float, default=60.0, help="order of a stopped machine to serving"
        )
        market.add_argument(
            "--stopped-usd", type=float, default=0.011, help="a stopped machine's disk, an hour"
        )
        market.add_argument("--max-machines", type=int, default=64)
        market.add_argument(
            "--oracle",
            action="store_true",
            help="also the least that a buyer who knows the future would pay for the demand each policy had",
        )
        market.add_argument(
            "--availability", type=float, default=0.999, help="what the oracle must reach (default 0.999)"
        )
        parser.add_argument(
            "--policy",
            default="corral",
            help=f"one of {', '.join(MAKERS)}, several, or all; NAME:KNOB=VALUE sets one",
        )
        parser.add_argument(
            "--seeds", type=int, default=1, help="runs per policy; spans of the market differ"
        )
        idle = parser.add_argument_group("idle deployments")
        idle.add_argument(
            "--idle",
            action="store_true",
            help="where the spares of idle deployments rest instead: each tenant of the file is a deployment",
        )
        idle.add_argument("--keep-alive-s", type=float, default=600.0, help="of the fixed rule (default 600)")
        idle.add_argument("--late-usd", type=float, default=0.02, help="worth of a late request")
        idle.add_argument("--late-usd-per-s", type=float, default=0.002, help="and of each second of it")
        parser.add_argument("--json", action="store_true")
        parser.add_argument(
            "--report", type=Path, metavar="DIR", help="also write a page with charts (index.html) there"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        if options["idle"]:
            self._idle(options)
            return
        _check(options)
        names = _policies(options["policy"], has_market=bool(options["spot"]))
        try:
            setting = _setting(options, self.stderr.write)
            rows: dict[str, list[Result]] = {name: [] for name in names}
            bounds: dict[str, list[float]] = {name: [] for name in names}
            for seed in range(max(options["seeds"], 1)):
                spanned = _span(setting, options, seed)
                for name in names:
                    label = f"policy {name}, seed {seed}"
                    self.stderr.write(f"simulating {label}")
                    load = _load(options, seed)
                    rows[name].append(run(spanned, policy(name), load, label=label, progress=self._progress))
                    if options["oracle"]:
                        bounds[name].append(_bound(spanned, rows[name][-1], options["availability"]))
        except (WorkloadError, MarketError, PriceError, ValueError, InvariantError, OracleError) as error:
            raise CommandError(str(error)) from error
        assumptions = _assumptions(options, setting)
        notes = _notes(rows, bounds)
        if options["report"]:
            try:
                page = report.write(options["report"], rows, assumptions, setting.ttft_target_s, notes)
            except OSError as error:
                raise CommandError(f"--report {options['report']}: {error.strerror or error}") from error
            self.stderr.write(f"report: {page}")
        if options["json"]:
            policies = {name: [result.figures() for result in results] for name, results in rows.items()}
            found: dict[str, Any] = {"assumptions": assumptions, "policies": policies}
            if options["oracle"]:
                found["oracle_usd"] = bounds
            self.stdout.write(json.dumps(found, indent=2))
            return
        for name, value in assumptions.items():
            self.stdout.write(f"  {name}: {value}")
        self._table(rows)
        for note in notes:
            self.stdout.write(note)

    def _idle(self, options: dict[str, Any]) -> None:
        serving = RUNGS[0].usd_per_h
        stakes = Stakes(options["ttft_s"], options["late_usd"], options["late_usd_per_s"], serving)
        try:
            found = compare(
                _load(options, 0),
                stakes,
                s_per_token=options["itl_s"],
                keep_alive_s=options["keep_alive_s"],
            )
        except (WorkloadError, ValueError) as error:
            raise CommandError(str(error)) from error
        rungs = {r.name: {"usd_per_h": r.usd_per_h, "wake_s": r.wake_s} for r in RUNGS}
        if options["json"]:
            self.stdout.write(json.dumps({"rungs": rungs, "policies": found}, indent=2))
            return
        for name, rung in rungs.items():
            self.stdout.write(f"  {name}: {rung['usd_per_h']:g} USD/h, {rung['wake_s']:g} s to wake")
        self.stdout.write(f"{'policy':<20}{'late':>10}{'idle USD':>12}{'and late USD':>14}")
        for name, row in found.items():
            self.stdout.write(
                f"{name:<20}{row['late']:>10.1%}{row['idle_usd']:>12.2f}{row['total_usd']:>14.2f}"
            )

    def _progress(self, now_s: float, n_done: int) -> None:
        self.stderr.write(f"  {now_s / 3600:8.2f} h simulated, {n_done:,} requests")

    def _table(self, rows: dict[str, list[Result]]) -> None:
        self.stdout.write("")
        self.stdout.write(f"{'policy':<20}" + "".join(f"{title:>20}" for title, _, _ in _COLUMNS))
        for name, results in rows.items():
            cells = []
            for _, field, form in _COLUMNS:
                found = interval([getattr(result, field) for result in results])
                half = f" ±{form.format(found.half).split()[0]}" if found.half else ""
                cells.append(form.format(found.mean) + half)
            self.stdout.write(f"{name:<20}" + "".join(f"{cell:>20}" for cell in cells))


def _notes(rows: dict[str, list[Result]], bounds: dict[str, list[float]]) -> list[str]:
    notes = []
    for name, usd in bounds.items():
        if usd:
            paid = interval([r.usd / least for r, least in zip(rows[name], usd, strict=True)])
            half = f" ± {paid.half:.3f}" if paid.half else ""
            notes.append(f"{name}: {paid.mean:.3f}{half} times what the oracle would pay for its demand")
    return notes


def _policies(text: str, *, has_market: bool) -> list[str]:
    known = [name for name in MAKERS if has_market or name not in NEEDS_MARKET]
    names = known if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        try:
            policy(name)
        except ValueError as error:
            raise CommandError(f"--policy: {error}") from None
        if name.partition(":")[0] not in known:
            raise CommandError(f"--policy {name}: decides about machines; give a market with --spot")
    if not names:
        raise CommandError("--policy: names no policy")
    return names


# The least of each option, and whether it may be that.
_LEAST = {
    "replicas": (1, True), "slots": (0, True), "tp": (1, True), "seeds": (1, True), "max_machines": (1, True),
    "zone_machines": (1, True), "itl_s": (0, False), "ttft_s": (0, False), "target_ratio": (0, False),
    "keep": (0, False), "speed": (0, False), "hours": (0, False), "start_h": (0, True), "boot_s": (0, True),
    "notice_s": (0, True), "spot_usd": (0, True), "on_demand_usd": (0, True), "availability": (0, False),
    "reserve": (0, True), "resume_s": (0, True), "stopped_usd": (0, True),
}  # fmt: skip
_MOST = {"keep": 1.0, "target_ratio": 1.0, "availability": 1.0, "boot_s": 3600.0}


def _check(options: dict[str, Any]) -> None:
    """CommandError names the option that is out of range, before anything is read."""
    for name, (least, may_be) in _LEAST.items():
        value, most = options[name], _MOST.get(name, math.inf)
        if math.isnan(value) or value > most or value < least or (value == least and not may_be):
            lowest = f"at least {least}" if may_be else f"above {least}"
            highest = f" and at most {most:g}" if most < math.inf else ""
            raise CommandError(f"--{name.replace('_', '-')} = {value:g}: must be {lowest}{highest}")


def _setting(options: dict[str, Any], warn: Callable[[str], Any]) -> Setting:
    engine = engine_spec(options["model"], options["gpu"], options["tp"], dtype=options["dtype"])
    slots = options["slots"] or _slots(options, engine)
    until_s = options["hours"] * 3600
    on_demand_usd, spot_usd = _prices(options)
    zones: tuple[Zone, ...] = ()
    if options["spot"]:
        files, left = recordings(options["spot"])
        for file in left:
            warn(
                f"--spot: {file.name} does not say how many machines there were; name the file to have it read"
            )
        reading = Reading(spot_usd, options["zone_machines"], on_demand_usd, options["instance"] or "")
        zones = unlike([(file, zone) for file in files for zone in read_market(file, reading)])
        if not zones:
            raise CommandError(
                "--spot: no recording of capacity (*.json, or *.csv of counts or events) there"
            )
        until_s = min(until_s, *(zone.end_s for zone in zones))
    terms = Terms(
        options["boot_s"],
        options["notice_s"],
        on_demand_usd,
        tick_s=15,
        n_reserve=options["reserve"],
        resume_s=options["resume_s"],
        stopped_usd_per_h=options["stopped_usd"],
    )
    return Setting(
        engine,
        slots,
        options["replicas"],
        options["ttft_s"],
        zones,
        terms,
        options["max_machines"],
        options["target_ratio"],
        until_s,
    )


def _prices(options: dict[str, Any]) -> tuple[float, Callable[[str], float]]:
    """USD an hour on demand, and as spot by the zone's name."""
    if options["prices"] is None:
        return options["on_demand_usd"], lambda zone: float(options["spot_usd"])
    if not options["instance"]:
        raise CommandError("--prices: name the machine type with --instance")
    listed = read_prices(options["prices"], options["instance"], options["tp"])

    def spot(zone: str) -> float:
        usd = listed.spot_in(zone)
        return options["spot_usd"] if usd is None else usd  # a list may know on-demand prices only

    return options["on_demand_usd"] if listed.on_demand is None else listed.on_demand, spot


def _bound(setting: Setting, result: Result, availability: float) -> float:
    if result.demand is None:
        raise ValueError("--oracle: bounds what a market costs; give one with --spot")
    return bound_of(setting, result.demand, availability).usd


def _slots(options: dict[str, Any], engine: EngineSpec) -> int:
    """Slots for the mean of the first requests, as the profile of a deployment would be compiled."""
    sample = list(itertools.islice(_load(options, 0), _SAMPLE))
    if not sample:
        raise CommandError("the workload has no request in the chosen span")
    mix = Mix(statistics.fmean(j.n_prompt for j in sample), statistics.fmean(j.n_output for j in sample))
    return capacity(engine.step, engine.kv_tokens, mix, options["itl_s"], engine.max_seqs).slots


def _span(setting: Setting, options: dict[str, Any], seed: int) -> Setting:
    """Each seed sees another span of the market; the first sees its beginning."""
    if not setting.zones or not math.isfinite(setting.until_s):
        return setting
    start_s = 0.0 if seed == 0 else random.Random(seed).random() * min(zone.end_s for zone in setting.zones)
    return replace(setting, zones=tuple(zone.window(start_s, setting.until_s) for zone in setting.zones))


def _load(options: dict[str, Any], seed: int) -> Iterator[Job]:
    start_s = options["start_h"] * 3600
    until_s = start_s + options["hours"] * 3600
    if (options["requests"] is None) == (options["rates"] is None):
        raise CommandError("give either --requests or --rates")
    if options["requests"] is not None:
        found = read_requests(options["requests"], start_s=start_s, until_s=until_s)
        if options["keep"] < 1:
            found = thin(found, options["keep"], seed)
        return jobs(found, speed=options["speed"])
    lengths = options["lengths"] or Path(str(options["rates"]).replace("_rates", "_lengths"))
    if options["lengths"] is None and not lengths.is_file():
        raise CommandError(
            f"--lengths: no {lengths.name} beside {options['rates'].name}; name a file of lengths"
        )
    return jobs(
        arrivals(
            read_rates(options["rates"]),
            read_lengths(lengths),
            keep=options["keep"],
            seed=seed,
            start_s=start_s,
            until_s=until_s,
        )
    )


def _assumptions(options: dict[str, Any], setting: Setting) -> dict[str, str]:
    found = {
        "workload": f"{(options['requests'] or options['rates']).name}, share kept {options['keep']:g}, "
        f"speed {options['speed']:g}",
        "replica": f"{told(options['model'], options['gpu'], options['tp'], dtype=options['dtype'])}, "
        f"{setting.engine.kv_tokens:,} tokens of KV, {setting.slots} slots",
        "target": f"first token within {setting.ttft_target_s:g} s",
    }
    if setting.zones:
        spot_usd = sorted({round(zone.usd_per_h, 4) for zone in setting.zones})
        found["market"] = (
            f"{len(setting.zones)} zones, {options['zone_machines']} machines where one was probed, spot "
            f"{spot_usd[0]:g}{f' to {spot_usd[-1]:g}' if len(spot_usd) > 1 else ''}, on-demand "
            f"{setting.terms.on_demand_usd_per_h:g} USD/h, boot {setting.terms.boot_s:g} s, notice "
            f"{setting.terms.notice_s:g} s, {round(setting.until_s / 3600, 1):g} h"
        )
        kept = setting.terms
        if kept.n_reserve:
            found["reserve"] = (
                f"{kept.n_reserve} stopped on-demand machines, {kept.stopped_usd_per_h:g} USD/h each, serving "
                f"{kept.resume_s:g} s after an order"
            )
    else:
        found["market"] = f"none: {setting.replicas} replicas are there"
    return found
