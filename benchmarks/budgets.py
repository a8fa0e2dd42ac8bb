"""`manage.py bench budgets`: what window budgets cost a request, in Redis (admit, settle) and in the gateway.

One Redis of its own, admissions and settlements in batches of 8 as gateways send them, its CPU time per request; the
cases take turns, so that a slow minute hurts them all. The gateway's part is what it adds to the arguments and their
encoding. No stack is needed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import redis

from controlplane.gateway import windows
from controlplane.gateway.directory import BudgetRow
from controlplane.gateway.windows import WindowBudget
from controlplane.policy.flows import ANY_MS
from controlplane.policy.periods import Period
from infra.local.redis import EmbeddedRedis
from workers import scripts
from workers.keys import RETENTION_MS, CellKeys

BATCH: Final = 8
N_BATCHES: Final = 250
KEYS: Final = CellKeys("b0")
CASES: Final = {
    "none": (-1, ()),
    "lifetime": (10**15, ()),
    "one month": (-1, (Period.MONTH,)),
    "one rolling": (-1, (Period.ROLLING,)),
    "three": (-1, (Period.DAY, Period.MONTH, Period.ROLLING)),
    "eight": (-1, (Period.DAY, Period.WEEK, Period.MONTH, Period.ROLLING) * 2),
}
_encode = msgspec.msgpack.Encoder().encode


def measure(*, repeats: int = 7, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """The least of the repeats; returns the report that `--json` prints."""
    cpu: dict[str, list[float]] = {name: [] for name in CASES}
    gateway: dict[str, list[float]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedRedis(Path(folder) / "redis")
        server.start()
        try:
            server.wait_ready()
            with server.connect() as client:
                for script in scripts.TRUSTED_SCRIPTS:
                    client.script_load(script.source)
                for n in range(repeats + 1):
                    progress(f"round {n} of {repeats}" if n else "warming up")
                    for name, (lifetime, kinds) in CASES.items():
                        cost = _redis_us(client, lifetime, budgets(kinds))
                        encoding = _gateway_us(budgets(kinds))
                        if n:
                            cpu[name].append(cost)
                            gateway[name].append(encoding)
        finally:
            server.destroy()
    # The least: on a machine that others use too, noise only adds.
    rows = {name: {"redis_us": min(cpu[name]), "gateway_us": min(gateway[name])} for name in CASES}
    return {"rows": rows, "repeats": repeats, "goals": []}


def as_text(report: dict[str, Any]) -> str:
    """A table, with what each case adds to that without budgets."""
    none = report["rows"]["none"]
    lines = [f"{'window budgets':<16}{'Redis us/request':>18}{'added':>9}{'gateway us':>12}{'added':>9}"]
    for name, row in report["rows"].items():
        lines.append(
            f"{name:<16}{row['redis_us']:>18.1f}{row['redis_us'] - none['redis_us']:>+9.1f}"
            f"{row['gateway_us']:>12.2f}{row['gateway_us'] - none['gateway_us']:>+9.2f}"
        )
    lines.append(
        f"least of {report['repeats']}; admission and settlement in batches of {BATCH}, CPU of Redis"
    )
    return "\n".join(lines)


def budgets(kinds: tuple[Period, ...]) -> tuple[WindowBudget, ...]:
    return windows.of(
        BudgetRow(
            f"{n:032x}",
            "b",
            "key",
            10**15,
            kind,
            "Europe/Berlin",
            rolling_hours=24 if kind is Period.ROLLING else None,
        )
        for n, kind in enumerate(kinds)
    )


def arguments(request: str, lifetime: int, found: tuple[WindowBudget, ...]) -> bytes:
    """One admission as a gateway encodes it."""
    limits = (-1, -1, -1, -1)
    return _encode(
        (
            KEYS.prefix, "1800000000000", request, "d" * 32, "g1", "7", "c" * 32, 300, "64", 1_000, 1_800_000_000_000,
            100_000, 300.0, 2.0, "cs:", "0", "a" * 32, *limits, lifetime, 100, "b" * 32, *limits, -1, 100, "c" * 32,
            *limits, -1, 100, "0", 64, "", 0, 60_000, 0, 0, ANY_MS, 0, "r1",
            *(windows.argument(found, "m") if found else ()),
        )
    )  # fmt: skip


def _redis_us(client: redis.Redis, lifetime: int, found: tuple[WindowBudget, ...]) -> float:
    """CPU of Redis for an admission and a settlement, without the bodies' SET."""
    client.flushdb()
    client.evalsha(scripts.ENROL.sha, 0, KEYS.prefix, 1_800_000_000_000, "r1", "m1", "d" * 32, 10**6)
    client.evalsha(scripts.SEED.sha, 0, KEYS.prefix, "key", "a" * 32, 0)
    for budget in found:
        _seed(client, budget)
    requests = [f"{n:032x}" for n in range(BATCH * N_BATCHES)]
    with client.pipeline(transaction=False) as pipeline:
        for request in requests:
            pipeline.set(KEYS.body(request), b"B" * 1_000)
        pipeline.execute()
    began = _used_us(client)
    for i in range(0, len(requests), BATCH):
        given = [part for r in requests[i : i + BATCH] for part in (arguments(r, lifetime, found), b"")]
        answers = client.evalsha(scripts.PASS.sha, 0, "", 60_000, *given)[2:]
        assert all(answer[0] == b"bound" for answer in answers), answers
        ends = [part for r in requests[i : i + BATCH] for part in (r, 300, 64, 428, 0)]
        settled = _encode((KEYS.prefix, 1_800_000_000_000, RETENTION_MS, *ends))
        client.evalsha(scripts.PASS.sha, 0, settled, 0)
    return (_used_us(client) - began) / len(requests)


def _seed(client: redis.Redis, budget: WindowBudget) -> None:
    """Its counter in the window that Redis thinks it is: asked by an admission that finds none."""
    client.set(KEYS.body("seed"), b"B")
    verdict = client.evalsha(scripts.PASS.sha, 0, "", 60_000, arguments("seed", -1, (budget,)), b"")[2]
    assert verdict[0] == b"seed", verdict
    client.evalsha(
        scripts.SEED_WINDOW.sha, 0, KEYS.prefix, budget.id, int(verdict[3]), int(verdict[4]), budget.buckets.width_ms,
        budget.buckets.n, 10**9,
    )  # fmt: skip


def _used_us(client: redis.Redis) -> float:
    info: Any = client.info("cpu")
    return 1e6 * float(info["used_cpu_user_main_thread"] + info["used_cpu_sys_main_thread"])


def _gateway_us(found: tuple[WindowBudget, ...], n: int = 20_000) -> float:
    """CPU of making and encoding the arguments of one admission."""
    began = time.process_time()
    for _ in range(n):
        arguments("r" * 32, -1, found)
    return 1e6 * (time.process_time() - began) / n
