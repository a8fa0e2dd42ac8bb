"""A private local stack for a benchmark: own data directory, own ports, the toy or tiny engine, ended afterwards.

It is the product as `manage.py up` starts it, nothing left out, so that a figure is the product's.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import redis

from benchmarks.cpu import tree
from controlplane import quickstart_file
from controlplane.quickstart_file import Quickstart
from infra.local.environment import SAVED
from infra.local.ports import free_port
from infra.local.privatefile import read_json
from infra.local.process import find_marked
from infra.local.stackstate import read_state
from infra.providers.local import MARK
from workers.contract import Heartbeat

ROOT = Path(__file__).resolve().parent.parent
UP_TIMEOUT_S = 300
_BEATS_S = 1.0  # several heartbeats of a replica

# Which supervised processes a figure belongs to. On the path of a request: gateways, Redis, the machine.
ON_PATH = ("gateway", "redis", "machine")
OFF_PATH = ("intake", "postgres", "web")
_GROUP_OF = {"control": "intake", "beat": "intake"}


@dataclass(frozen=True)
class BenchStack:
    """A running stack: its data directory, environment for `manage.py`, quickstart facts, and what `up` printed."""

    var: Path
    env: Mapping[str, str]
    facts: Quickstart
    printed: str
    root: Path = ROOT  # of the code that it runs

    @property
    def port(self) -> int:
        return int(self.facts.base_url.split(":")[2].split("/")[0])

    def dsn(self, role: str) -> str:
        """Postgres DSN of a role of this stack."""
        saved = read_json(self.var / SAVED) or {}
        return str(saved[f"CORRAL_PG_DSN_{role.upper()}"])

    def heartbeats(self) -> list[Heartbeat]:
        """The last beat of every replica."""
        return self._beats("*:hb:*")

    def agent_beats(self) -> list[Heartbeat]:
        """The last beat of every machine's agent."""
        return self._beats("*:hb")

    def _beats(self, pattern: str) -> list[Heartbeat]:
        saved = read_json(self.var / SAVED) or {}
        with redis.Redis.from_url(str(saved["CORRAL_REDIS_URL"]), socket_timeout=5) as client:
            found = client.mget(list(client.scan_iter(pattern, count=1000)) or ["-"])
        return [msgspec.json.decode(raw, type=Heartbeat) for raw in found if raw]

    def manage(self, *args: str, timeout_s: float = 120) -> str:
        """Output of a management command run against this stack; RuntimeError with its errors if it fails."""
        done = subprocess.run(
            [sys.executable, "manage.py", *args],
            cwd=self.root, env=dict(self.env), capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"manage.py {' '.join(args)}: {done.stderr.strip()[-2000:]}")
        return done.stdout

    def manage_json(self, *args: str) -> dict[str, Any]:
        return dict(json.loads(self.manage(*args, "--json")))

    def processes(self) -> dict[str, list[int]]:
        """All live pids by group. The agent is a child of the control worker, yet no part of it."""
        state = read_state(self.var)
        if state is None:
            raise RuntimeError(f"no stack state in {self.var}")
        groups: dict[str, list[int]] = {name: [] for name in (*ON_PATH, *OFF_PATH)}
        for machine in (self.var / "machines").glob("*"):
            # And what they forked: an engine that names its process overwrites the environment it is found by.
            groups["machine"] += tree(find_marked(f"{MARK}={machine.name}"))
        for process in state.processes:
            group = _GROUP_OF.get(process.name, process.name.split("-")[0])
            if process.pid is not None and group in groups:
                groups[group] += [pid for pid in tree([process.pid]) if pid not in groups["machine"]]
        return groups

    @contextmanager
    def still(self) -> Iterator[None]:
        """No process of the stack but its idle supervisor takes CPU inside. For loads that have ended: on the way back
        Redis, Postgres and the machine go first, so that the watcher finds fresh heartbeats when it looks."""
        groups = self.processes()
        first = ("redis", "postgres", "machine")
        rest = [name for name in groups if name not in first]
        signal_all([pid for name in (*rest, *reversed(first)) for pid in groups[name]], signal.SIGSTOP)
        try:
            yield
        finally:
            signal_all([pid for name in first for pid in groups[name]], signal.SIGCONT)
            time.sleep(_BEATS_S)
            signal_all([pid for name in rest for pid in groups[name]], signal.SIGCONT)


def signal_all(pids: Iterable[int], number: int) -> None:
    """Signals every process that is still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@contextmanager
def bench_stack(
    engine: str = "toy",
    *,
    demo: str | None = None,
    env_of: Callable[[Path], Mapping[str, str]] = lambda var: {},
    root: Path = ROOT,
) -> Iterator[BenchStack]:
    """Starts a stack in a temporary directory, yields it, stops it and removes its data.

    `engine` is what its machines preload. `demo` names another engine for the demo deployment, which is then set up
    without a first question. `env_of` adds to its environment (not to that
    of commands, which take it from the data directory it is told). `root`: of other code than this.
    """
    var = Path(tempfile.mkdtemp(prefix="corral-bench-"))
    var.chmod(0o711)  # else PostgreSQL, another user under root, would keep its data elsewhere
    env = {k: v for k, v in os.environ.items() if not k.startswith("CORRAL_")}
    env |= {"CORRAL_VAR": str(var), "CORRAL_ENGINE": engine, "CORRAL_LOG_LEVEL": "WARNING"}
    # Not the preferred ports: another stack that starts just now would find them free, too.
    env |= {f"CORRAL_{name}_PORT": str(free_port()) for name in ("GATEWAY", "WEB")}
    try:
        up = subprocess.run(
            [sys.executable, "manage.py", "up", "--detach", *(["--no-question"] if demo else [])],
            cwd=root, env=env | dict(env_of(var)), capture_output=True, text=True, timeout=UP_TIMEOUT_S, check=False,
        )  # fmt: skip
        if up.returncode:
            raise RuntimeError(f"the stack did not start:\n{up.stdout[-3000:]}\n{up.stderr[-2000:]}")
        if demo:
            argv = [sys.executable, "manage.py", "quickstart", "--no-question", "--engine", demo]
            subprocess.run(argv, cwd=root, env=env, capture_output=True, timeout=UP_TIMEOUT_S, check=True)
        yield BenchStack(var, env, quickstart_file.read(var), up.stdout, root)
    finally:
        subprocess.run(
            [sys.executable, "manage.py", "down"],
            cwd=root, env=env, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        shutil.rmtree(var, ignore_errors=True)
