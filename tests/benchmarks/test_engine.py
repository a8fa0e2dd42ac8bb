"""`bench engine`: what is compared, with which settings, and when a goal counts as reached."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from benchmarks import engine, vllmserver
from benchmarks.engine import CASES, CORRAL, VLLM, bodies, compare, goals
from workers.engine.base import EngineProfile
from workers.engine.vllm_args import engine_args


def pair(corral: float, vllm: float, more_ms: float = 1.0) -> dict[str, dict[str, float]]:
    return {
        CORRAL: {"tokens_per_s": corral, "ttft_ms": 20.0 + more_ms},
        VLLM: {"tokens_per_s": vllm, "ttft_ms": 20.0},
    }


def test_ratios_are_taken_pair_by_pair() -> None:
    """A slow minute that falls on both halves of a pair changes no ratio."""
    found = compare([pair(100, 100), pair(10, 10, 9.0), pair(300, 150, -1.0)])
    assert found["throughput_ratio"] == {"median": 1.0, "min": 1.0, "max": 2.0, "n": 3}
    assert found["ttft_more_ms"]["median"] == 1.0
    assert found[CORRAL]["tokens_per_s"]["median"] == 100


@pytest.mark.parametrize(
    ("corral", "more_ms", "reached"),
    [(100, 3.0, [True, True]), (99, 3.1, [False, False]), (101, -5.0, [True, True])],
)
def test_the_median_reaches_a_goal_or_not(corral: float, more_ms: float, reached: list[bool]) -> None:
    tiny = {case.name: case for case in CASES}["tiny"]
    assert tiny.ratio_at_least == 1.0
    rows = goals({"tiny": tiny}, {"tiny": compare([pair(corral, 100, more_ms)] * 7)})
    assert [row["reached"] for row in rows] == reached


def test_both_sides_get_the_same_engine_settings() -> None:
    """Every knob that the replica hands to vLLM is a flag of the server, so that a new one cannot be forgotten."""
    profile = EngineProfile(
        dtype="bfloat16", max_model_len=300, max_num_seqs=7, kv_cache_bytes=1 << 21,
        max_num_batched_tokens=99, enforce_eager=True, tensor_parallel_size=2, block_size=64,
    )  # fmt: skip
    argv = vllmserver.arguments(profile, Path("/models/m"), "m", 1234)
    handed = engine_args(profile)
    assert {"dtype", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes"} <= handed.keys()
    for name, value in handed.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            assert (f"--{flag}" if value else f"--no-{flag}") in argv
        else:
            said = json.dumps(value) if isinstance(value, dict) else str(value)
            assert argv[argv.index(f"--{flag}") + 1] == said
    assert "--no-enforce-eager" in vllmserver.arguments(replace(profile, enforce_eager=False), Path(), "m", 1)


def test_prompts_are_the_same_for_both_and_new_for_every_pair() -> None:
    assert bodies("m", 3, 8, "pair 1") == bodies("m", 3, 8, "pair 1")
    first = [json.loads(body)["messages"][0]["content"] for body in bodies("m", 3, 8, "pair 1")]
    second = [json.loads(body)["messages"][0]["content"] for body in bodies("m", 3, 8, "pair 2")]
    assert len({text[:12] for text in first + second}) == 6


def test_answers_differ_in_length_and_not_on_average() -> None:
    lengths = [json.loads(body)["max_tokens"] for body in bodies("m", 65, 128, "x")]
    assert sum(lengths) == 65 * 128
    assert 64 <= min(lengths) < 80 and 176 < max(lengths) <= 192


def test_the_side_that_is_not_measured_stands_still() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            server = vllmserver.VllmServer(0, process.pid)
            with server.still():
                _until(process.pid, psutil.STATUS_STOPPED)
                before = engine.cpu.cpu_s([process.pid])
                time.sleep(0.05)
                assert engine.cpu.cpu_s([process.pid]) == before
            _until(process.pid, psutil.STATUS_RUNNING)
        finally:
            os.kill(process.pid, signal.SIGKILL)


def _until(pid: int, status: str) -> None:
    deadline_s = time.monotonic() + 5
    while psutil.Process(pid).status() != status:
        assert time.monotonic() < deadline_s, f"never {status}"
        time.sleep(0.005)
