"""`manage.py bench revoke`: how long a revoked key still works anywhere, with two gateways, under load.

Each key is in use on both gateways when it is revoked, over the REST API or, as if the announcement on Redis had been
lost, by a change in Postgres alone. Both gateways are asked all the time; the figure ends with the answer of the slower
one's first refusal, so it holds the REST call, the way there, and the asking itself.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import psycopg
import uvloop

from benchmarks.keycheck import goal_lines
from benchmarks.keyrows import copies, new_key
from benchmarks.loadgen import Plan
from benchmarks.probe import Probe, one_for_each_gateway
from benchmarks.stack import ROOT, BenchStack, bench_stack
from benchmarks.stats import quantile
from controlplane.tenants import api_keys

N_REVOKED, N_SILENT, N_CONNECTIONS = 120, 40, 16
GOAL_MS = 1_000.0
_PAUSE_S = 0.002  # between two questions to a gateway
_LIMIT_S = 30.0


def measure(*, repeats: int = 1, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Both ways; returns the report that `--json` prints."""
    progress("starting a private stack with the toy engine")
    with bench_stack("toy") as stack:
        token = str(stack.manage_json("create_token", "bench-revoke")["token"])
        like, _ = new_key(stack, "bench-revoke")
        report: dict[str, Any] = {"assumptions": {
            "gateways": 2, "load": f"{N_CONNECTIONS} connections with plain answers", "repeats": repeats,
        }}  # fmt: skip
        with _Load(stack):
            for way, n in (("rest", N_REVOKED), ("postgres_only", N_SILENT)):
                keys = copies(stack, "tenants_apikey", like, api_keys.INFERENCE, n * repeats)
                progress(f"{n * repeats} keys revoked, {way}")
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    seconds = runner.run(_revoke_all(stack, keys, token if way == "rest" else None))
                report[way] = {
                    "revoked": len(seconds),
                    **{
                        name: round(quantile(seconds, q) * 1000, 1)
                        for name, q in (("p50_ms", 0.5), ("p99_ms", 0.99))
                    },
                    "max_ms": round(max(seconds) * 1000, 1),
                }
    report["goals"] = [
        {"figure": f"{way}_p99_ms", "goal_at_most": GOAL_MS, "median": report[way]["p99_ms"],
         "reached": report[way]["p99_ms"] < GOAL_MS}
        for way in ("rest", "postgres_only")
    ]  # fmt: skip
    return report


class _Load:
    """Requests on other keys of the same gateways, until the block ends."""

    def __init__(self, stack: BenchStack) -> None:
        body = {
            "model": stack.facts.deployment, "max_tokens": 16,
            "messages": [{"role": "user", "content": "How many cows are in the corral?"}],
        }  # fmt: skip
        self._plan = Plan(
            host="127.0.0.1", port=stack.port, path="/v1/chat/completions",
            headers={"authorization": f"Bearer {stack.facts.api_key}"}, bodies=[json.dumps(body)],
            n_connections=N_CONNECTIONS, n_requests=10_000_000, limit_s=240,
        )  # fmt: skip

    def __enter__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.loadgen"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(asdict(self._plan)) + "\n")
        self._process.stdin.flush()
        if self._process.stdout.readline().strip() != "ready":
            raise RuntimeError("the load generator could not connect")
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is not None and error[0] is None:
            raise RuntimeError("the load ended before the measurement did")
        self._process.kill()
        self._process.wait()


async def _revoke_all(stack: BenchStack, keys: list[str], token: str | None) -> list[float]:
    """Seconds from the call to the last gateway's first refusal, for each key."""
    gateways = list((await one_for_each_gateway(stack.port, 2)).values())
    web = await Probe.open(int(stack.facts.console_url.rsplit(":", 1)[1].split("/")[0]))
    seconds = []
    with psycopg.connect(stack.dsn("operator"), autocommit=True) as operator:
        for key in keys:
            lookup = api_keys.lookup_of(key)
            row = operator.execute("SELECT id FROM tenants_apikey WHERE lookup = %s", (lookup,)).fetchone()
            assert row is not None
            for gateway in gateways:
                status, _ = await gateway.ask("/v1/models", key)
                if status != 200:
                    raise RuntimeError(f"the key was refused before it was revoked: {status}")
            started = time.monotonic()
            watching = [asyncio.ensure_future(_refused_at(gateway, key, started)) for gateway in gateways]
            await asyncio.sleep(0)
            if token is not None:
                status, body = await web.ask(f"/api/v1/keys/key_{row[0].hex}", token, "DELETE")
                if status != 204:
                    raise RuntimeError(f"DELETE answered {status}: {body[:200]!r}")
            else:
                operator.execute("UPDATE tenants_apikey SET revoked_at = now() WHERE id = %s", (row[0],))
            seconds.append(max(await asyncio.gather(*watching)))
    for probe in (*gateways, web):
        probe.close()
    return seconds


async def _refused_at(gateway: Probe, key: str, started: float) -> float:
    while True:
        status, _ = await gateway.ask("/v1/models", key)
        now = time.monotonic() - started
        if status == 401:
            return now
        if status != 200 or now > _LIMIT_S:
            raise RuntimeError(f"after {now:.1f} s a gateway answers {status}")
        await asyncio.sleep(_PAUSE_S)


def as_text(report: dict[str, Any]) -> str:
    names = {"rest": "over the REST API", "postgres_only": "with the announcement on Redis lost"}
    return "\n".join([
        *(f"{report[way]['revoked']} keys revoked {name}: refused everywhere after p50 {report[way]['p50_ms']} ms, "
          f"p99 {report[way]['p99_ms']} ms, at most {report[way]['max_ms']} ms" for way, name in names.items()),
        f"2 gateways, {report['assumptions']['load']}",
        *goal_lines(report["goals"]),
    ])  # fmt: skip
