"""A machine's agent as a process, against a small enrolment server and the trusted side of a cell."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec

from tests.workers.serving import Cell
from tests.workers.waiting import wait_until
from workers.agent.agent import Agent
from workers.agent.known import Limits
from workers.config import AgentConfig, ServeTuning
from workers.contract import Heartbeat, ReplicaPhase, ReplicaSpec, ReplicaStatus
from workers.engine.base import EngineProfile

TOY = EngineProfile(engine="toy", toy_step_ms=2, max_model_len=512, toy_faults=True)


class EnrolServer:
    """POST → a Redis user with a password of its own, once per proof."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.proofs: set[str] = set()
        self.n_enrolled = 0
        self.asked: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, answer = outer.enrol(question)
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/internal/enrol"

    def enrol(self, question: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if question["proof"] not in self.proofs:
            return 403, {"error": "unknown or used proof"}
        self.proofs.remove(question["proof"])
        self.asked.append(question)
        self.n_enrolled += 1
        machine = question["machine_id"]
        return 200, {
            "machine_id": machine,
            "cell": self.cell.keys.cell,
            "redis_url": self.cell.add_machine(machine),
            "heartbeat_ms": 200,
        }

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class AgentProcess:
    """One machine: its directory, its agent, and what control says to it and hears from it."""

    def __init__(
        self, cell: Cell, enrol: EnrolServer, var: Path, *, machine: str = "m1", engine: str = "toy"
    ) -> None:
        self.cell = cell
        self.enrol = enrol
        self.machine = machine
        self.var = var / machine
        self.keys = cell.keys.machine(machine)
        self.engine = engine
        self.model_cache = var / "models"
        self.process: subprocess.Popen[bytes] | None = None
        self.thread: threading.Thread | None = None
        self._inside: tuple[asyncio.AbstractEventLoop, Agent] | None = None
        self.heard = cell.r.pubsub(ignore_subscribe_messages=True)
        self.heard.subscribe(self.keys.event_channel)
        self.heard.get_message(timeout=1)
        self.events: list[ReplicaStatus] = []

    def start(self, *, proof: bool = True) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith("CORRAL_")}
        if proof:
            env["CORRAL_ENROL_PROOF"] = secrets.token_hex(8)
            self.enrol.proofs.add(env["CORRAL_ENROL_PROOF"])
        self.var.mkdir(parents=True, exist_ok=True)
        with (self.var / "agent.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "workers.agent", "--machine-id", self.machine, "--enrol-url", self.enrol.url,
                    "--var", str(self.var), "--cell", self.cell.keys.cell, "--engine", self.engine,
                    "--model-cache", str(self.model_cache),
                ],
                env=env, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def run_inside(self, *, limits: Limits | None = None, tuning: ServeTuning | None = None) -> None:
        """The agent on a thread of this process, with knobs that its command line does not have."""
        proof = secrets.token_hex(8)
        self.enrol.proofs.add(proof)
        config = AgentConfig(
            machine=self.machine,
            enrol_url=self.enrol.url,
            var_dir=self.var,
            model_cache=self.model_cache,
            cell=self.cell.keys.cell,
            engine="toy",
            proof=proof,
        )

        async def live() -> None:
            agent = Agent(config, limits=limits, tuning=tuning)
            self._inside = (asyncio.get_running_loop(), agent)
            await agent.run()

        self.thread = threading.Thread(target=lambda: asyncio.run(live()), daemon=True)
        self.thread.start()

    def kill(self) -> None:
        """SIGKILL to the agent alone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        """SIGTERM; its exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(20)

    def destroy(self) -> None:
        """Whatever the test left: the agent, and through its zygote every replica."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self._inside is not None and self.thread is not None:
            loop, agent = self._inside
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(agent.stop)
            self.thread.join(15)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.heard.close()

    def processes(self) -> list[int]:
        """Pids of this machine that still run, found by its directory in their command line or log."""
        wanted = str(self.var).encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if wanted in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
        return found

    def desire(self, *specs: ReplicaSpec) -> None:
        """The whole desired state, as control writes it."""
        with self.cell.r.pipeline(transaction=True) as pipe:
            generation = self.cell.r.hget(self.keys.desired, "generation") or 0
            pipe.delete(self.keys.desired)
            pipe.hset(self.keys.desired, "generation", int(generation) + 1)
            for spec in specs:
                pipe.hset(self.keys.desired, spec.replica, msgspec.json.encode(spec))
            pipe.lpush(self.keys.bell, "1")
            pipe.execute()

    def status(self, replica: str) -> ReplicaStatus | None:
        payload = self.cell.r.hget(self.keys.actual, replica)
        return None if payload is None else msgspec.json.decode(payload, type=ReplicaStatus)

    def heartbeat(self, replica: str | None = None) -> Heartbeat | None:
        payload = self.cell.r.get(self.keys.heartbeat(replica))
        return None if payload is None else msgspec.json.decode(payload, type=Heartbeat)

    def await_phase(self, replica: str, *phases: ReplicaPhase, deadline_s: float = 60.0) -> ReplicaStatus:
        """Until `actual` says so, which it must before any other final phase."""

        def arrived() -> bool:
            status = self.status(replica)
            if status is None or status.phase not in phases:
                if status is not None and status.phase is ReplicaPhase.FAILED:
                    raise AssertionError(f"{replica} failed: {status}")
                return False
            return True

        try:
            wait_until(arrived, f"{replica} to be {phases}", deadline_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None
        status = self.status(replica)
        assert status is not None
        return status

    def hear(self) -> list[ReplicaStatus]:
        """All events so far."""
        while (message := self.heard.get_message(timeout=0.01)) is not None:
            self.events.append(msgspec.json.decode(message["data"], type=ReplicaStatus))
        return self.events

    def logs(self) -> str:
        texts = []
        for path in (self.var / "agent.log", self.var / "zygote.log", *(self.var / "log").glob("*.log")):
            if path.exists():
                texts.append(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}")
        return "\n".join(texts)


@contextlib.contextmanager
def agent_on(
    cell: Cell,
    var: Path,
    *,
    limits: Limits | None = None,
    tuning: ServeTuning | None = None,
    **options: Any,
) -> Iterator[AgentProcess]:
    """A started agent (inside this process when it is given knobs); everything of it is ended afterwards."""
    enrol = EnrolServer(cell)
    agent = AgentProcess(cell, enrol, var, **options)
    if limits or tuning:
        agent.run_inside(limits=limits, tuning=tuning)
    else:
        agent.start()
    try:
        yield agent
    finally:
        agent.destroy()
        enrol.close()


def spec(replica: str = "r1", **options: Any) -> ReplicaSpec:
    profile = options.pop("profile", TOY.to_json())
    base: dict[str, Any] = {"model_digest": "", "model_source": "", "slots": 8, "grace_s": 5.0}
    return ReplicaSpec(replica=replica, deployment="d1", profile=profile, **(base | options))
