"""`manage.py bench isolation`: what one tenant notices of another that asks for ten times as much.

Starts the whole product with the toy engine and one replica, shared by two organizations. The victim's clients always
want an answer. `alone`: nobody else is there, and the replica has half its slots, which is the victim's fair share of
it. `attacked`: all slots, and an equally weighted tenant with ten times the clients and long prompts; both have
requests waiting all the time. Arms take turns; figures are the median of `repeats` runs with minimum and maximum.
`weights`: both send the same, one weighs three times the other, for a minute; served tokens must follow the weights.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

from benchmarks.stack import ROOT, BenchStack, bench_stack
from benchmarks.stats import summary
from benchmarks.streams import StreamPlan

VICTIM, OTHER = "victim", "other"
SLOTS = 16
N_CLIENTS, TIMES = 16, 10  # of the victim; the other has so many times as many
SHORT_WORDS, LONG_WORDS = 30, 1500
N_TOKENS = (24, 56)  # of an answer, drawn evenly
# Both are backlogged by then: what was bound before the other's first request waited is served (in shorter warm-ups p99
# of one run and the next differed by half).
WARM_S, SECONDS = 15.0, 40.0
WEIGHTS = {VICTIM: 100, OTHER: 300}
WEIGHTS_SECONDS = 60.0
AT_MOST, WITHIN = 1.2, 0.05
# A step like a small model's on a GPU: memory-bound, so a sequence adds little, and prompts are computed in chunks that
# lengthen it by at most an eighth.
STEP_MS, SEQ_MS, PREFILL_MS_PER_1000, CHUNK = 20.0, 0.1, 20.0, 128
# Of one prompt in a step: half of what 16 running sequences leave, as `manage.py profile` chooses.
PORTION = 56
FIGURES = ("first_p50_ms", "first_p99_ms", "gap_p50_ms", "gap_p99_ms", "tokens_per_s")


def measure(*, repeats: int = 3, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """All arms; returns the report that `--json` prints."""
    progress("starting a private stack with the toy engine")
    with bench_stack("toy") as stack:
        keys = {name: _tenant(stack, name) for name in (VICTIM, OTHER)}
        runs: dict[str, list[dict[str, Any]]] = {"alone": [], "attacked": []}
        for number in range(repeats):
            for arm, slots in (("alone", SLOTS // 2), ("attacked", SLOTS)):
                with _deployed(stack, f"{arm}-{number}", slots, keys) as model:
                    plans = {VICTIM: _plan(stack, keys[VICTIM], model, N_CLIENTS, SHORT_WORDS)}
                    if arm == "attacked":
                        plans[OTHER] = _plan(stack, keys[OTHER], model, TIMES * N_CLIENTS, LONG_WORDS)
                    runs[arm].append(_run(plans))
                progress(f"run {number + 1} of {repeats}, {arm}: {_short(runs[arm][-1][VICTIM])}")
        for name, weight in WEIGHTS.items():
            stack.manage("set_weight", str(weight), "--organization", name)
        with _deployed(stack, "weights", SLOTS, keys) as model:
            progress(f"weights {WEIGHTS}, {WEIGHTS_SECONDS:.0f} s")
            weighed = _run({
                name: _plan(stack, key, model, 4 * N_CLIENTS, SHORT_WORDS, WEIGHTS_SECONDS)
                for name, key in keys.items()
            })  # fmt: skip
    report: dict[str, Any] = {
        "assumptions": {
            "engine": f"toy: {STEP_MS:g} ms a step, {SEQ_MS:g} ms more per sequence and {PREFILL_MS_PER_1000:g} ms per "
                      f"1,000 prompt tokens, computed in chunks of {CHUNK}, of one prompt {PORTION}",
            "slots": {"alone": SLOTS // 2, "attacked": SLOTS},
            "clients": {VICTIM: N_CLIENTS, OTHER: TIMES * N_CLIENTS},
            "prompt_words": {VICTIM: SHORT_WORDS, OTHER: LONG_WORDS},
            "tokens_per_answer": N_TOKENS, "warm_s": WARM_S, "seconds": SECONDS, "repeats": repeats,
            "weights": WEIGHTS, "weights_seconds": WEIGHTS_SECONDS,
            "latency": "as the client sees it; first token from the request on",
        },
        "arms": {
            "alone": {VICTIM: figures_of([run[VICTIM] for run in runs["alone"]])},
            "attacked": {name: figures_of([run[name] for run in runs["attacked"]]) for name in (VICTIM, OTHER)},
        },
        "weights": {name: {"weight": WEIGHTS[name], "tokens": weighed[name]["n_tokens"]} for name in WEIGHTS},
    }  # fmt: skip
    report["goals"] = goals(report["arms"], report["weights"])
    return report


def _tenant(stack: BenchStack, name: str) -> str:
    """An organization of the ordinary weight; its key."""
    stack.manage("create_organization", name, "--owner", f"{name}@corral.local")
    return str(
        stack.manage_json("create_key", "bench", "--organization", name, "--project", "main")["api_key"]
    )


@contextmanager
def _deployed(stack: BenchStack, name: str, slots: int, keys: dict[str, str]) -> Iterator[str]:
    """A fresh deployment for every run, shared with both; the `model` that they send. Gone afterwards: all of them
    share two cores."""
    deploy = (
        "deploy", name, "--model", "toy", "--max", "1", f"--profile=max_num_seqs={slots}",
        f"--profile=toy_step_ms={STEP_MS}", f"--profile=toy_seq_ms={SEQ_MS}",
        f"--profile=toy_prefill_ms={PREFILL_MS_PER_1000}", f"--profile=max_num_batched_tokens={CHUNK}",
        f"--profile=long_prefill_token_threshold={PORTION}", "--profile=max_model_len=8192",
    )  # fmt: skip
    stack.manage(*deploy, "--min", "1")
    for tenant in keys:
        stack.manage("share", name, "--with", tenant)
    stack.manage("ask", "ready?", "--model", name)
    yield f"acme/{name}"
    stack.manage(*deploy, "--min", "0", "--idle-timeout-s", "0")


def _plan(
    stack: BenchStack, api_key: str, model: str, n_clients: int, n_words: int, seconds: float = SECONDS
) -> StreamPlan:
    return StreamPlan(stack.port, api_key, bodies(model, n_words), n_clients, WARM_S, seconds)


def bodies(model: str, n_words: int) -> list[str]:
    """Requests whose prompts share no beginning and whose answers differ in length."""
    dice = random.Random(n_words)
    return [
        json.dumps({
            "model": model, "stream": True, "ignore_eos": True, "max_tokens": dice.randint(*N_TOKENS),
            "messages": [{"role": "user", "content": " ".join(
                "".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(n_words)
            )}],
        })
        for _ in range(300)
    ]  # fmt: skip


def _run(plans: dict[str, StreamPlan]) -> dict[str, dict[str, Any]]:
    """All tenants' clients at once, a process each; what each saw."""
    with ExitStack() as processes:
        running = {
            name: processes.enter_context(subprocess.Popen(
                [sys.executable, "-m", "benchmarks.streams"],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            ))
            for name in plans
        }  # fmt: skip
        for name, process in running.items():
            assert process.stdin
            process.stdin.write(json.dumps(asdict(plans[name])) + "\n")
            process.stdin.flush()
        found = {}
        for name, process in running.items():
            assert process.stdout
            if process.stdout.readline().strip() != "warm":
                raise RuntimeError(f"the clients of {name} ended early")
            found[name] = json.loads(process.stdout.readline())
            found[name]["tokens_per_s"] = found[name]["n_tokens"] / found[name]["wall_s"]
    return found


def _short(seen: dict[str, Any]) -> str:
    return ", ".join(f"{name} {seen[name]:.0f}" for name in FIGURES)


def figures_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, minimum and maximum of every figure; requests refused in all."""
    return {name: summary([run[name] for run in runs], 1) for name in FIGURES} | {
        "refused": sum(run["n_refused"] for run in runs)
    }


def goals(arms: dict[str, Any], weights: dict[str, Any]) -> list[dict[str, Any]]:
    """What the victim may notice, and how near served tokens come to the weights."""
    rows = []
    for name, title in (("first_p99_ms", "first token, 99 %"), ("gap_p99_ms", "gap between tokens, 99 %")):
        alone, attacked = arms["alone"][VICTIM][name]["median"], arms["attacked"][VICTIM][name]["median"]
        times = round(attacked / max(alone, 1e-9), 3)
        rows.append({"figure": f"victim's {title}: attacked / alone at its fair share", "is": times,
                     "goal": f"<= {AT_MOST:g}", "reached": times <= AT_MOST})  # fmt: skip
    served = weights[OTHER]["tokens"] / max(weights[VICTIM]["tokens"], 1)
    off = round(served / (weights[OTHER]["weight"] / weights[VICTIM]["weight"]) - 1, 4)
    rows.append({"figure": "served tokens of two backlogged tenants, off their weights by", "is": off,
                 "goal": f"within {WITHIN:g}", "reached": abs(off) <= WITHIN})  # fmt: skip
    return rows


def as_text(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    lines = [f"{key}: {value}" for key, value in report["assumptions"].items()]
    heads = ("TTFT p50 ms", "TTFT p99 ms", "gap p50 ms", "gap p99 ms", "tokens/s")
    lines += ["", f"{'':<18}" + "".join(f"{head:>26}" for head in heads)]
    for arm, tenants in report["arms"].items():
        for tenant, figures in tenants.items():
            cells = (f"{figures[name]['median']:g} ({figures[name]['min']:g}-{figures[name]['max']:g})"
                     for name in FIGURES)  # fmt: skip
            lines.append(f"{f'{arm}, {tenant}':<18}" + "".join(f"{cell:>26}" for cell in cells))
    lines.append("")
    lines += [f"weight {row['weight']}: {row['tokens']} tokens" for row in report["weights"].values()]
    lines.append("")
    for goal in report["goals"]:
        verdict = "reached" if goal["reached"] else "NOT reached"
        lines.append(f"{goal['figure']}: {goal['is']} (goal {goal['goal']}): {verdict}")
    return "\n".join(lines)
