"""`manage.py bench delay`: gaps between tokens when the machines are far from Redis.

Starts the whole product with the toy engine; everything its machine says to Redis passes a proxy that delivers each
byte so much later, in both directions. Streams run all the time; arms take turns. Every flush of an engine step waits
for a round trip, but none for the one before it, so a far Redis delays an answer and does not slow it down. Figures
are the median of `repeats` runs with minimum and maximum.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.delayproxy import Address, DelayProxy
from benchmarks.stack import ROOT, BenchStack, bench_stack
from benchmarks.stats import quantile, summary
from benchmarks.streams import StreamPlan
from infra.local.environment import SAVED
from infra.local.privatefile import read_json

STEP_MS, MORE_MS = 20.0, 5.0
DELAYS_MS = (0.0, 20.0, 40.0)  # each way
N_STREAMS, N_TOKENS = 64, 100
WARM_S, SECONDS = 4.0, 12.0
FIGURES = ("gap_p50_ms", "gap_p95_ms", "gap_p99_ms", "first_p50_ms", "engine_gap_p95_ms", "tokens_per_s")


def measure(*, repeats: int = 3, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """All delays; returns the report that `--json` prints."""
    progress("starting a private stack with the toy engine behind a proxy")
    var: list[Path] = []

    def env_of(directory: Path) -> dict[str, str]:
        var.append(directory)
        return {"CORRAL_MACHINE_REDIS": f"127.0.0.1:{proxy.port}"}

    with DelayProxy(lambda: _redis(var[0]), 0) as proxy, bench_stack("toy", env_of=env_of) as stack:
        stack.manage(
            "deploy", "delay", "--model", "toy", "--min", "1", "--max", "1", "--slo", "standard",
            f"--profile=max_num_seqs={N_STREAMS}", f"--profile=toy_step_ms={STEP_MS}",
        )  # fmt: skip
        stack.manage("ask", "ready?", "--model", "delay")
        runs: dict[float, list[dict[str, float]]] = {delay: [] for delay in DELAYS_MS}
        for number in range(repeats):
            for delay in DELAYS_MS:
                proxy.delay_ms = delay
                runs[delay].append(_run(stack))
                seen = ", ".join(f"{name} {value:.1f}" for name, value in runs[delay][-1].items())
                progress(f"run {number + 1} of {repeats}, {delay:g} ms each way: {seen}")
        n_bytes = proxy.n_bytes
    if not n_bytes:
        raise RuntimeError("nothing passed the proxy: the machine did not take its Redis address")
    report: dict[str, Any] = {
        "assumptions": {
            "engine": f"toy, {STEP_MS:g} ms a step", "streams": N_STREAMS, "tokens_per_answer": N_TOKENS,
            "warm_s": WARM_S, "seconds": SECONDS, "repeats": repeats,
            "delay": "added to every byte between the machine (agent and replica) and Redis, in each direction",
            "gaps": "between SSE events as the client sees them; engine: between its steps",
        },
        "arms": {f"{delay:g}": {name: summary([run[name] for run in runs[delay]], 1) for name in FIGURES}
                 for delay in DELAYS_MS},
    }  # fmt: skip
    report["goals"] = goals(report["arms"])
    return report


def _redis(var: Path) -> Address:
    """Where the stack's Redis listens, once it does."""
    address = urlsplit(str((read_json(var / SAVED) or {})["CORRAL_REDIS_URL"]))
    return str(address.hostname), int(address.port or 6379)


def _run(stack: BenchStack) -> dict[str, float]:
    bodies = [
        json.dumps({
            "model": "delay", "stream": True, "ignore_eos": True, "max_tokens": N_TOKENS,
            "messages": [{"role": "user", "content": f"Question {n} about cattle"}],
        })
        for n in range(500)
    ]  # fmt: skip
    plan = StreamPlan(stack.port, stack.facts.api_key, bodies, N_STREAMS, WARM_S, SECONDS)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.streams"], cwd=ROOT, input=json.dumps(asdict(plan)) + "\n",
        capture_output=True, text=True, check=True, timeout=WARM_S + SECONDS + 60,
    )  # fmt: skip
    seen = json.loads(done.stdout.splitlines()[-1])
    if seen["n_refused"] or not seen["n_tokens"]:
        raise RuntimeError(f"{seen['n_refused']} requests refused, {seen['n_tokens']} tokens")
    engine = quantile([beat.itl_p95_ms for beat in stack.heartbeats() if beat.itl_p95_ms], 0.5)
    return {name: seen[name] for name in FIGURES if name in seen} | {
        "engine_gap_p95_ms": engine,
        "tokens_per_s": seen["n_tokens"] / seen["wall_s"],
    }


def goals(arms: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether a far Redis left the gaps alone: against the engine's step, and against a Redis near by (what a busy
    computer adds to both)."""
    rows = []
    for delay, arm in arms.items():
        if delay == "0":
            continue
        gap_ms = arm["gap_p99_ms"]["median"]
        more_ms = round(gap_ms - arms["0"]["gap_p99_ms"]["median"], 1)
        what = f"gap between tokens, 99 %, with {delay} ms each way, ms"
        rows += [
            {"figure": what, "is": gap_ms, "goal": f"<= {STEP_MS + MORE_MS:g}", "reached": gap_ms <= STEP_MS + MORE_MS},
            {"figure": f"{what} more than near by", "is": more_ms, "goal": f"<= {MORE_MS:g}",
             "reached": more_ms <= MORE_MS},
        ]  # fmt: skip
    return rows


def as_text(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    lines = [f"{key}: {value}" for key, value in report["assumptions"].items()]
    heads = ("gap p50", "gap p95", "gap p99", "TTFT p50", "engine gap p95", "tokens/s")
    lines += ["", f"{'added, each way':<18}" + "".join(f"{head:>22}" for head in heads)]
    for delay, arm in report["arms"].items():
        cells = (f"{arm[name]['median']:g} ({arm[name]['min']:g}-{arm[name]['max']:g})" for name in FIGURES)
        lines.append(f"{delay + ' ms':<18}" + "".join(f"{cell:>22}" for cell in cells))
    lines.append("")
    for goal in report["goals"]:
        verdict = "reached" if goal["reached"] else "NOT reached"
        lines.append(f"{goal['figure']}: {goal['is']} (goal {goal['goal']}): {verdict}")
    return "\n".join(lines)
