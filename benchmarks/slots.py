"""`manage.py bench slots`: gaps between tokens, throughput and the engine's own queue, with slots that stand still and
with slots that follow the promise.

Starts the whole product with the toy engine, whose steps take 10 ms and 3 ms more per running request, and sends 72
clients that always want an answer. `high`: a class that promises nothing in time, so all 64 slots stay; `best`: as
many as keep to 100 ms, known beforehand; `adaptive`: 64 slots and a promise of 100 ms. Every figure is the median of
`repeats` runs with minimum and maximum; a first part of each run is not counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import redis

from benchmarks.stack import ROOT, BenchStack, bench_stack
from benchmarks.stats import quantile, summary
from benchmarks.streams import StreamPlan
from controlplane import ids
from infra.local.environment import SAVED
from infra.local.privatefile import read_json
from workers.contract import Heartbeat
from workers.keys import CellKeys

TARGET_MS = 100  # of the class `interactive`
N_CLIENTS, N_TOKENS = 72, 32
WARM_S, SECONDS = 20.0, 20.0
SAMPLES_PER_S = 4


@dataclass(frozen=True)
class Arm:
    """A deployment of the same engine."""

    name: str
    max_num_seqs: int
    slo: str


ARMS = (
    Arm("high", 64, "flex"),
    Arm("best", 28, "flex"),
    Arm("adaptive", 64, "interactive"),
)


def measure(*, repeats: int = 3, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """All arms, interleaved; returns the report that `--json` prints."""
    progress("starting a private stack with the toy engine")
    with bench_stack("toy") as stack:
        key = stack.manage_json(
            "create_key", "bench", "--rpm", "100000000", "--input-tpm", "2000000000", "--output-tpm", "2000000000",
            "--max-concurrency", "100000", "--budget", "1000000", "--limit-all",
        )  # fmt: skip
        runs: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in ARMS}
        for number in range(repeats):
            for arm in ARMS:
                runs[arm.name].append(_run(stack, arm, number, str(key["api_key"])))
                figures = {name: value for name, value in runs[arm.name][-1].items() if name != "why"}
                progress(f"run {number + 1} of {repeats}, {arm.name}: {figures}")
    report: dict[str, Any] = {
        "assumptions": {
            "engine": "toy, 10 ms a step and 3 ms more per running request", "target_ms": TARGET_MS,
            "clients": N_CLIENTS, "tokens_per_answer": N_TOKENS, "warm_s": WARM_S, "seconds": SECONDS,
            "repeats": repeats, "gaps": "between SSE events as the client sees them; engine: between steps",
        },
        "arms": {arm.name: _report(arm, runs[arm.name]) for arm in ARMS},
    }  # fmt: skip
    report["goals"] = _goals(report["arms"])
    return report


def _run(stack: BenchStack, arm: Arm, number: int, api_key: str) -> dict[str, Any]:
    """A fresh deployment for every run, so that each begins with all slots and nothing learned."""
    model = f"slots-{arm.name}-{number}"
    deploy = (
        "deploy", model, "--model", "toy", "--max", "1", "--slo", arm.slo,
        "--profile", f"max_num_seqs={arm.max_num_seqs}", "--profile", "toy_step_ms=10", "--profile", "toy_seq_ms=3",
    )  # fmt: skip
    deployment = ids.from_text(ids.Prefix.DEPLOYMENT, stack.manage_json(*deploy, "--min", "1")["id"])
    stack.manage("ask", "ready?", "--model", model)
    bodies = [
        json.dumps({
            "model": model, "stream": True, "ignore_eos": True, "max_tokens": N_TOKENS,
            "messages": [{"role": "user", "content": f"Question {n} about cattle"}],
        })
        for n in range(1000)
    ]  # fmt: skip
    plan = StreamPlan(stack.port, api_key, bodies, N_CLIENTS, WARM_S, SECONDS)
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.streams"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(asdict(plan)) + "\n")
        process.stdin.flush()
        if process.stdout.readline().strip() != "warm":
            raise RuntimeError("the streaming clients ended early")
        samples = _sample(stack, deployment.hex, process)
        tally = json.loads(process.stdout.readline())
    # Gone before the next arm: all of them share two cores.
    stack.manage(*deploy, "--min", "0", "--idle-timeout-s", "0")
    return {
        "itl_p50_ms": tally["gap_p50_ms"],
        "itl_p95_ms": tally["gap_p95_ms"],
        "engine_itl_p95_ms": quantile([beat.itl_p95_ms for beat in samples.beats], 0.5),
        "ttft_p50_ms": tally["first_p50_ms"],
        "tokens_per_s": tally["n_tokens"] / tally["wall_s"],
        "engine_queue": sum(beat.engine_queue for beat in samples.beats) / max(len(samples.beats), 1),
        "slots": quantile([float(n) for n in samples.slots], 0.5),
        "n_refused": tally["n_refused"],
        "why": samples.why,
    }


@dataclass(frozen=True)
class _Samples:
    beats: list[Heartbeat]
    slots: list[int]
    why: str


def _sample(stack: BenchStack, deployment: str, process: subprocess.Popen[str]) -> _Samples:
    """Heartbeats and slots of the deployment's replica while the load runs; each beat once."""
    saved = read_json(stack.var / SAVED) or {}
    client: Any = redis.Redis.from_url(str(saved["CORRAL_REDIS_URL"]), socket_timeout=2)
    keys = CellKeys(str(saved["CORRAL_CELL"]))
    beats: dict[int, Heartbeat] = {}
    slots: list[int] = []
    why = ""
    end_s = time.monotonic() + SECONDS
    while time.monotonic() < end_s and process.poll() is None:
        for rid in client.smembers(keys.replicas(deployment)):
            mid, given, reason = client.hmget(keys.replica(rid.decode()), "mid", "slots", "why")
            payload = client.get(keys.machine(mid.decode()).heartbeat(rid.decode())) if mid else None
            if payload is not None:
                beat = msgspec.json.decode(payload, type=Heartbeat)
                beats[beat.seq] = beat
                slots.append(int(given))
                why = (reason or b"").decode()
        time.sleep(1 / SAMPLES_PER_S)
    client.close()
    return _Samples(list(beats.values()), slots, why)


_FIGURES = (
    "itl_p50_ms",
    "itl_p95_ms",
    "engine_itl_p95_ms",
    "ttft_p50_ms",
    "tokens_per_s",
    "engine_queue",
    "slots",
)


def _report(arm: Arm, runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "max_num_seqs": arm.max_num_seqs,
        "slo": arm.slo,
        **{name: summary([run[name] for run in runs], 1) for name in _FIGURES},
        "refused": sum(run["n_refused"] for run in runs),
        "why": runs[-1]["why"],
    }


def _goals(arms: dict[str, Any]) -> list[dict[str, Any]]:
    adaptive = {name: arms["adaptive"][name]["median"] for name in _FIGURES}
    share = adaptive["tokens_per_s"] / max(arms["best"]["tokens_per_s"]["median"], 1e-9)
    wanted = (
        ("95 % of gaps, ms", adaptive["itl_p95_ms"], "<=", float(TARGET_MS)),
        ("throughput as a share of the best standing slots", round(share, 3), ">=", 0.85),
        ("requests in the engine's own queue", adaptive["engine_queue"], "<=", 1.0),
    )
    return [
        {"figure": name, "is": value, "goal": f"{sign} {goal:g}",
         "reached": value <= goal if sign == "<=" else value >= goal}
        for name, value, sign, goal in wanted
    ]  # fmt: skip


def as_text(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    heads = ("slots", "gap p50", "gap p95", "engine p95", "tokens/s", "engine queue", "TTFT p50")
    names = (
        "slots",
        "itl_p50_ms",
        "itl_p95_ms",
        "engine_itl_p95_ms",
        "tokens_per_s",
        "engine_queue",
        "ttft_p50_ms",
    )
    lines = [f"{'':<10}" + "".join(f"{head:>14}" for head in heads)]
    for arm, figures in report["arms"].items():
        lines.append(f"{arm:<10}" + "".join(f"{figures[name]['median']:>14.1f}" for name in names))
    lines.append("")
    lines += [f"adaptive: {report['arms']['adaptive']['why']}", ""]
    for goal in report["goals"]:
        verdict = "reached" if goal["reached"] else "NOT reached"
        lines.append(f"{goal['figure']}: {goal['is']} (goal {goal['goal']}): {verdict}")
    return "\n".join(lines)
