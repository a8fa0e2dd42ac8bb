"""`manage.py bench coldstart`: how long from nothing to the first token of a tiny model on the real engine.

A private stack with the machine warm (agent and zygote up, no replica). Each round sends one streamed request to a
deployment at zero replicas and lets it fall back to zero. Two figures per round: from the request to its first
token, as the client sees it, and from the autoscaler's command to the agent to that token (the replica's row is
written right before the command).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psycopg

from benchmarks.stack import BenchStack, bench_stack
from benchmarks.stats import summary
from controlplane.askclient import ask

MODEL = "bench-tiny"
IDLE_TIMEOUT_S = 1
TO_ZERO_LIMIT_S = 60.0


def measure(*, repeats: int = 7, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """`repeats` rounds after one that warms machine and files; returns the report that `--json` prints."""
    progress("starting a private stack")
    request_ms, command_ms, stages = [], [], []
    with bench_stack("vllm", demo="toy") as stack:
        progress("importing the tiny model; waiting for machine and zygote (the engine is imported once)")
        profile = ("--profile", "max_model_len=512", "--profile", "kv_cache_bytes=67108864")
        idle = ("--idle-timeout-s", str(IDLE_TIMEOUT_S))
        stack.manage("deploy", MODEL, "--model", "tiny", *idle, *profile, timeout_s=300)  # fmt: skip
        for turn in range(repeats + 1):
            at_ms = time.time() * 1000
            seen: list[str] = []
            answer = ask(stack.facts.base_url, stack.facts.api_key, MODEL, f"Round {turn}", max_tokens=8,
                         timeout_s=120, on_stage=seen.append)  # fmt: skip
            if answer.ttft_ms is None:
                raise RuntimeError("the tiny model answered without a token")
            commanded_ms = _replica_commanded_at_ms(stack)
            if turn:
                request_ms.append(answer.ttft_ms)
                command_ms.append(at_ms + answer.ttft_ms - commanded_ms)
                stages.append(seen)
            label = "warm-up" if turn == 0 else f"round {turn} of {repeats}"
            progress(f"{label}: first token after {answer.ttft_ms:.0f} ms")
            _wait_for_zero(stack)
    report: dict[str, Any] = {
        "assumptions": {
            "model": "tiny random Llama (4 layers, 256 wide), float32, vLLM on CPU",
            "machine": "warm: zygote up",
            "files": "in the page cache after the warm-up round", "repeats": repeats,
        },
        "command_to_first_token_ms": summary(command_ms, 0),
        "request_at_zero_to_first_token_ms": summary(request_ms, 0),
        "stages_told_to_the_client": stages[-1] if stages else [],
    }  # fmt: skip
    report["goals"] = [
        {"figure": name, "goal_at_most": goal, "median": report[name]["median"],
         "reached": report[name]["median"] <= goal}
        for name, goal in (("command_to_first_token_ms", 2000), ("request_at_zero_to_first_token_ms", 3000))
    ]  # fmt: skip
    return report


def _replica_commanded_at_ms(stack: BenchStack) -> float:
    """When the newest replica of the bench deployment was ordered."""
    query = """SELECT extract(epoch FROM r.created_at) * 1000 FROM autoscaler_replica r
               JOIN deployments_deployment d ON d.id = r.deployment_id WHERE d.name = %s
               ORDER BY r.created_at DESC LIMIT 1"""
    with psycopg.connect(stack.dsn("operator"), connect_timeout=5) as connection:
        row = connection.execute(query, [MODEL]).fetchone()
    if row is None:
        raise RuntimeError("no replica was ever ordered")
    return float(row[0])


def _wait_for_zero(stack: BenchStack) -> None:
    query = """SELECT count(*) FROM autoscaler_replica r JOIN deployments_deployment d ON d.id = r.deployment_id
               WHERE d.name = %s AND r.phase NOT IN ('stopped', 'failed')"""
    deadline_s = time.monotonic() + TO_ZERO_LIMIT_S
    with psycopg.connect(stack.dsn("operator"), connect_timeout=5, autocommit=True) as connection:
        while True:
            row = connection.execute(query, [MODEL]).fetchone()
            if row and row[0] == 0:
                return
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"the deployment did not fall to zero in {TO_ZERO_LIMIT_S:.0f} s")
            time.sleep(0.2)


def as_text(report: dict[str, Any]) -> str:
    """The report as lines for people."""
    lines = [f"{key}: {value}" for key, value in report["assumptions"].items()] + [""]
    for goal in report["goals"]:
        figure = report[goal["figure"]]
        verdict = "reached" if goal["reached"] else "NOT reached"
        lines.append(
            f"{goal['figure']}: median {figure['median']:.0f} (min {figure['min']:.0f}, max {figure['max']:.0f}, "
            f"n={figure['n']}), goal ≤ {goal['goal_at_most']}: {verdict}"
        )
    return "\n".join(
        [*lines, "the waiting client was told: " + " | ".join(report["stages_told_to_the_client"])]
    )
