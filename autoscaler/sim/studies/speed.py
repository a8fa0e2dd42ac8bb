"""How fast the simulator is, whether a seed repeats it, and whether thinning keeps what it should."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import replace
from typing import Any

from autoscaler.sim import scenario
from autoscaler.sim.policies import CORRAL
from autoscaler.sim.replicas import engine_spec
from autoscaler.sim.scenario import Result, Setting
from autoscaler.sim.statistics import interval
from autoscaler.sim.studies.base import Column, Goal, Progress, Study, Table
from autoscaler.sim.workload import jobs, read_requests, thin

HELP = "simulated requests per CPU second; equal seeds, equal results; thinned load against the whole hour"
_REPLICAS = 16
_GOAL_PER_CPU_S = 5000


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--keep", type=float, default=0.25, help="share of the thinned runs (default 0.25)")


def run(options: dict[str, Any], progress: Progress) -> Study:
    path = options["traces"] / "requests" / "azure_llm_2023_conv.csv"
    engine = engine_spec("llama-3.1-8b", "h100_sxm")
    setting = Setting(engine, 64, _REPLICAS, ttft_target_s=2.0)
    whole: list[Result] = []
    for seed in range(options["seeds"]):
        whole.append(
            scenario.run(setting, CORRAL, jobs(read_requests(path)), label=f"whole hour, run {seed}")
        )
        progress(f"whole hour, run {seed}: {whole[-1].requests_per_cpu_s:,.0f} requests per CPU second")
    keep = options["keep"]
    fewer = replace(setting, replicas=max(round(_REPLICAS * keep), 1))
    thinned = []
    for seed in range(options["seeds"]):
        thinned.append(
            scenario.run(fewer, CORRAL, jobs(thin(read_requests(path), keep, seed)), label=f"thinned, {seed}")
        )
        progress(f"thinned, seed {seed}")
    return _study(whole, thinned, setting, keep)


def _study(whole: list[Result], thinned: list[Result], setting: Setting, keep: float) -> Study:
    speed = interval([r.requests_per_cpu_s for r in whole])
    n_different = sum(_facts(r) != _facts(whole[0]) for r in whole)
    columns = [Column("quantity"), Column("whole hour", "{:.5g}"), Column("thinned", "{:.5g}")]
    rows = [
        [title, getattr(whole[0], name), interval([getattr(r, name) for r in thinned])]
        for title, name in (
            ("requests", "n_requests"),
            ("TTFT p50 (s)", "ttft_p50_s"),
            ("TTFT p99 (s)", "ttft_p99_s"),
            ("inter-token p50 (s)", "itl_p50_s"),
            ("inter-token p99 (s)", "itl_p99_s"),
            ("mean latency (s)", "latency_mean_s"),
        )
    ]
    return Study(
        "Speed of the simulator",
        {
            "workload": f"azure_llm_2023_conv.csv, the whole hour; thinned: each request kept with chance {keep:g}",
            "house": f"{setting.replicas} replicas of llama-3.1-8b on one h100_sxm, {setting.slots} slots; thinned: "
            f"{keep:g} of them",
            "policies": "production bundle, all invariants checked at every event",
            "runs": f"{len(whole)} each; thinned ones with different seeds",
        },
        [
            Table("Speed", [Column("requests per CPU second", "{:,.0f}")], [[speed]]),
            Table("The thinning rule against the whole hour", columns, rows),
        ],
        [
            Goal(
                f"at least {_GOAL_PER_CPU_S:,} simulated requests per CPU second",
                f"{speed.mean:,.0f} ± {speed.half:,.0f}",
                speed.low >= _GOAL_PER_CPU_S,
            ),
            Goal("equal runs give equal results", f"{n_different} of {len(whole)} differ", n_different == 0),
        ],
    )


def _facts(result: Result) -> dict[str, Any]:
    """All but what the machine's own speed decides; as text, so that a missing figure equals itself."""
    own = {"cpu_s", "requests_per_cpu_s"}
    return {name: repr(value) for name, value in result.figures().items() if name not in own}
