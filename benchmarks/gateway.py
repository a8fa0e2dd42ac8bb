"""`manage.py bench gateway`: what a request and a streamed event cost, with everything switched on.

Starts the whole product with the toy engine (real continuous batching, no model), sends load from a process of its
own, and reads CPU time from /proc: on-path (gateways, Redis, machine: agent, zygote, front) and off-path (control
worker with intake, Postgres, web) apart. Every figure is the median of `repeats` runs with minimum and maximum.
CPU time, not wall time: other programs on the machine then raise a figure by what they take from the caches, not by
what they take from the clock.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from typing import Any

import psycopg

from benchmarks import cpu
from benchmarks.loadgen import Plan
from benchmarks.memory import PeakMemory
from benchmarks.stack import OFF_PATH, ON_PATH, ROOT, BenchStack, bench_stack
from benchmarks.stats import quantile, summary
from controlplane.gateway.config import GatewayConfig
from infra.local.redis import MAX_MEMORY_MB
from infra.local.stackconfig import StackConfig
from workers.config import ServeTuning
from workers.keys import RETENTION_MS, USAGE_STREAM_MAX

UNPACED, PACED, SLOW = "bench-unpaced", "bench-paced", "bench-slow"
# Name, milliseconds per engine step, tokens per step, service class. The slow one runs all its streams at once: no
# promise of short gaps holds its slots down, and a step computes a hundred prompts.
DEPLOYMENTS = (
    (UNPACED, 0, 2_048, "interactive"),
    (PACED, 10, 2_048, "interactive"),
    (SLOW, 250, 32_768, "batch"),
)
CONTEXT_TOKENS = 32_768
N_GATEWAYS = StackConfig.n_gateways
RUN_LIMIT_S = 300
PROMPT_CHARS = 1000
N_TOKENS = 64
SWITCHED_ON = (
    "API key authentication (HMAC, cache, pub/sub invalidation)",
    "request validation",
    "limits at key, project and organization: requests, input and output tokens per minute, concurrency, money",
    "rate-limit headers on every answer",
    "money holds in shares, drawn down per flush, topped up, settled per request",
    "fair queue with late binding: organization, project, key; bands; locality by prefix; bounded",
    "slots adapted to the promised gap between tokens",
    "Celery queue with acks_late and atomic pop",
    "fenced journal; requests recorded for reconnecting clients (Last-Event-ID, Idempotency-Key)",
    "metering with two witnesses (usage stream, disk spool) into Postgres",
    "append-only log of Redis on disk, fsync every second",
    "heartbeats, watcher, autoscaler ticks",
    "metrics and request logs",
)
_STREAM_BUFFER = next(field.default for field in fields(GatewayConfig) if field.name == "stream_buffer")
# What keeps the memory of many streams bounded, as told with the figure.
BOUNDED_BY = (
    f"gateway: {_STREAM_BUFFER} events wait for a client, then its stream pauses and reads the journal on",
    f"worker: {ServeTuning().max_pending_tokens} tokens wait for a gateway, then generations are held back; "
    f"at most {ServeTuning().flush_depth_far} flushes of {ServeTuning().flush_max_entries} entries are under way",
    f"Redis: a journal holds its request's tokens, for {RETENTION_MS // 60_000} minutes after the end; "
    f"{USAGE_STREAM_MAX} usage events; {MAX_MEMORY_MB} MiB in all, beyond which new requests are refused",
)


@dataclass(frozen=True)
class Scenario:
    """One load shape. `n_tokens` per answer."""

    name: str
    model: str
    n_connections: int
    n_requests: int
    stream: bool
    n_tokens: int = N_TOKENS
    prompt_chars: int = PROMPT_CHARS


SCENARIOS = (
    Scenario("plain_c1", UNPACED, 1, 400, False),
    Scenario("plain_c16", UNPACED, 16, 3000, False),
    Scenario("plain_c64", UNPACED, 64, 3000, False),
    Scenario("stream_unpaced_c16", UNPACED, 16, 800, True),
    Scenario("stream_unpaced_c64", UNPACED, 64, 800, True),
    Scenario("stream_paced_c64", PACED, 64, 64, True, n_tokens=400),
    Scenario("plain_50kb_c16", UNPACED, 16, 600, False, prompt_chars=50_000),
    Scenario("streams_1000", SLOW, 1000, 1000, True, n_tokens=100),
)
# Scenario, figure, at most. Streams that do not all end well end the benchmark.
GOALS = (
    ("plain_c16", "on_path_cpu_ms_per_request", 0.5),
    ("plain_c64", "on_path_cpu_ms_per_request", 0.5),
    ("plain_c16", "gateway_cpu_ms_per_request", 0.2),
    ("plain_c64", "gateway_cpu_ms_per_request", 0.2),
    ("stream_unpaced_c16", "on_path_cpu_us_per_event", 15),
    ("stream_unpaced_c64", "on_path_cpu_us_per_event", 15),
    ("stream_paced_c64", "on_path_cpu_us_per_event", 45),
    ("plain_c1", "latency_p50_ms", 2),
    ("plain_50kb_c16", "on_path_without_tokenising_cpu_ms_per_request", 0.8),
    ("streams_1000", "memory_kib_per_stream", 256),
)


def measure(
    *,
    repeats: int = 7,
    only: str | None = None,
    gateways: int = N_GATEWAYS,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """All scenarios, with so many gateway processes; returns the report that `--json` prints."""
    progress("starting a private stack with the toy engine")
    with bench_stack("toy", env_of=lambda var: {"CORRAL_GATEWAYS": str(gateways)}) as stack:
        api_key = _prepare(stack, progress)
        # Scenarios take turns, so that a slow minute of the machine falls on all of them.
        runs: dict[str, list[dict[str, Any]]] = {s.name: [] for s in SCENARIOS if not only or only in s.name}
        for turn in range(repeats):
            for scenario in SCENARIOS:
                if scenario.name in runs:
                    progress(f"run {turn + 1} of {repeats}: {scenario.name}")
                    runs[scenario.name].append(_run_again(stack, scenario, api_key, progress))
    report: dict[str, Any] = {
        "switched_on": list(SWITCHED_ON),
        "assumptions": {
            "engine": "toy", "gateway_processes": gateways, "prompt_chars": PROMPT_CHARS,
            "tokens_per_answer": N_TOKENS, "streams_1000_tokens_per_s": 4,
            "paced_tokens_per_s": 100, "repeats": repeats,
            "cpu": "user + system time of whole process trees, load generator not counted",
        },
        "scenarios": {s.name: _report(s, runs[s.name]) for s in SCENARIOS if s.name in runs},
    }  # fmt: skip
    report["goals"] = _goals(report["scenarios"])
    return report


def _prepare(stack: BenchStack, progress: Callable[[str], None]) -> str:
    profile = ("--profile", "max_num_seqs=1024", "--profile", "kv_cache_bytes=4294967296",
               "--profile", f"max_model_len={CONTEXT_TOKENS}")  # fmt: skip
    for name, step_ms, step_tokens, slo in DEPLOYMENTS:
        stack.manage(
            "deploy", name, "--model", "toy", "--min", "1", "--max", "1", "--slo", slo,
            *profile, "--profile", f"toy_step_ms={step_ms}",
            "--profile", f"max_num_batched_tokens={step_tokens}",
        )  # fmt: skip
    key = stack.manage_json(
        "create_key", "bench", "--rpm", "100000000", "--input-tpm", "2000000000", "--output-tpm", "2000000000",
        "--max-concurrency", "100000", "--budget", "1000000", "--limit-all",
    )  # fmt: skip
    progress("waiting for the bench replicas")
    for model, *_ in DEPLOYMENTS:
        warm = Scenario("warm", model, 1, 5, False, n_tokens=4)
        _load(stack, warm, str(key["api_key"]), limit_s=60)
    return str(key["api_key"])


def _bodies(scenario: Scenario) -> list[str]:
    bodies = []
    dice = random.Random(scenario.prompt_chars)
    words = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=dice.randint(2, 9))) for _ in range(5000)]
    for i in range(64):
        if scenario.prompt_chars == PROMPT_CHARS:
            prompt = f"Prompt {i} of the bench speaks of cattle. " * 40
        else:
            prompt = f"Prompt {i}: " + " ".join(dice.choices(words, k=scenario.prompt_chars // 3))
        body: dict[str, Any] = {
            "model": scenario.model,
            "messages": [{"role": "user", "content": prompt[: scenario.prompt_chars]}],
            "max_tokens": scenario.n_tokens,
            "ignore_eos": True,
        }
        if scenario.stream:
            body["stream"] = True
        bodies.append(json.dumps(body))
    return bodies


def _load(
    stack: BenchStack, scenario: Scenario, api_key: str, limit_s: float = 120
) -> tuple[dict[str, Any], Any]:
    plan = Plan(
        host="127.0.0.1", port=stack.port, path="/v1/chat/completions",
        headers={"authorization": f"Bearer {api_key}"}, bodies=_bodies(scenario),
        n_connections=scenario.n_connections, n_requests=scenario.n_requests, stream=scenario.stream,
        limit_s=limit_s, n_warmup=0 if scenario.n_tokens > N_TOKENS else 1,
    )  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.loadgen"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(asdict(plan)) + "\n")
        process.stdin.flush()
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError("the load generator could not connect")
        processes = stack.processes()
        before = cpu.snapshot(processes)
        process.stdin.write("go\n")
        process.stdin.flush()
        tally = json.loads(process.stdout.readline())
        after_path = cpu.snapshot(processes)
    return tally, (processes, before, after_path)


def _run_again(
    stack: BenchStack, scenario: Scenario, api_key: str, progress: Callable[[str], None]
) -> dict[str, Any]:
    """A run; once more if requests failed or took too long, as they may on a machine that has other work."""
    try:
        return _run(stack, scenario, api_key)
    except RuntimeError as error:
        progress(f"again, because of {error}")
        return _run(stack, scenario, api_key)


def _run(stack: BenchStack, scenario: Scenario, api_key: str) -> dict[str, Any]:
    n_before = _n_booked(stack)
    tokenised_before = _tokenise_cpu_ms(stack)
    on_path = {name: pids for name, pids in stack.processes().items() if name in ON_PATH}
    with PeakMemory(on_path) as memory:
        tally, (processes, before, after) = _load(stack, scenario, api_key, RUN_LIMIT_S)
    ok = tally["statuses"].get("200", 0)
    if ok != scenario.n_requests or tally["errors"]:
        told = [*tally["errors"], *tally["refusals"]][:3]
        raise RuntimeError(f"{scenario.name}: {tally['statuses']} {told}")
    _wait_until_booked(stack, n_before + ok)
    booked = cpu.snapshot(processes)
    return {
        "tokenised_s": (_tokenise_cpu_ms(stack) - tokenised_before) / 1000,
        "memory_mib": {"before": memory.before, "peak": memory.peak, "after": memory.now()},
        "on": {name: cpu.spent(before, after)[name] for name in ON_PATH},
        "off": {name: cpu.spent(before, booked)[name] for name in OFF_PATH},
        "n": ok,
        "n_events": tally["n_events"],
        "latency_ms": tally["latency_ms"],
        "first_event_ms": tally["first_event_ms"],
        "wall_s": tally["wall_s"],
    }


def _tokenise_cpu_ms(stack: BenchStack, limit_s: float = 10) -> float:
    """CPU time that all replicas have spent on tokenising; waits until each has beaten twice more, so that it counts
    what has ended by now.
    """
    wanted = {beat.replica: beat.seq + 2 for beat in stack.heartbeats()}
    deadline_s = time.monotonic() + limit_s
    while True:
        beats = stack.heartbeats()
        if all(beat.seq >= wanted.get(beat.replica, 0) for beat in beats):
            return sum(beat.tokenise_cpu_ms for beat in beats)
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"a replica has not beaten for {limit_s:.0f} s")
        time.sleep(0.1)


def _n_booked(stack: BenchStack) -> int:
    with psycopg.connect(stack.dsn("operator"), connect_timeout=5) as connection:
        row = connection.execute("SELECT count(*) FROM billing_usageevent").fetchone()
    return int(row[0]) if row else 0


def _wait_until_booked(stack: BenchStack, n: int, limit_s: float = 60) -> None:
    deadline_s = time.monotonic() + limit_s
    while _n_booked(stack) < n:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"intake booked {_n_booked(stack)} of {n} requests in {limit_s:.0f} s")
        time.sleep(0.2)


def _report(scenario: Scenario, runs: list[dict[str, Any]]) -> dict[str, Any]:
    # A streamed event is a delivered token, as rivals send one token per event. When the engine outruns the client
    # we put several into one SSE event; how many is printed, so that the cost per SSE event can be told, too.
    scale, unit = (1e6, "us_per_event") if scenario.stream else (1e3, "ms_per_request")
    per_request = scenario.n_tokens if scenario.stream else 1

    def of(group: str, names: tuple[str, ...]) -> dict[str, float]:
        return summary([sum(r[group][name] for name in names) / (r["n"] * per_request) * scale for r in runs])

    out: dict[str, Any] = {
        "connections": scenario.n_connections,
        "requests_per_run": scenario.n_requests,
        f"on_path_cpu_{unit}": of("on", ON_PATH),
        **{f"{name}_cpu_{unit}": of("on", (name,)) for name in ON_PATH},
        f"off_path_cpu_{unit}": of("off", OFF_PATH),
        "latency_p50_ms": summary([quantile(r["latency_ms"], 0.5) for r in runs]),
        "latency_p99_ms": summary([quantile(r["latency_ms"], 0.99) for r in runs]),
        "requests_per_s": summary([r["n"] / r["wall_s"] for r in runs], 0),
    }
    if not scenario.stream:
        out["tokenising_cpu_ms_per_request"] = summary([r["tokenised_s"] / r["n"] * 1e3 for r in runs])
        out["on_path_without_tokenising_cpu_ms_per_request"] = summary(
            [(sum(r["on"].values()) - r["tokenised_s"]) / r["n"] * 1e3 for r in runs]
        )
    if scenario.n_connections >= 1000:
        out |= _memory(scenario, runs)
    if scenario.stream:
        n_tokens = scenario.n_requests * scenario.n_tokens
        out["events_per_s"] = summary([r["n"] * scenario.n_tokens / r["wall_s"] for r in runs], 0)
        out["tokens_per_sse_event"] = summary([n_tokens / r["n_events"] for r in runs], 2)
        out["ttft_p50_ms"] = summary([quantile(r["first_event_ms"], 0.5) for r in runs])
        out["off_path_cpu_ms_per_request"] = summary([sum(r["off"].values()) / r["n"] * 1e3 for r in runs])
    return out


def _memory(scenario: Scenario, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """MiB by group before, at most during and after the runs, and what a stream took at the peak."""
    grown = [
        sum(r["memory_mib"]["peak"][name] - r["memory_mib"]["before"][name] for name in ON_PATH) for r in runs
    ]
    return {
        "memory_mib": {
            name: {
                when: summary([r["memory_mib"][when][name] for r in runs], 1)
                for when in ("before", "peak", "after")
            }
            for name in ON_PATH
        },
        "memory_kib_per_stream": summary([1024 * mib / scenario.n_connections for mib in grown], 1),
        "memory_bounded_by": list(BOUNDED_BY),
        "streams_at_once": summary([_at_once(run) for run in runs], 0),
    }  # fmt: skip


def _at_once(run: dict[str, Any]) -> int:
    """Most answers that were under way at an instant, all requests having been sent at once."""
    edges = sorted(
        [(ms, 1) for ms in run["first_event_ms"]] + [(ms, -1) for ms in run["latency_ms"]], key=lambda e: e[0]
    )
    return max(accumulate(step for _, step in edges))


def _goals(scenarios: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"scenario": name, "figure": figure, "goal_at_most": goal, "median": scenarios[name][figure]["median"],
         "reached": scenarios[name][figure]["median"] <= goal}
        for name, figure, goal in GOALS if name in scenarios
    ]  # fmt: skip


def as_text(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    lines = ["switched on: " + "; ".join(report["switched_on"]), ""]
    lines.append(f"{'scenario':<20}{'on-path CPU':>22}{'gateway':>10}{'redis':>8}{'machine':>9}{'off-path':>10}"
                 f"{'p50 ms':>9}{'p99 ms':>9}{'req/s':>8}")  # fmt: skip
    for name, s in report["scenarios"].items():
        unit = "us_per_event" if "events_per_s" in s else "ms_per_request"

        def cell(key: str, s: dict[str, Any] = s, unit: str = unit) -> float:
            return float(s[f"{key}_cpu_{unit}"]["median"])

        label = f"{cell('on_path'):.3f} {'µs/event' if unit == 'us_per_event' else 'ms/request'}"
        lines.append(
            f"{name:<20}{label:>22}{cell('gateway'):>10.3f}{cell('redis'):>8.3f}{cell('machine'):>9.3f}"
            f"{cell('off_path'):>10.3f}{s['latency_p50_ms']['median']:>9.2f}{s['latency_p99_ms']['median']:>9.2f}"
            f"{s['requests_per_s']['median']:>8.0f}"
        )
    lines.append("")
    for name, s in report["scenarios"].items():
        if name == "plain_50kb_c16":
            lines.append(
                f"{name}: of it tokenising {s['tokenising_cpu_ms_per_request']['median']:.3f} ms/request"
            )
        if "streams_at_once" in s:
            lines.append(
                f"{name}: {s['streams_at_once']['median']} at once, "
                f"{s['memory_kib_per_stream']['median']} KiB each"
            )
        for group, mib in s.get("memory_mib", {}).items():
            told = ", ".join(f"{when} {mib[when]['median']:.0f} MiB" for when in ("before", "peak", "after"))
            lines.append(f"{name}: memory of {group}: {told}")
        lines += [f"{name}: bounded by {bound}" for bound in s.get("memory_bounded_by", [])]
    lines.append("")
    for goal in report["goals"]:
        verdict = "reached" if goal["reached"] else "NOT reached"
        lines.append(
            f"{goal['scenario']}: {goal['figure']} {goal['median']} (goal ≤ {goal['goal_at_most']}): {verdict}"
        )
    return "\n".join(lines)
