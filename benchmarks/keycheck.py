"""`manage.py bench keycheck`: what checking a cached key costs, what that asks of Postgres, and how long known keys go
on without it.

The CPU figure is of the gateway's own cache on uvloop, with and without scopes; questions are counted in both gateways
of a private stack while they serve; the outage is a proxy in front of the stack's Postgres that is closed, with a clock
that is moved on instead of waited for.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import uvloop

from benchmarks.delayproxy import DelayProxy
from benchmarks.keyrows import copies, new_key, pepper_of
from benchmarks.probe import Probe, one_for_each_gateway
from benchmarks.stack import BenchStack, bench_stack
from benchmarks.stats import summary
from controlplane.tenants import api_keys

N_KEYS, N_CHECKS, N_REQUESTS = 1_000, 100_000, 2_000
GOAL_US = 10.0
_FIGURE = r"^corral_gateway_{}_total\{{[^}}]*\}} (\S+)"


def measure(*, repeats: int = 7, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Everything; returns the report that `--json` prints."""
    progress("starting a private stack with the toy engine")
    with bench_stack("toy") as stack:
        key_id, bound_key = new_key(stack, "keycheck")
        keys = copies(stack, "tenants_apikey", key_id, api_keys.INFERENCE, N_KEYS)
        progress(f"{N_KEYS} keys cached, {N_CHECKS} checks, {repeats} times")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            report = runner.run(_cached_and_away(stack, keys, repeats))
            progress(f"{N_REQUESTS} requests to each gateway")
            report["served"] = runner.run(_served(stack, bound_key))
    report["goals"] = _goals(report)
    return report


async def _cached_and_away(stack: BenchStack, keys: list[str], repeats: int) -> dict[str, Any]:
    from controlplane.gateway.auth import KeyCache
    from controlplane.gateway.config import GatewayConfig
    from controlplane.gateway.directory import PgDirectory
    from controlplane.gateway.errors import ApiError
    from controlplane.gateway.keybounds import Bounds
    from controlplane.tenants.key_scopes import Route, network_of

    moved_s = 0.0
    dsn = stack.dsn("app")
    server = urlsplit(dsn)
    stale_s = GatewayConfig("", "", b"").key_stale_s
    with DelayProxy(lambda: ("127.0.0.1", int(server.port or 5432)), 0) as proxy:
        directory = PgDirectory(dsn.replace(f":{server.port}", f":{proxy.port}"), timeout_s=1.0)
        await directory.open()
        cache = KeyCache(
            directory,
            pepper_of(stack),
            fresh_s=1e6,
            stale_s=1e6 + stale_s,
            clock=lambda: time.monotonic() + moved_s,
        )
        headers = [b"Bearer " + key.encode() for key in keys]
        for header in headers:
            await cache.authenticate(header, None)
        n_asked = cache.n_lookups
        bounds = Bounds(frozenset(Route), tuple(network_of(f"10.{n}.0.0/16") for n in range(8)))
        request = {"client": ("10.7.0.1", 4711), "headers": [(b"host", b"x")] * 8}
        plain, scoped, checks = [], [], 0.0
        for _ in range(repeats):
            plain.append(await _cpu_us(cache, headers))
            started = time.process_time()
            for _ in range(N_CHECKS // 10):
                bounds.check(Route.CHAT, request, ())
            checks = (time.process_time() - started) / (N_CHECKS // 10) * 1e6
            scoped.append(plain[-1] + checks)
        n_asked_cached = cache.n_lookups - n_asked
        unknown = b"Bearer " + api_keys.generate(pepper_of(stack)).plaintext.encode()

    # The proxy is closed: Postgres is away for this cache.
    async def told(header: bytes) -> str:
        try:
            await cache.authenticate(header, None)
        except ApiError as error:
            return error.code
        return "ok"

    moved_s = 1e6 + 1  # no longer fresh
    away = {"unknown_key": await told(unknown), "known_key_at_once": await told(headers[0])}
    moved_s = 1e6 + stale_s - 60
    away["known_key_a_minute_before_the_end"] = await told(headers[1])
    moved_s = 1e6 + stale_s + 60
    away["known_key_a_minute_after_the_end"] = await told(headers[2])
    await directory.close()
    return {
        "assumptions": {"keys": N_KEYS, "checks": N_CHECKS, "repeats": repeats},
        "cached_check_cpu_us": summary(plain),
        "with_routes_and_8_networks_cpu_us": summary(scoped),
        "questions_to_postgres_during_checks": n_asked_cached,
        "without_postgres": {"known_keys_go_on_s": stale_s, **away},
    }


async def _cpu_us(cache: Any, headers: list[bytes]) -> float:
    started = time.process_time()
    for _ in range(N_CHECKS // len(headers)):
        for header in headers:
            await cache.authenticate(header, None)
    return (time.process_time() - started) / (N_CHECKS // len(headers) * len(headers)) * 1e6


async def _served(stack: BenchStack, key: str) -> dict[str, Any]:
    """Hits and questions of both gateways over requests with one key."""
    gateways = await one_for_each_gateway(stack.port, 2)
    report = {}
    for name, probe in gateways.items():
        await probe.ask("/v1/models", key)
        before = await _figures(probe)
        started = time.monotonic()
        for _ in range(N_REQUESTS):
            status, _ = await probe.ask("/v1/models", key)
            if status != 200:
                raise RuntimeError(f"/v1/models answered {status}")
        after = await _figures(probe)
        report[name] = {
            "requests": N_REQUESTS,
            "seconds": round(time.monotonic() - started, 1),
            **{figure: int(after[figure] - before[figure]) for figure in before},
        }
        probe.close()
    return report


async def _figures(probe: Probe) -> dict[str, float]:
    _, text = await probe.ask("/metrics")
    found = {}
    for figure in ("key_cache_hits", "key_lookups"):
        match = re.search(_FIGURE.format(figure), text.decode(), re.M)
        found[figure] = float(match[1]) if match else 0.0
    return found


def _goals(report: dict[str, Any]) -> list[dict[str, Any]]:
    away = report["without_postgres"]
    # A key is read again every 30 s, so a run may meet one or two such moments.
    asked = max(
        gateway["key_lookups"] - (1 + int(gateway["seconds"] // 30)) for gateway in report["served"].values()
    )
    return [
        {"figure": "cached_check_cpu_us", "goal_at_most": GOAL_US, "median": report["cached_check_cpu_us"]["median"],
         "reached": report["cached_check_cpu_us"]["median"] <= GOAL_US},
        {"figure": "with_routes_and_8_networks_cpu_us", "goal_at_most": GOAL_US,
         "median": report["with_routes_and_8_networks_cpu_us"]["median"],
         "reached": report["with_routes_and_8_networks_cpu_us"]["median"] <= GOAL_US},
        {"figure": "questions_to_postgres_during_checks", "goal_at_most": 0,
         "median": report["questions_to_postgres_during_checks"],
         "reached": report["questions_to_postgres_during_checks"] == 0},
        {"figure": "questions_beyond_refreshing_every_30_s", "goal_at_most": 0, "median": max(asked, 0),
         "reached": asked <= 0},
        {"figure": "outage", "reached": (
            away["known_key_at_once"], away["known_key_a_minute_before_the_end"],
            away["known_key_a_minute_after_the_end"], away["unknown_key"],
         ) == ("ok", "ok", "auth_unavailable", "auth_unavailable")},
    ]  # fmt: skip


def as_text(report: dict[str, Any]) -> str:
    away = report["without_postgres"]
    cpu, scoped = report["cached_check_cpu_us"], report["with_routes_and_8_networks_cpu_us"]
    lines = [
        f"cached key check: {cpu['median']:.2f} µs CPU ({cpu['min']:.2f} to {cpu['max']:.2f}); "
        f"bound to routes and 8 networks: {scoped['median']:.2f} µs",
        f"questions to Postgres during {report['assumptions']['checks']} cached checks, "
        f"{report['assumptions']['repeats']} times: {report['questions_to_postgres_during_checks']}",
    ]
    lines += [
        f"{name}: {g['requests']} requests in {g['seconds']} s: {g['key_cache_hits']} from the cache, "
        f"{g['key_lookups']} questions to Postgres (a key is read again every 30 s)"
        for name, g in report["served"].items()
    ]
    lines += [
        f"Postgres away: known keys go on for {away['known_keys_go_on_s']:g} s "
        f"(at once: {away['known_key_at_once']}, a minute before the end: {away['known_key_a_minute_before_the_end']}, "
        f"a minute after it: {away['known_key_a_minute_after_the_end']}); a key never seen: {away['unknown_key']}",
        *goal_lines(report["goals"]),
    ]
    return "\n".join(lines)


def goal_lines(goals: list[dict[str, Any]]) -> list[str]:
    return [
        f"{goal['figure']}"
        + (f" {goal['median']} (goal ≤ {goal['goal_at_most']})" if "goal_at_most" in goal else "")
        + (": reached" if goal["reached"] else ": NOT reached")
        for goal in goals
    ]
