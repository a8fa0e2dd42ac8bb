"""The local stack as a user has it: `manage.py up | status | logs | down`, and kill -9 at every part of it."""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.local.postgres import EmbeddedPostgres
from infra.local.process import find_marked, identity_of
from infra.local.stackconfig import ROOT
from infra.local.stackstate import read_state, run_mark
from infra.providers.local import MARK
from tests.infra.local.conditions import until

pytestmark = pytest.mark.stack
PROCESSES = ["postgres", "redis", "migrate", "gateway-1", "gateway-2", "web", "control", "beat"]


class Stack:
    """`manage.py` over one data directory, with nothing of the test run's own environment."""

    def __init__(self, var: Path) -> None:
        self.var = var

    def manage(self, *args: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")}
        env |= {"CORRAL_VAR": str(self.var), "CORRAL_ENGINE": "toy"}
        # Ports nobody prefers, lest two stacks of one machine fight for the usual ones.
        env |= {"CORRAL_GATEWAY_PORT": "18473", "CORRAL_WEB_PORT": "18474"}
        return subprocess.run(
            [sys.executable, "manage.py", *args],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def up(self) -> dict[str, Any]:
        done = self.manage("up", "--detach", "--no-question")
        assert done.returncode == 0, done.stdout + done.stderr
        return self.status()

    def ask(self) -> str:
        """Second start with everything, first question included; what the user sees."""
        done = self.manage("up", "--detach")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.manage("status", "--json").stdout))

    def processes(self) -> dict[str, Any]:
        return {process.name: process for process in read_state(self.var).processes}

    def readyz(self, which: str) -> int:
        port = json.loads((self.var / "ports.json").read_text())[which]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    var = Path(tempfile.mkdtemp(prefix="corral-test-stack-"))
    var.chmod(0o711)
    stack = Stack(var)
    yield stack
    stack.manage("down")
    EmbeddedPostgres(var / "postgres").destroy()
    shutil.rmtree(var, ignore_errors=True)


@pytest.fixture
def running(stack: Stack) -> Stack:
    if stack.status()["phase"] == "down":
        stack.up()
    return stack


def test_everything_comes_up_and_says_where(running: Stack) -> None:
    status = running.status()
    assert status["healthy"] and status["phase"] == "running"
    assert [process["name"] for process in status["processes"]] == PROCESSES
    assert {process["phase"] for process in status["processes"]} == {"ready", "done"}
    assert (running.readyz("gateway"), running.readyz("web")) == (200, 200)
    text = running.manage("status").stdout
    assert status["gateway_url"] in text and status["console_url"] in text


def test_no_secret_is_on_a_command_line_or_in_the_state(running: Stack) -> None:
    secrets = list(json.loads((running.var / "secrets.json").read_text()).values())
    secrets += json.loads((running.var / "postgres" / "credentials.json").read_text()).values()
    secrets += json.loads((running.var / "redis" / "credentials.json").read_text()).values()
    seen = (running.var / "stack.json").read_text()
    for process in running.processes().values():
        if process.pid:
            seen += Path(f"/proc/{process.pid}/cmdline").read_bytes().decode(errors="replace")
    assert len(secrets) == 8
    assert not [secret for secret in secrets if secret in seen]


def test_second_start_is_refused(running: Stack) -> None:
    pid = running.status()["pid"]
    for args in (["up"], ["up", "--detach"]):
        done = running.manage(*args)
        assert done.returncode == 1
        assert f"already running (pid {pid})" in done.stderr and "manage.py down" in done.stderr


def test_logs_of_all_and_of_one(running: Stack) -> None:
    everything = running.manage("logs", "-n", "200").stdout
    assert "postgres  | " in everything and "gateway-1 | " in everything
    only = running.manage("logs", "redis").stdout
    assert "Ready to accept connections" in only and " | " not in only
    unknown = running.manage("logs", "nginx")
    assert unknown.returncode == 1 and "there are beat, control" in unknown.stderr


def test_what_is_killed_comes_back_and_the_rest_recovers_without_restart(running: Stack) -> None:
    killed = ("postgres", "redis", "gateway-1", "control")
    before = running.processes()
    for name in killed:
        os.kill(before[name].pid, signal.SIGKILL)

    def recovered() -> bool:
        now = running.processes()
        return all(now[name].phase == "ready" and now[name].pid != before[name].pid for name in killed)

    until(recovered, "all of them to be ready again", timeout_s=40)
    until(
        lambda: (running.readyz("gateway"), running.readyz("web")) == (200, 200),
        "ready over HTTP",
        timeout_s=40,
    )
    after = running.processes()
    assert {name: after[name].n_restarts for name in PROCESSES} == {
        name: int(name in killed) for name in PROCESSES
    }
    assert {after[name].pid for name in ("web", "gateway-2")} == {
        before[name].pid for name in ("web", "gateway-2")
    }


def test_kill_9_of_the_whole_stack_then_a_second_start_that_answers_then_down(running: Stack) -> None:
    before, ports = read_state(running.var), (running.var / "ports.json").read_text()
    pids = [process.pid for process in before.processes if process.pid]
    os.kill(before.supervisor.pid, signal.SIGKILL)
    until(lambda: not any(identity_of(pid) for pid in pids), "all processes to be gone with their supervisor")
    assert not find_marked(run_mark(before.run_id))
    assert running.manage("status").returncode == 3

    panel = running.ask()
    status = running.status()
    assert status["healthy"] and len(status["machines"]) == 1
    assert (running.var / "ports.json").read_text() == ports
    facts = json.loads((running.var / "quickstart.json").read_text())
    assert "first answer" in panel and facts["api_key"] in panel and facts["admin_password"] in panel
    logs = "".join(path.read_text() for path in running.var.glob("**/*.log*"))
    assert facts["api_key"] not in logs and facts["admin_password"] not in logs

    machine_mark = f"{MARK}={status['machines'][0]['machine_id']}"
    assert find_marked(machine_mark)
    down = running.manage("down")
    assert down.returncode == 0 and "down" in down.stdout
    assert not find_marked(run_mark(read_state(running.var).run_id)) and not find_marked(machine_mark)
    assert running.manage("down").stdout.strip() == "nothing was running"
    assert running.manage("status").returncode == 3


def test_start_that_fails_says_why_and_leaves_nothing(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    stack.manage("down")
    settings = stack.var / "secrets.json"
    kept = settings.read_text()
    settings.write_text(json.dumps({**json.loads(kept), "key_pepper": "not hex"}))
    try:
        done = stack.manage("up", "--detach", "--no-question")
        assert done.returncode == 1
        assert "migrate failed" in done.stdout and "CORRAL_KEY_PEPPER" in done.stdout
        assert "postgres stopped" in done.stdout
        assert not find_marked(run_mark(read_state(stack.var).run_id))
    finally:
        settings.write_text(kept)
