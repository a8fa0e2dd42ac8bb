"""`manage.py bench clients`: clients that leave, and clients that do not read.

`left`: streams whose client closes its connection in the middle. What is billed beyond what the client had seen is what
the engine still made: a step of 100 ms makes that countable. `queued`: clients that leave while they wait. `slow`: as
many clients that read nothing as ones that do, in front of one replica; gaps of the readers with and without them, and
the memory that they cost. At the end the slow ones read on and must get every token.
"""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any
from uuid import UUID

import psycopg
import redis

from benchmarks.memory import PeakMemory
from benchmarks.stack import ROOT, BenchStack, bench_stack
from benchmarks.stats import quantile, summary
from benchmarks.streams import StreamPlan
from infra.local.environment import SAVED
from infra.local.privatefile import read_json
from workers.keys import CellKeys

STEP, LINE, FAST = "clients-step", "clients-line", "clients-fast"
STEP_MS, N_LEFT = 100, 24
N_QUEUED = 32
FAST_STEP_MS, N_SLOW, SLOW_TOKENS = 10, 16, 3000
WARM_S, SECONDS = 3.0, 12.0
RECEIVE_BYTES = 4096
MOST_STEPS, QUEUED_MS, SLOW_KIB, SLOWER = 1, 250.0, 512.0, 1.2
BOOKED_WITHIN_S, PATIENCE_S = 60.0, 120.0


class Client:
    """A streaming request on a socket of its own; `more` goes into its body."""

    def __init__(self, stack: BenchStack, model: str, number: int, n_tokens: int, **more: Any) -> None:
        body = json.dumps({
            "model": model, "max_tokens": n_tokens, "ignore_eos": True, "stream": True,
            "messages": [{"role": "user", "content": f"Question {number} about cattle"}], **more,
        }).encode()  # fmt: skip
        self.raw = b""
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        self._socket.settimeout(PATIENCE_S)
        self._socket.connect(("127.0.0.1", stack.port))
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
            f"authorization: Bearer {stack.facts.api_key}\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self._socket.sendall(head.encode() + body)

    def read_for(self, seconds: float) -> None:
        """Reads what comes within so long."""
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:
            self._socket.settimeout(left_s)
            try:
                data = self._socket.recv(65_536)
            except TimeoutError:
                return
            if not data:
                return
            self.raw += data

    def take(self) -> None:
        """Reads what has come, without waiting."""
        self._socket.setblocking(False)
        try:
            while data := self._socket.recv(65_536):
                self.raw += data
        except BlockingIOError:
            return

    def read_all(self) -> None:
        self._socket.settimeout(PATIENCE_S)
        while data := self._socket.recv(65_536):
            self.raw += data

    def leave(self) -> None:
        self._socket.close()

    @property
    def request(self) -> str:
        """Bare hex; '' before the first event."""
        at = self.raw.find(b'"id":"chatcmpl-')
        return self.raw[at + 15 : at + 47].decode() if at >= 0 else ""

    @property
    def n_tokens(self) -> int:
        return self.raw.count(b'"content":"') - self.raw.count(b'"content":""')


def measure(*, repeats: int = 3, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Everything `repeats` times; returns the report that `--json` prints."""
    progress("starting a private stack with the toy engine")
    with bench_stack("toy") as stack:
        for model, step_ms, slots in ((STEP, STEP_MS, 64), (LINE, STEP_MS, 1), (FAST, FAST_STEP_MS, 64)):
            stack.manage("deploy", model, "--model", "toy", "--min", "1", "--max", "1", "--slo", "batch",
                         f"--profile=max_num_seqs={slots}", f"--profile=toy_step_ms={step_ms}",
                         "--profile=max_model_len=8192")  # fmt: skip
            stack.manage("ask", "ready?", "--model", model)
        runs = []
        for number in range(repeats):
            runs.append({**_left(stack, number), **_queued(stack), **_slow(stack)})
            progress(f"run {number + 1} of {repeats}: {runs[-1]}")
    report: dict[str, Any] = {
        "assumptions": {
            "engine": f"toy: {STEP_MS} ms a step where clients leave, {FAST_STEP_MS} ms where they do not read",
            "left": f"{N_LEFT} clients, each at a moment of its own", "queued": f"{N_QUEUED} clients behind one slot",
            "slow": f"{N_SLOW} clients that read nothing of {SLOW_TOKENS} tokens beside {N_SLOW} that do",
            "repeats": repeats,
        },
        "figures": {name: summary([run[name] for run in runs], 1) for name in runs[0]},
    }  # fmt: skip
    report["goals"] = goals(report["figures"])
    return report


def _left(stack: BenchStack, number: int) -> dict[str, float]:
    """Tokens made after the client had gone."""
    dice = random.Random(number)
    clients = [Client(stack, STEP, n, 400) for n in range(N_LEFT)]
    for client in clients:
        while not client.n_tokens:
            client.read_for(0.02)
    for client in clients:
        time.sleep(dice.uniform(0.0, STEP_MS / 1000))  # anywhere within a step
        client.take()
        client.leave()
    seen = {UUID(hex=client.request): client.n_tokens for client in clients}
    billed: dict[UUID, int] = {}
    deadline_s = time.monotonic() + BOOKED_WITHIN_S
    with psycopg.connect(stack.dsn("operator"), autocommit=True, connect_timeout=5) as connection:
        while len(billed) < N_LEFT and time.monotonic() < deadline_s:
            query = (
                "SELECT request_id, n_completion_tokens FROM billing_usageevent WHERE request_id = ANY(%s)"
            )
            billed = dict(connection.execute(query, [list(seen)]).fetchall())
            time.sleep(0.25)
    if len(billed) < N_LEFT:
        raise RuntimeError(f"{N_LEFT - len(billed)} requests whose clients left were never billed")
    more = [billed[request] - n for request, n in seen.items()]
    return {"left_steps_p50": quantile(more, 0.5), "left_steps_most": max(more)}


def _queued(stack: BenchStack) -> dict[str, float]:
    """How long requests wait on after their clients have gone."""
    saved = read_json(stack.var / SAVED) or {}
    with redis.Redis.from_url(str(saved["CORRAL_REDIS_URL"]), socket_timeout=5) as server:
        deployment = _deployment(stack, LINE)
        queue = CellKeys(str(saved["CORRAL_CELL"])).queue(deployment)
        first = Client(stack, LINE, 0, 2000)
        first.read_for(0.5)
        waiting = [Client(stack, LINE, n, 10) for n in range(1, N_QUEUED + 1)]
        _until(lambda: int(server.zcard(queue)) == N_QUEUED, "all wait")
        began_s = time.monotonic()
        for client in waiting:
            client.leave()
        _until(lambda: int(server.zcard(queue)) == 0, "the queue is empty")
        gone_ms = (time.monotonic() - began_s) * 1000
        first.leave()
    return {"queued_gone_ms": gone_ms}


def _slow(stack: BenchStack) -> dict[str, float]:
    """Gaps of those that read without and with others that do not; memory meanwhile; then all is read."""
    without = _readers(stack)
    groups = {
        name: pids for name, pids in stack.processes().items() if name in ("gateway", "redis", "machine")
    }
    with PeakMemory(groups) as memory:
        slow = [
            Client(stack, FAST, 1000 + n, SLOW_TOKENS, logprobs=True, top_logprobs=20) for n in range(N_SLOW)
        ]
        with_slow = _readers(stack)
        time.sleep(
            max(0.0, SLOW_TOKENS * FAST_STEP_MS / 1000 - WARM_S - SECONDS)
        )  # all is made, nothing read
    for client in slow:
        client.read_all()
    n_bytes = sum(len(client.raw) for client in slow)
    whole = sum(client.n_tokens == SLOW_TOKENS and client.raw.endswith(b"0\r\n\r\n") for client in slow)
    more = {name: memory.peak[name] - memory.before[name] for name in groups}
    return {
        "gap_p99_ms_without": without, "gap_p99_ms_with_slow": with_slow,
        "slow_got_everything": whole, "slow_answer_kib": n_bytes / 1024 / N_SLOW,
        **{f"{name}_kib_per_slow_client": 1024 * mib / N_SLOW for name, mib in more.items()},
    }  # fmt: skip


def _readers(stack: BenchStack) -> float:
    """The 99 % gap of clients that read."""
    bodies = [
        json.dumps({"model": FAST, "max_tokens": 200, "ignore_eos": True, "stream": True,
                    "messages": [{"role": "user", "content": f"Question {n} about sheep"}]})
        for n in range(200)
    ]  # fmt: skip
    plan = StreamPlan(stack.port, stack.facts.api_key, bodies, N_SLOW, WARM_S, SECONDS)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.streams"], cwd=ROOT, input=json.dumps(asdict(plan)) + "\n",
        capture_output=True, text=True, check=True, timeout=WARM_S + SECONDS + 60,
    )  # fmt: skip
    return float(json.loads(done.stdout.splitlines()[-1])["gap_p99_ms"])


def _deployment(stack: BenchStack, name: str) -> str:
    with psycopg.connect(stack.dsn("operator"), connect_timeout=5) as connection:
        row = connection.execute(
            "SELECT id FROM deployments_deployment WHERE name = %s AND deleted_at IS NULL", [name]
        ).fetchone()
    assert row is not None
    return str(row[0].hex)


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"within 30 s it did not happen that {what}")
        time.sleep(0.002)


def goals(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What a client that leaves or does not read may cost."""
    slower = figures["gap_p99_ms_with_slow"]["median"] / max(figures["gap_p99_ms_without"]["median"], 1e-9)
    rows = (
        ("steps made after a client had left, most", figures["left_steps_most"]["max"], MOST_STEPS),
        (
            "ms until requests of clients that left have left the queue",
            figures["queued_gone_ms"]["max"],
            QUEUED_MS,
        ),
        (
            "gateway memory per client that does not read, KiB",
            figures["gateway_kib_per_slow_client"]["max"],
            SLOW_KIB,
        ),
        ("99 % gap of the others, times what it is without them", round(slower, 3), SLOWER),
    )
    found = [
        {"figure": name, "is": value, "goal": f"<= {most:g}", "reached": value <= most}
        for name, value, most in rows
    ]
    whole = figures["slow_got_everything"]["min"]
    return [*found, {"figure": "slow clients that got every token in the end", "is": whole,
                     "goal": f"{N_SLOW}", "reached": whole == N_SLOW}]  # fmt: skip


def as_text(report: dict[str, Any]) -> str:
    """The report as lines for people."""
    lines = [f"{key}: {value}" for key, value in report["assumptions"].items()]
    lines.append("")
    lines += [
        f"{name.replace('_', ' '):<32}{figure['median']:g} ({figure['min']:g} to {figure['max']:g}, n={figure['n']})"
        for name, figure in report["figures"].items()
    ]
    lines.append("")
    for goal in report["goals"]:
        verdict = "reached" if goal["reached"] else "NOT reached"
        lines.append(f"{goal['figure']}: {goal['is']:g} (goal {goal['goal']}): {verdict}")
    return "\n".join(lines)
