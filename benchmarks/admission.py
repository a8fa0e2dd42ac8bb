"""`manage.py bench admission`: what refusing by prediction does to an overloaded deployment, live.

Starts the whole product with the toy engine and one replica of 8 slots, and sends twice as many requests as it can
serve, at random instants that do not wait for answers. `predicted` refuses what would probably miss the promise of
class interactive (a first token within a second), `bounded` what finds 2,000 waiting. Arms take turns, each run with a
fresh deployment that nothing is known of; the first seconds are not counted. Every figure is the median of `repeats`
runs with minimum and maximum. Whoever has no first token when the run ends is counted as late: it is.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.stack import BenchStack, bench_stack
from benchmarks.stats import quantile, summary

TARGET_S = 1.0  # of the class `interactive`
SLOTS, STEP_MS = 8, 20.0
N_TOKENS = (16, 64)  # of an answer, drawn evenly
LOAD = 2.0
WARM_S, SECONDS, DRAIN_S = 12.0, 25.0, 4.0
# About: a request keeps its slot for its tokens and a few steps more until the next has it.
SERVED_PER_S = SLOTS / (sum(N_TOKENS) / 2 * STEP_MS / 1000 + 0.06)
ARMS = ("predicted", "bounded")
FIGURES = ("attained", "good_per_s", "admitted", "refused", "ttft_p50_s", "ttft_p95_s", "retry_after_p50_s")


@dataclass
class Seen:
    """One request as its client saw it. `first_s`: from sending to the first token, None if none came."""

    at_s: float
    status: int = 0
    first_s: float | None = None
    retry_s: float | None = None


def measure(*, repeats: int = 2, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Both arms, interleaved; returns the report that `--json` prints."""
    progress("starting a private stack with the toy engine")
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    with bench_stack("toy") as stack:
        key = stack.manage_json(
            "create_key", "bench", "--rpm", "100000000", "--input-tpm", "2000000000", "--output-tpm", "2000000000",
            "--max-concurrency", "100000", "--budget", "1000000", "--limit-all",
        )  # fmt: skip
        for number in range(repeats):
            for arm in ARMS:
                runs[arm].append(_run(stack, arm, number, str(key["api_key"])))
                progress(f"run {number + 1} of {repeats}, {arm}: {runs[arm][-1]}")
    report: dict[str, Any] = {
        "assumptions": {
            "engine": f"toy, {STEP_MS:g} ms a step, {SLOTS} slots", "promise_s": TARGET_S,
            "tokens_per_answer": N_TOKENS, "sent_per_s": round(LOAD * SERVED_PER_S, 1),
            "served_per_s_about": round(SERVED_PER_S, 1), "warm_s": WARM_S, "seconds": SECONDS, "repeats": repeats,
        },
        "arms": {arm: {name: summary([run[name] for run in runs[arm]], 3) for name in FIGURES} for arm in ARMS},
    }  # fmt: skip
    report["goals"] = goals(report["arms"])
    return report


def _run(stack: BenchStack, arm: str, number: int, api_key: str) -> dict[str, float]:
    model = f"admission-{arm}-{number}"
    deploy = (
        "deploy", model, "--model", "toy", "--max", "1", "--slo", "interactive", "--admission", arm,
        "--profile", f"max_num_seqs={SLOTS}", "--profile", f"toy_step_ms={STEP_MS}",
    )  # fmt: skip
    stack.manage(*deploy, "--min", "1")
    stack.manage("ask", "ready?", "--model", model)
    seen = asyncio.run(_send(stack.port, api_key, model, seed=number))
    stack.manage(*deploy, "--min", "0", "--idle-timeout-s", "0")
    return figures_of(seen)


async def _send(port: int, api_key: str, model: str, seed: int) -> list[Seen]:
    """Requests at random instants; what became of those after the warm-up."""
    dice = random.Random(seed)
    seen: list[Seen] = []
    tasks: list[asyncio.Task[None]] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", headers={"authorization": f"Bearer {api_key}"}, timeout=60, limits=limits
    ) as client:  # fmt: skip
        start_s = time.monotonic()
        due_s = 0.0
        while due_s < WARM_S + SECONDS:
            due_s += dice.expovariate(LOAD * SERVED_PER_S)
            await asyncio.sleep(max(0.0, start_s + due_s - time.monotonic()))
            one = Seen(due_s)
            seen.append(one)
            tasks.append(asyncio.ensure_future(_ask(client, model, dice.randint(*N_TOKENS), one)))
        await asyncio.sleep(DRAIN_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [one for one in seen if one.at_s >= WARM_S]


async def _ask(client: httpx.AsyncClient, model: str, n_tokens: int, seen: Seen) -> None:
    body = {
        "model": model, "stream": True, "ignore_eos": True, "max_tokens": n_tokens,
        "messages": [{"role": "user", "content": f"Question {n_tokens} about cattle"}],
    }  # fmt: skip
    sent_s = time.monotonic()
    async with client.stream("POST", "/v1/chat/completions", content=json.dumps(body)) as response:
        seen.status = response.status_code
        if response.status_code != 200:
            retry = response.headers.get("retry-after-ms")
            seen.retry_s = float(retry) / 1000 if retry else None
            await response.aread()
            return
        async for line in response.aiter_lines():
            if line.startswith("data:") and seen.first_s is None and '"content"' in line:
                seen.first_s = time.monotonic() - sent_s


def figures_of(seen: list[Seen]) -> dict[str, float]:
    """Shares of all that was sent, but `attained`: of those that were not refused."""
    refused = [one for one in seen if one.status in (429, 503)]
    admitted = [one for one in seen if one.status not in (429, 503)]
    good = [one for one in admitted if one.first_s is not None and one.first_s <= TARGET_S]
    first_s = [one.first_s if one.first_s is not None else SECONDS + DRAIN_S for one in admitted]
    retry_s = [one.retry_s for one in refused if one.retry_s is not None]
    return {
        "attained": len(good) / max(len(admitted), 1),
        "good_per_s": len(good) / SECONDS,
        "admitted": len(admitted) / max(len(seen), 1),
        "refused": len(refused) / max(len(seen), 1),
        "ttft_p50_s": quantile(first_s, 0.5) if first_s else 0.0,
        "ttft_p95_s": quantile(first_s, 0.95) if first_s else 0.0,
        "retry_after_p50_s": quantile(retry_s, 0.5) if retry_s else 0.0,
    }


def goals(arms: dict[str, Any]) -> list[dict[str, Any]]:
    """Those admitted are served as promised, and more of them than without."""
    attained = arms["predicted"]["attained"]["median"]
    good, without = (arms[arm]["good_per_s"]["median"] for arm in ARMS)
    return [
        {"figure": "attainment of those admitted at twice the load", "is": attained, "goal": ">= 0.9",
         "reached": attained >= 0.9},
        {"figure": "served in time per second, more than with the bounded queue by", "is": round(good - without, 2),
         "goal": "> 0", "reached": good > without},
    ]  # fmt: skip


def as_text(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    lines = [f"{key}: {value}" for key, value in report["assumptions"].items()]
    heads = ("in time of adm.", "in time/s", "admitted", "refused", "TTFT p50 s", "TTFT p95 s", "retry s")
    lines += ["", f"{'':<10}" + "".join(f"{head:>24}" for head in heads)]
    for arm, figures in report["arms"].items():
        cells = (
            f"{figures[name]['median']:g} ({figures[name]['min']:g}-{figures[name]['max']:g})"
            for name in FIGURES
        )
        lines.append(f"{arm:<10}" + "".join(f"{cell:>24}" for cell in cells))
    lines.append("")
    for goal in report["goals"]:
        verdict = "reached" if goal["reached"] else "NOT reached"
        lines.append(f"{goal['figure']}: {goal['is']} (goal {goal['goal']}): {verdict}")
    return "\n".join(lines)
