"""One real stack for the end-to-end tests: `manage.py up` in a directory of its own, the real engine, the demo model.

Session-scoped, because the demo model is converted once (half a minute); ended with `manage.py down`, after which no
process of it may be left.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import psutil
import psycopg
import pytest

from benchmarks.stack import BenchStack, bench_stack
from infra.local.preflight import engine_verdict, gather


def engine_that_runs() -> str:
    """vllm, or toy on a machine that cannot run it (said in the test report)."""
    runs, _ = engine_verdict(gather())
    return "vllm" if runs else "toy"


@pytest.fixture(scope="session")
def stack() -> Iterator[BenchStack]:
    outside = {"CORRAL_OUTBOUND_ALLOW": "127.0.0.1/32"}  # servers of the tests stand for endpoints elsewhere
    with bench_stack(engine_that_runs(), env_of=lambda _: outside) as running:
        yield running
        var = str(running.var)
    left = [p for p in psutil.process_iter(["pid", "environ"]) if _belongs(p, var)]
    assert not left, f"processes outlived `manage.py down`: {left}"


def _belongs(process: psutil.Process, var: str) -> bool:
    if process.pid == os.getpid():
        return False
    return (process.info["environ"] or {}).get("CORRAL_VAR") == var


@pytest.fixture
def operator(stack: BenchStack) -> Iterator[psycopg.Connection]:
    """A connection that sees all tenants' rows of the stack."""
    with psycopg.connect(stack.dsn("operator"), autocommit=True, connect_timeout=5) as connection:
        yield connection


@pytest.fixture
def eventually() -> Callable[[Callable[[], object], str], None]:
    """`eventually(condition, what)`: polls until true; fails naming what never came."""

    def wait(condition: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline_s:
                raise AssertionError(f"within {timeout_s:.0f} s it did not happen that {what}")
            time.sleep(0.1)

    return wait
