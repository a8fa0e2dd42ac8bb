"""`python -m controlplane.gateway`: two processes behind one port, a graceful end, errors of
configuration."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from infra.local.ports import free_port
from infra.local.postgres import EmbeddedPostgres

ROOT = Path(__file__).resolve().parents[3]


def environment(redis_url: str, pg_dsn: str, port: int, **more: str) -> dict[str, str]:
    return {
        "PATH": os.defpath,
        "PYTHONPATH": str(ROOT),
        "CORRAL_REDIS_URL": redis_url,
        "CORRAL_PG_DSN_APP": pg_dsn,
        "CORRAL_KEY_PEPPER": "ab" * 16,
        "CORRAL_GATEWAY_PORT": str(port),
        **more,
    }


@contextmanager
def gateways(env: dict[str, str], n: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "controlplane.gateway"],
            env={**env, "CORRAL_GATEWAY_NAME": f"gw-{i}"},
            stderr=subprocess.PIPE,
        )
        for i in range(n)
    ]
    try:
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()


def wait_for(condition, timeout_s: float = 60.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            value = condition()
        except httpx.HTTPError:
            value = None
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError("not in time")


def test_two_processes_share_one_port_and_end_gracefully(redis_url: str, pg_server: EmbeddedPostgres) -> None:
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    with gateways(environment(redis_url, pg_server.dsn("app"), port), 2) as processes:

        def both_seen() -> bool:
            return len({name_of(base) for _ in range(8)}) == 2

        wait_for(lambda: httpx.get(base + "/readyz").status_code == 200)
        wait_for(both_seen)
        processes[0].send_signal(signal.SIGTERM)
        assert processes[0].wait(10) == 0
        for _ in range(10):
            assert httpx.get(base + "/readyz").status_code == 200, "the other one goes on"
        processes[1].send_signal(signal.SIGINT)
        assert processes[1].wait(10) == 0
        for process in processes:
            assert process.stderr
            for line in process.stderr.read().decode().splitlines():
                assert json.loads(line)["level"] in ("info", "warning"), line


def name_of(base: str) -> str:
    text = httpx.get(base + "/metrics").text
    return text.partition('corral_gateway_in_flight{gateway="')[2].partition('"')[0]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"CORRAL_REDIS_URL": ""}, "CORRAL_REDIS_URL"),
        ({"CORRAL_KEY_PEPPER": "zz"}, "CORRAL_KEY_PEPPER"),
        ({"CORRAL_GATEWAY_PORT": "99999"}, "CORRAL_GATEWAY_PORT='99999': must be a number from 1 to 65535"),
    ],
)
def test_configuration_mistake_is_one_line_and_exit_2(changes: dict[str, str], names: str) -> None:
    env = environment("redis://127.0.0.1:1/0", "postgresql://x@127.0.0.1:1/x", 8400) | changes
    done = subprocess.run(
        [sys.executable, "-m", "controlplane.gateway"], env=env, capture_output=True, timeout=30
    )
    assert done.returncode == 2
    assert names in done.stderr.decode()
    assert done.stderr.decode().count("\n") == 1


def test_port_taken_by_another_program_is_an_error(redis_url: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        env = environment(redis_url, "postgresql://x@127.0.0.1:1/x", taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "controlplane.gateway"], env=env, capture_output=True, timeout=30
        )
    assert done.returncode != 0
    assert b"Address already in use" in done.stderr
