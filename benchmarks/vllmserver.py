"""vLLM's own OpenAI server as a process of its own, with the engine settings of a Corral replica.

`bench engine` starts it beside a private stack and stands it still (SIGSTOP) while the other side is measured. The
environment is the replica's own, and what would cost vLLM time without a use here is off: access log, statistics.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.cpu import tree
from benchmarks.stack import signal_all
from infra.local.ports import free_port
from workers.engine import vllm_args
from workers.engine.base import EngineProfile
from workers.engine.vllm_args import engine_args
from workers.engine.vllm_process import replica_environment

START_LIMIT_S = 180.0


def arguments(profile: EngineProfile, model_dir: Path, model: str, port: int) -> list[str]:
    """Command line: what workers/engine/vllm.py gives its engine, as flags (workers/engine/vllm_args.py)."""
    argv = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    argv += ["--model", str(model_dir), "--served-model-name", model]
    return [
        *argv,
        *vllm_args.argv(engine_args(profile)),
        "--disable-log-stats",
        "--disable-uvicorn-access-log",
    ]


@dataclass(frozen=True)
class VllmServer:
    """A server that answers on `port`. `pid` leads its processes."""

    port: int
    pid: int

    def pids(self) -> list[int]:
        return tree([self.pid])

    @contextmanager
    def still(self) -> Iterator[None]:
        """Its processes take no CPU inside."""
        signal_all(self.pids(), signal.SIGSTOP)
        try:
            yield
        finally:
            signal_all(self.pids(), signal.SIGCONT)


@contextmanager
def vllm_server(profile: EngineProfile, model_dir: Path, model: str, log: Path) -> Iterator[VllmServer]:
    """Starts it, yields it when it answers, ends it. RuntimeError with the end of its log when it does not start."""
    port = free_port()
    env = os.environ | replica_environment()
    with log.open("wb") as sink, subprocess.Popen(
        arguments(profile, model_dir, model, port), cwd=log.parent, env=env, stdout=sink, stderr=sink,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            _wait(process, port, log)
            yield VllmServer(port, process.pid)
        finally:
            pids = tree([process.pid])
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            signal_all(pids, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.25)
    raise RuntimeError(f"vLLM's server did not start:\n{log.read_text(errors='replace')[-3000:]}")
