"""`manage.py bench truth`: the simulator replays what the live product was given, and its latencies are compared.

Starts the whole product with one replica of the toy engine (or the tiny vLLM), calibrates a simulated engine from a
run of its own, then sends bursty loads of the recorded kind, open loop. Each load is simulated from its arrivals and
lengths alone, with the calibration made before; quantiles of time to first token and of gaps between tokens, as the
clients saw them, stand beside the simulated ones. Every error is the median of `repeats` loads.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from autoscaler.sim.checkers import Conservation
from autoscaler.sim.enginemodel import EngineSpec
from autoscaler.sim.histogram import Histogram
from autoscaler.sim.job import Job
from autoscaler.sim.kernel import Kernel
from autoscaler.sim.queues import Fair
from autoscaler.sim.routers import LeastLoad
from autoscaler.sim.workload import read_requests
from autoscaler.sim.world import World
from benchmarks.calibration import WARM_UP, Calibrated, calibrate, reads, spread, together
from benchmarks.replay import ReplayPlan, Seen
from benchmarks.stack import ROOT, BenchStack, bench_stack
from controlplane.policy.capacity import Mix, capacity

SECONDS = 35.0  # of a judged load
GOAL = {"p50": 0.10, "p99": 0.15}
LIMIT_S = 30.0
LATER_S = 1e6  # between two runs, on one clock
MIN_TOKENS = 8  # of an answer, for the mean time of its tokens
KV_TOKENS = 1_000_000  # more than all slots can fill: KV is not what is compared here


@dataclass(frozen=True)
class Case:
    """A deployment and the sizes of its requests, in words of the prompt and tokens of the answer. `utilisation`: of
    what the replica can serve at most."""

    model: str
    profile: tuple[str, ...]
    slots: int
    prompt_words: int  # mean
    max_words: int
    answer_tokens: int  # mean
    max_tokens: int
    utilisation: float
    is_judged: bool
    # Of the calibration: answers of requests alone, and of the others, in pairs so far apart that as many as there are
    # slots run together.
    alone_tokens: int
    ramp_tokens: int
    ramp_gap_s: float


CASES = {
    "toy": Case(
        "toy",
        ("toy_step_ms=20", "toy_seq_ms=1", "toy_prefill_ms=20", "max_model_len=4096"),
        slots=16, prompt_words=250, max_words=2000, answer_tokens=40, max_tokens=160,
        utilisation=0.7, is_judged=True, alone_tokens=12, ramp_tokens=160, ramp_gap_s=0.7,
    ),
    "vllm": Case(
        "tiny", ("max_model_len=2048", "max_num_batched_tokens=2048"),
        slots=16, prompt_words=40, max_words=120, answer_tokens=40, max_tokens=120,
        # Its engine computes on the cores that everything else runs on: what it does alone it does not do beside them.
        utilisation=0.35, is_judged=False, alone_tokens=60, ramp_tokens=480, ramp_gap_s=0.2,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    at_s: float
    n_words: int
    n_tokens: int


def measure(
    *,
    repeats: int = 3,
    engine: str = "toy",
    requests: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """One engine, toy or vllm; returns the report that `--json` prints."""
    case = CASES[engine]
    progress(f"starting a private stack with the {case.model} model")
    with bench_stack(engine, demo="toy" if engine == "vllm" else None) as stack:
        stack.manage(
            "deploy", "truth", "--model", case.model, "--min", "1", "--max", "1", "--slo", "flex",
            "--profile", f"max_num_seqs={case.slots}", *(a for p in case.profile for a in ("--profile", p)),
            timeout_s=300,
        )  # fmt: skip
        stack.manage("ask", "ready?", "--model", "truth", timeout_s=240)
        key = stack.manage_json(
            "create_key", "bench", "--rpm", "100000000", "--input-tpm", "2000000000", "--output-tpm", "2000000000",
            "--max-concurrency", "100000", "--budget", "1000000", "--limit-all",
        )  # fmt: skip
        api_key = str(key["api_key"])
        alone, ramp = _calibration_load(case)
        before = _send(stack, api_key, [*alone, *ramp], "calibration")
        first = calibrate(before, len(alone))
        progress(f"calibrated: {_told(first)}")
        per_word = sum(one.n_prompt for one in before) / sum(one.n_words for one in (*alone, *ramp))
        rate = case.utilisation * _most_per_s(case, first, per_word)
        loads = []
        for number in range(repeats):
            load = _load(case, rate, 1000 + number, requests)
            loads.append(_send(stack, api_key, load, f"load {number}"))
            progress(f"load {number + 1} of {repeats} was sent")
        after = _send(stack, api_key, [*alone, *ramp], "calibration, again")
    whole, n_alone = joined(before, after, len(alone))
    found = with_work(calibrate(whole, n_alone), whole[n_alone:], case.slots)
    runs = [compare(seen, found, case.slots) for seen in loads]
    return {
        "assumptions": {
            "engine": f"{case.model}, {', '.join(case.profile)}, {case.slots} slots, class flex",
            "load": f"{rate:.2f} requests/s ({case.utilisation:.0%} of what the replica can serve), "
            f"{SECONDS:g} s each, "
            + (f"span of {requests.name}" if requests else "gamma arrivals, coefficient of variation 1.5"),
            "calibrated": _told(found),
            "before the loads": _told(first),
            "after the loads": _told(calibrate(after, len(alone))),
            "seen": "by clients over HTTP: ttft from sending to the first token; itl between reads of a stream; tpot "
            "from its first to its last token, a token",
            "repeats": repeats,
        },
        "runs": runs,
        **summary_of(runs, case),
    }  # fmt: skip


def _told(found: Calibrated) -> str:
    step = found.step
    return (
        f"step {step.base_s * 1e3:.2f} ms + {(step.seq_s + step.token_s) * 1e3:.3f} ms per request + "
        f"{step.token_s * 1e6:.2f} ms per 1,000 prompt tokens; way {found.way_s * 1e3:.2f} ms, "
        f"flush {found.flush_s * 1e3:.2f} ms"
    )


# -- loads


def _calibration_load(case: Case) -> tuple[list[Request], list[Request]]:
    """Requests alone with short and long prompts; then one more every moment, until all slots are taken, and down. Sent
    before the loads and after them: what else the machine does changes by the minute."""
    sizes = (8, case.prompt_words, case.max_words * 3 // 4)
    alone = [Request(0.2 + 0.9 * n, sizes[n % 3], case.alone_tokens) for n in range(12 + WARM_UP)]
    start_s = alone[-1].at_s + 2.0
    ramp = [
        Request(start_s + case.ramp_gap_s * n, sizes[n % 3], case.ramp_tokens)
        for n in range(case.slots // 2)
        for _ in range(2)
    ]
    return alone, ramp


def joined(before: Sequence[Seen], after: Sequence[Seen], n_alone: int) -> tuple[list[Seen], int]:
    """Both calibration runs as one, and how many of it met an idle engine: those come first."""
    late = [
        replace(one, sent_s=one.sent_s + LATER_S, tokens_s=[at_s + LATER_S for at_s in one.tokens_s])
        for one in after[WARM_UP:]
    ]
    cut = n_alone - WARM_UP
    return [*before[:n_alone], *late[:cut], *before[n_alone:], *late[cut:]], n_alone + cut


def _most_per_s(case: Case, found: Calibrated, tokens_per_word: float = 1.0) -> float:
    mix = Mix(case.prompt_words * tokens_per_word, case.answer_tokens)
    return capacity(found.step, KV_TOKENS, mix, math.inf, case.slots).requests_per_s


def _load(case: Case, rate: float, seed: int, path: Path | None) -> list[Request]:
    """Bursts and sizes of the recorded kind: a span of a request file brought to the rate and the case's mean sizes,
    or, without one, gamma gaps and lognormal sizes alike."""
    dice = random.Random(seed)
    n = int(rate * SECONDS * 3)
    if path is None:
        shape = 1 / 1.5**2
        at_s, raw = 0.0, []
        for _ in range(n):
            at_s += dice.gammavariate(shape, 1 / shape)
            raw.append((at_s, dice.lognormvariate(0, 0.9), dice.lognormvariate(0, 0.8)))
    else:
        whole = list(read_requests(path))
        first = dice.randrange(max(len(whole) - n, 1))
        raw = [(a.at_s, float(a.n_prompt), float(a.n_output)) for a in whole[first : first + n]]
    begin_s = raw[0][0]
    pace = (raw[-1][0] - begin_s) / (len(raw) / rate)
    mean_words, mean_tokens = (statistics.fmean(row[i] for row in raw) for i in (1, 2))
    found = [
        Request(
            0.5 + (at_s - begin_s) / pace,
            min(max(round(words * case.prompt_words / mean_words), 1), case.max_words),
            min(max(round(tokens * case.answer_tokens / mean_tokens), 2), case.max_tokens),
        )
        for at_s, words, tokens in raw
    ]
    return [one for one in found if one.at_s < SECONDS]


def _send(stack: BenchStack, api_key: str, load: Sequence[Request], label: str) -> list[Seen]:
    """What the clients saw. RuntimeError unless every request was answered in full."""
    dice = random.Random(label)
    syllables = [onset + vowel for onset in "bdfghjklmnprstvz" for vowel in "aeio"]
    bodies = [
        (one.at_s, json.dumps({
            "model": "truth", "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
            "temperature": 0, "max_tokens": one.n_tokens,
            "messages": [{"role": "user", "content": " ".join(
                dice.choice(syllables) + dice.choice(syllables) for _ in range(one.n_words))}],
        }))
        for one in load
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="corral-truth-") as folder:
        path = Path(folder) / "seen.jsonl"
        plan = ReplayPlan(stack.port, api_key, str(path), bodies, LIMIT_S)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.replay"],
            cwd=ROOT, input=json.dumps(asdict(plan)) + "\n", capture_output=True, text=True, check=True,
            timeout=load[-1].at_s + 2 * LIMIT_S,
        )  # fmt: skip
        seen = [Seen(**json.loads(line)) for line in path.read_text().splitlines()]
    n_whole = sum(one.is_whole for one in seen)
    if n_whole != len(load):
        statuses = sorted({one.status for one in seen if not one.is_whole})
        raise RuntimeError(f"{label}: {n_whole} of {len(load)} answered ({statuses}) {done.stderr[-500:]}")
    return seen


# -- the same, simulated


class _Gaps(Histogram):
    """Every gap as it is, beside the histogram."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[float, int]] = []

    def add(self, value_s: float, n: int = 1) -> None:
        super().add(value_s, n)
        self.found.append((value_s, n))


class _Firsts:
    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def on_event(self, world: World) -> None:
        pass

    def on_end(self, world: World, job: Job) -> None:
        self.jobs.append(job)


@dataclass(frozen=True)
class Told:
    """What a simulation says of a load, in seconds, without what clients add. By request, in the order given: time to
    the first token, and whether the engine was at work when it came; times per token of answers long enough; gaps
    between flushes, and how often each."""

    ttft_s: Any
    met_work: Any
    tpot_s: Any
    gaps_s: Any
    n_gaps: Any


def simulate(arrivals: Sequence[tuple[float, int, int]], found: Calibrated, slots: int) -> Told:
    """Of (instant, prompt tokens, answer tokens), through the production queue with one replica."""
    kernel, firsts = Kernel(), _Firsts()
    world = World(kernel, Fair(), LeastLoad(), (Conservation(), firsts), dispatch_s=found.way_s)
    world.gaps = gaps = _Gaps()
    world.add_replica(EngineSpec(found.step, KV_TOKENS, slots, max(2048, slots)), slots)
    order = sorted(range(len(arrivals)), key=lambda i: arrivals[i])
    world.feed(iter(Job(i, *arrivals[i]) for i in order))
    kernel.run()
    jobs = sorted(firsts.jobs, key=lambda job: job.id)
    arrived, ended = np.array([job.arrived_s for job in jobs]), np.array([job.ended_s for job in jobs])
    n_inside = [int(np.sum((arrived < at_s) & (ended > at_s))) for at_s in arrived]
    n_each = [together(gap_s, found.flush_s) for gap_s, _ in gaps.found]
    return Told(
        np.array([job.ttft_s for job in jobs]),
        np.array(n_inside) > 0,
        np.array([job.itl_s for job in jobs if job.n_output >= MIN_TOKENS]),
        np.array([gap_s * n for (gap_s, _), n in zip(gaps.found, n_each, strict=True)]),
        np.array([count / n for (_, count), n in zip(gaps.found, n_each, strict=True)]),
    )


def _arrivals(seen: Sequence[Seen]) -> list[tuple[float, int, int]]:
    return [(s.sent_s, s.n_prompt, len(s.tokens_s)) for s in seen]


def with_work(found: Calibrated, ramp: Sequence[Seen], slots: int) -> Calibrated:
    """What it adds to a first token that the engine is at work, from requests that came one upon the other: an engine
    on the cores of its clients and servers keeps those waiting at every step of the way."""
    told = simulate(_arrivals(ramp), found, slots)
    over = np.array([s.tokens_s[0] - s.sent_s for s in ramp]) - told.ttft_s
    return replace(found, busy_noise_s=spread([float(v) for v in over[told.met_work]]))


def compare(seen: Sequence[Seen], found: Calibrated, slots: int) -> dict[str, dict[str, float]]:
    """Quantiles in milliseconds: measured, simulated, and the relative error."""
    told = simulate(_arrivals(seen), found, slots)
    ttft = [s.tokens_s[0] - s.sent_s for s in seen]
    tpot = [
        (s.tokens_s[-1] - s.tokens_s[0]) / (len(s.tokens_s) - 1)
        for s in seen
        if len(s.tokens_s) >= MIN_TOKENS
    ]
    of = [reads(s) for s in seen]
    itl = [b - a for found_s in of for (a, _), (b, _) in itertools.pairwise(found_s)]
    idle = ~told.met_work if found.busy_noise_s else np.ones(len(seen), dtype=bool)
    firsts = [with_noise(told.ttft_s[idle], np.ones(idle.sum()), found.first_noise_s)]
    if not idle.all():
        firsts.append(with_noise(told.ttft_s[~idle], np.ones((~idle).sum()), found.busy_noise_s))
    pairs = {
        "ttft": (np.array(ttft), *(np.concatenate(parts) for parts in zip(*firsts, strict=True))),
        "itl": (np.array(itl), *with_noise(told.gaps_s, told.n_gaps, found.gap_noise_s)),
        "tpot": (np.array(tpot), told.tpot_s, np.ones(len(told.tpot_s))),
    }
    out = {}
    for name, (measured, values, weights) in pairs.items():
        for label, q in (("p50", 0.5), ("p99", 0.99)):
            live = float(np.quantile(measured, q)) * 1e3
            said = weighted_quantile(values, weights, q) * 1e3
            out[f"{name}_{label}"] = {
                "live_ms": round(live, 2),
                "simulated_ms": round(said, 2),
                "error": round(said / live - 1, 4),
            }
    return out


def with_noise(values: Any, counts: Any, noise: Sequence[float]) -> tuple[Any, Any]:
    """Every value with every noise, and its weight."""
    spread = np.maximum(values[:, None] + np.array(noise)[None, :], 0.0)
    return spread.ravel(), np.repeat(counts, len(noise))


def weighted_quantile(values: Any, weights: Any, q: float) -> float:
    order = np.argsort(values)
    share = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(share, q * share[-1])])


def summary_of(runs: Sequence[dict[str, dict[str, float]]], case: Case) -> dict[str, Any]:
    """Median of the absolute errors by figure, and the goals where the case is judged."""
    errors = {name: round(statistics.median(abs(run[name]["error"]) for run in runs), 4) for name in runs[0]}
    goals = [
        {"figure": name, "median_error": error, "goal_at_most": GOAL[name[-3:]], "reached": error <= GOAL[name[-3:]]}
        for name, error in errors.items()
    ]  # fmt: skip
    return {"errors": errors, "goals": goals if case.is_judged else []}


def as_text(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    lines = [f"{name}: {value}" for name, value in report["assumptions"].items()]
    lines += ["", f"{'load':<6}{'figure':<10}{'live ms':>10}{'simulated':>11}{'error':>9}"]
    for number, run in enumerate(report["runs"], 1):
        for name, row in run.items():
            lines.append(
                f"{number:<6}{name:<10}{row['live_ms']:>10.1f}{row['simulated_ms']:>11.1f}{row['error']:>+9.1%}"
            )
    lines.append("")
    for name, error in report["errors"].items():
        goal = next((g for g in report["goals"] if g["figure"] == name), None)
        verdict = (
            f" (goal {goal['goal_at_most']:.0%}): {'reached' if goal['reached'] else 'NOT reached'}"
            if goal
            else ""
        )
        lines.append(f"{name}: median error {error:.1%}{verdict}")
    return "\n".join(lines)
