"""Redis or Postgres away on the live stack: retryable errors, never 401, recovery without a restart of ours.

These tests hurt processes of their own stack only, by the pids its supervisor recorded.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psycopg
import pytest

from benchmarks.stack import BenchStack
from infra.local.process import is_alive
from infra.local.stackstate import read_state

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]
Eventually = Callable[..., None]
MODEL = "faulty"


@pytest.fixture(scope="module")
def http(stack: BenchStack) -> Iterator[httpx.Client]:
    stack.manage("deploy", MODEL, "--model", "toy", "--min", "1")
    with httpx.Client(base_url=stack.facts.base_url, timeout=60.0, trust_env=False) as client:
        assert chat(client, stack.facts.api_key).status_code == 200
        yield client


def chat(client: httpx.Client, api_key: str) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    return client.post("/chat/completions", json=body, headers={"authorization": f"Bearer {api_key}"})


def pid_of(stack: BenchStack, name: str) -> int:
    """Pid of a process of the stack, checked by start time."""
    state = read_state(stack.var)
    assert state
    identity = next(p.identity() for p in state.processes if p.name == name)
    assert identity
    assert is_alive(identity)
    return identity.pid


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def wait_until_served(
    http: httpx.Client, api_key: str, eventually: Eventually, *, may_break: bool = False
) -> None:
    """`may_break`: what its kernel had accepted for a process that was killed is reset."""

    def served() -> bool:
        try:
            response = chat(http, api_key)
        except httpx.TransportError:
            assert may_break
            return False
        assert response.status_code in (200, 503), response.text
        if response.status_code == 503:
            assert int(response.headers["retry-after"]) >= 1
        return response.status_code == 200

    eventually(served, "requests are served again", 60.0)


@pytest.mark.parametrize("name", ["redis", "postgres", "gateway-1", "control", "web"])
def test_a_killed_process_comes_back_and_nobody_sees_a_401(
    http: httpx.Client, stack: BenchStack, eventually: Eventually, name: str
) -> None:
    before = pid_of(stack, name)
    os.kill(before, signal.SIGKILL)
    if name == "gateway-1":
        http.close()  # its connections went with it; the client reconnects
    with httpx.Client(base_url=stack.facts.base_url, timeout=60.0, trust_env=False) as client:
        wait_until_served(client, stack.facts.api_key, eventually, may_break=name == "gateway-1")

    def restarted() -> bool:
        state = read_state(stack.var)
        return bool(state) and any(
            p.name == name and p.phase == "ready" and p.pid not in (None, before) for p in state.processes
        )

    eventually(restarted, f"{name} runs again", 60.0)
    assert pid_of(stack, name) != before


def test_a_hanging_redis_is_a_503_with_retry_after(stack: BenchStack, eventually: Eventually) -> None:
    with httpx.Client(base_url=stack.facts.base_url, timeout=60.0, trust_env=False) as client:
        wait_until_served(client, stack.facts.api_key, eventually)
        with frozen(pid_of(stack, "redis")):
            response = chat(client, stack.facts.api_key)
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"]
        wait_until_served(client, stack.facts.api_key, eventually)


def test_a_hanging_postgres_leaves_known_keys_served_and_unknown_ones_503(
    stack: BenchStack, operator: psycopg.Connection, eventually: Eventually
) -> None:
    fresh = str(stack.manage_json("create_key", "never-seen")["api_key"])
    with httpx.Client(base_url=stack.facts.base_url, timeout=60.0, trust_env=False) as client:
        wait_until_served(client, stack.facts.api_key, eventually)
        for _ in range(8):  # both gateway processes have seen the key
            chat(client, stack.facts.api_key)
            with httpx.Client(base_url=stack.facts.base_url, timeout=60.0, trust_env=False) as other:
                chat(other, stack.facts.api_key)
        row = operator.execute(
            "SELECT array_agg(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        ).fetchone()
        backends = [pid for pid in (row[0] if row else []) if _is_postgres(pid)]
        pids = [*backends, pid_of(stack, "postgres")]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            assert chat(client, stack.facts.api_key).status_code == 200
            unsure = chat(client, fresh)
            assert unsure.status_code == 503, "a valid key is never told that it is not"
            assert int(unsure.headers["retry-after"]) >= 1
        finally:
            for pid in pids:
                _continue(pid)
        wait_until_served(client, fresh, eventually)


def _is_postgres(pid: int) -> bool:
    try:
        return b"postgres" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _continue(pid: int) -> None:
    with suppress(ProcessLookupError):  # it ended meanwhile
        os.kill(pid, signal.SIGCONT)
