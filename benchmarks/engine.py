"""`manage.py bench engine`: the same vLLM behind Corral and behind its own API server.

One private stack and one `vllm.entrypoints.openai.api_server` on the same computer: same wheel, environment, engine
settings, model files, prompts and clients. They take turns in pairs, each pair with prompts nobody has seen, the first
of a pair changing; while one is measured all processes of the other stand still (SIGSTOP). Every figure is the median
of `repeats` pairs with minimum and maximum, which for 7 pairs enclose the true median with 98 % confidence.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import cpu
from benchmarks.loadgen import Plan
from benchmarks.stack import ROOT, BenchStack, bench_stack
from benchmarks.stats import summary
from benchmarks.vllmserver import vllm_server
from controlplane.deployments.importing import DEMO_PACKAGE, store
from workers.engine.base import EngineProfile

CORRAL, VLLM = "corral", "vllm"
RUN_LIMIT_S = 120.0
N_AGAIN = 2  # requests at one connection that come before those and are not counted
ALONE_TOKENS = 6
PROMPT_WORDS = 40


@dataclass(frozen=True)
class Case:
    """A model and the load it is put under. `rounds`: answers per stream and half of a pair. Answers have between half
    and one and a half times `n_tokens`, so that streams do not end all at once."""

    name: str
    source: str
    n_streams: int
    n_tokens: int
    rounds: int
    n_alone: int  # requests of a half at one connection
    profile: EngineProfile
    ratio_at_least: float


@dataclass(frozen=True)
class Side:
    """One of the two: where it listens, what keeps the other from running, and its processes by group."""

    name: str
    port: int
    other_still: Callable[[], AbstractContextManager[None]]
    processes: Callable[[], dict[str, list[int]]]


CASES = (
    Case(
        "tiny", "tiny", 64, 128, 3, 40,
        EngineProfile(max_model_len=512, max_num_seqs=64, max_num_batched_tokens=2048),
        1.0,
    ),
    Case(
        "smollm2", f"package:{DEMO_PACKAGE}", 16, 32, 2, 8,
        EngineProfile(max_model_len=1024, max_num_seqs=32, max_num_batched_tokens=2048, kv_cache_bytes=512 << 20),
        0.97,
    ),
)  # fmt: skip
TTFT_MORE_MS = 3.0
CPU = "cpu_us_per_token_"


def measure(
    *, repeats: int = 7, only: str | None = None, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """All cases; returns the report that `--json` prints. RuntimeError when a side does not answer every request."""
    cases = [case for case in CASES if not only or only in case.name]
    progress("starting a private stack with vLLM")
    found = {}
    with bench_stack("vllm", demo="toy") as stack:
        for case in cases:
            found[case.name] = _case(stack, case, repeats, progress)
    report: dict[str, Any] = {
        "assumptions": {
            "engine": "vLLM on CPU, float32, eager, prefix caching, priority scheduling, one OMP thread, on both sides",
            "corral": "the whole product: limits, fair queue, journal, metering; service class flex (vLLM's server "
                      "promises nothing in time either)",
            "vllm": "vllm.entrypoints.openai.api_server, statistics and access log off",
            "load": "streamed chat completions, greedy, ignore_eos, unique prompts, the same on both sides of a pair",
            "ttft": "from sending the request to the first event with text, which may be a later token's: a model of "
                    "random weights makes pieces of characters",
            "fairness": "while one side is measured every process of the other is stopped",
            "repeats": repeats,
        },
        "cases": found,
    }  # fmt: skip
    report["goals"] = goals({case.name: case for case in cases}, found)
    return report


def _case(stack: BenchStack, case: Case, repeats: int, progress: Callable[[str], None]) -> dict[str, Any]:
    model = f"engine-{case.name}"
    knobs = [f"--profile={name}={json.dumps(value)}" for name, value in case.profile.to_json().items()
             if value is not None and value != getattr(EngineProfile(), name)]  # fmt: skip
    deploy = ("deploy", model, "--model", case.source, "--max", "1", "--slo", "flex", *knobs)
    progress(f"{case.name}: importing the model")
    digest = stack_json(stack, *deploy, "--min", "1")["model_digest"]
    api_key = str(stack.manage_json("create_key", f"engine-{case.name}")["api_key"])
    progress(f"{case.name}: starting vLLM's own server and a replica")
    with vllm_server(
        case.profile, store(stack.var).path(digest), model, stack.var / f"vllm-{case.name}.log"
    ) as server:
        stack.manage("ask", "ready?", "--model", model, timeout_s=240)
        sides = (
            Side(CORRAL, stack.port, server.still, stack.processes),
            Side(VLLM, server.port, stack.still, lambda: {"server": server.pids()}),
        )
        pairs = []
        for number in range(-1, repeats):  # the first is not counted
            pair = _pair(case, model, sides, api_key, number)
            progress(
                f"{case.name}, " + (f"pair {number + 1} of {repeats}" if number >= 0 else "warm-up") + ": "
                + ", ".join(f"{side} {pair[side]['tokens_per_s']:.0f} tokens/s, TTFT {pair[side]['ttft_ms']:.1f} ms"
                            for side in (CORRAL, VLLM))
            )  # fmt: skip
            if number >= 0:
                pairs.append(pair)
    # Gone before the next case: all share the same cores.
    stack.manage(*deploy, "--min", "0", "--idle-timeout-s", "0")
    return {
        "streams": case.n_streams,
        "tokens_per_answer": case.n_tokens,
        "answers_per_half": case.n_streams * case.rounds,
        **compare(pairs),
    }


def stack_json(stack: BenchStack, *args: str) -> dict[str, Any]:
    """Answer of a set-up command that may import a model first."""
    return dict(json.loads(stack.manage(*args, "--json", timeout_s=300)))


def _pair(
    case: Case, model: str, sides: tuple[Side, ...], api_key: str, number: int
) -> dict[str, dict[str, float]]:
    """Both sides with the same prompts."""
    n_many = case.n_streams * case.rounds
    many = bodies(model, n_many, case.n_tokens, f"{case.name} {number} many")
    alone = bodies(model, case.n_alone + N_AGAIN, ALONE_TOKENS, f"{case.name} {number} alone")
    found = {}
    for side in sides if number % 2 == 0 else reversed(sides):
        with side.other_still():
            single = _send(side.port, api_key, alone, 1, N_AGAIN)
            groups = with_core_apart(side.processes())
            before = cpu.snapshot(groups)
            crowd = _send(side.port, api_key, many, case.n_streams)
            used = cpu.spent(before, cpu.snapshot(groups))
        found[side.name] = {
            "tokens_per_s": crowd["n_tokens"] / crowd["wall_s"],
            "ttft_ms": statistics.median(single["first_text_ms"]),
            "crowd_ttft_ms": statistics.median(crowd["first_text_ms"]),
            **{f"{CPU}{group}": 1e6 * seconds / crowd["n_tokens"] for group, seconds in used.items()},
        }
    return found


def with_core_apart(groups: dict[str, list[int]]) -> dict[str, list[int]]:
    """The groups without vLLM's engine core, which is a group of its own."""
    cores = [pid for pids in groups.values() for pid in pids if _title(pid).startswith("VLLM::EngineCore")]
    return {"engine_core": cores} | {
        name: [pid for pid in pids if pid not in cores] for name, pids in groups.items()
    }


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def bodies(model: str, n: int, n_tokens: int, seed: str) -> list[str]:
    """`n` requests whose prompts share no beginning, so that no side finds anything cached. Their answers have
    `n_tokens` on average: each is as much longer as another is shorter."""
    dice = random.Random(seed)
    more = [dice.randint(0, n_tokens // 2) for _ in range(n // 2)]
    lengths = [n_tokens + each for each in more] + [n_tokens] * (n % 2) + [n_tokens - each for each in more]
    dice.shuffle(lengths)
    return [
        json.dumps({
            "model": model, "stream": True, "stream_options": {"include_usage": True}, "temperature": 0,
            "max_tokens": length, "ignore_eos": True,
            "messages": [{"role": "user", "content": " ".join(
                "".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=dice.randint(2, 8)))
                for _ in range(PROMPT_WORDS)
            )}],
        })
        for length in lengths
    ]  # fmt: skip


def _send(port: int, api_key: str, texts: list[str], n_connections: int, n_warmup: int = 0) -> dict[str, Any]:
    """Sends all; the load generator's tally of all but `n_warmup`. RuntimeError unless each was answered in full."""
    n_requests = len(texts) - n_warmup
    n_tokens = sum(json.loads(text)["max_tokens"] for text in texts[n_warmup:])
    plan = Plan(
        host="127.0.0.1", port=port, path="/v1/chat/completions", headers={"authorization": f"Bearer {api_key}"},
        bodies=texts, n_connections=n_connections, n_requests=n_requests, stream=True, limit_s=RUN_LIMIT_S,
        n_warmup=n_warmup,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loadgen"], cwd=ROOT, capture_output=True, text=True, check=True,
        input=f"{json.dumps(asdict(plan))}\ngo\n", timeout=RUN_LIMIT_S + 30,
    )  # fmt: skip
    tally = dict(json.loads(done.stdout.splitlines()[-1]))
    if tally["errors"] or tally["n_tokens"] != n_tokens:
        raise RuntimeError(
            f"port {port}: {tally['n_tokens']} of {n_tokens} tokens came; "
            f"answers {tally['statuses']}, {tally['errors'][:3]}"
        )
    return tally


def compare(pairs: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians of both sides, and of each pair's ratio and difference."""
    return {
        **{
            side: {name: summary([pair[side][name] for pair in pairs], 1) for name in pairs[0][side]}
            for side in (CORRAL, VLLM)
        },
        "throughput_ratio": summary(
            [pair[CORRAL]["tokens_per_s"] / pair[VLLM]["tokens_per_s"] for pair in pairs]
        ),
        "ttft_more_ms": summary([pair[CORRAL]["ttft_ms"] - pair[VLLM]["ttft_ms"] for pair in pairs], 2),
    }


def goals(cases: dict[str, Case], found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each figure beside what it must be; the median counts."""
    rows = []
    for name, figures in found.items():
        ratio, more = figures["throughput_ratio"]["median"], figures["ttft_more_ms"]["median"]
        least = cases[name].ratio_at_least
        rows += [
            {"figure": f"{name}: throughput, Corral / vLLM's own server", "is": ratio, "goal": f">= {least:g}",
             "reached": ratio >= least},
            {"figure": f"{name}: TTFT at one connection, ms more", "is": more, "goal": f"<= {TTFT_MORE_MS:g}",
             "reached": more <= TTFT_MORE_MS},
        ]  # fmt: skip
    return rows


def as_text(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    lines = [f"{key}: {value}" for key, value in report["assumptions"].items()]
    for name, case in report["cases"].items():
        lines += [
            "",
            f"{name}: {case['streams']} streams, answers of {case['tokens_per_answer']} tokens on average",
        ]
        for figure, title in (
            ("tokens_per_s", "tokens/s"),
            ("ttft_ms", "TTFT at one connection, ms"),
            ("crowd_ttft_ms", "TTFT of all streams at once, ms"),
        ):
            lines.append(
                f"  {title:<34}"
                + "   ".join(f"{side} {_span(case[side][figure])}" for side in (CORRAL, VLLM))
            )
        for side in (CORRAL, VLLM):
            spent = {
                name.removeprefix(CPU): figure["median"] for name, figure in case[side].items() if CPU in name
            }
            parts = ", ".join(f"{name.replace('_', ' ')} {us:.0f}" for name, us in spent.items() if us >= 0.5)
            lines.append(f"  {f'CPU µs per token, {side}':<34}{sum(spent.values()):.0f}: {parts}")
        lines.append(f"  {'throughput ratio':<34}{_span(case['throughput_ratio'])}")
        lines.append(f"  {'TTFT more, ms':<34}{_span(case['ttft_more_ms'])}")
    lines.append("")
    for goal in report["goals"]:
        verdict = "reached" if goal["reached"] else "NOT reached"
        lines.append(f"{goal['figure']}: {goal['is']:g} (goal {goal['goal']}): {verdict}")
    return "\n".join(lines)


def _span(figure: dict[str, float]) -> str:
    return f"{figure['median']:g} ({figure['min']:g} to {figure['max']:g}, n={figure['n']})"
