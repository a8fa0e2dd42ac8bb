"""`manage.py bench cells`: two cells on this machine, each with its own Redis, gateways and toy engine; one Postgres.

A tenant calls a deployment of the same name in both at once: for each kind of limit, what both together admitted must
stay within it. Then one cell's Redis is killed and loses everything, while streams run in both: the other cell's
streams must be those of an undisturbed run, and the bereaved cell's clients must be told to try again.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg

from benchmarks.limits import IN_NANO, OUT_NANO
from benchmarks.stack import BenchStack, bench_stack
from controlplane import ids
from infra.local.hold import held
from infra.local.redis import EmbeddedRedis
from infra.local.stackstate import read_state

MODEL = "cells"
CELLS = ("c0", "c1")
# Gateways of these stacks may not believe for a quarter of an hour that they are alone: else so long would pass before
# a second cell may serve.
KNOWN_S = 5
N_EACH, N_TOKENS, STEP_MS = 48, 200, 20
LIMITS = {"rpm": 60, "output-tpm": 20 * N_TOKENS, "max-concurrency": 16}
N_CREDIT_STREAMS, CREDIT_TOKENS = 16, 1500
N_STREAMS = 16
LEASED_WITHIN_S, BOOKED_WITHIN_S, STREAM_LIMIT_S = 120.0, 60.0, 90.0


@dataclass
class Reply:
    """One request as its client saw it; instants in seconds on one clock."""

    status: int = 0
    text: str = ""
    finish: str = ""
    error: str = ""
    n_prompt: int = 0
    n_completion: int = 0
    slowest_gap_s: float = 0.0

    @property
    def cost_nano(self) -> int:
        return self.n_prompt * IN_NANO + self.n_completion * OUT_NANO


def measure(*, repeats: int = 1, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """All limits `repeats` times, then the lost Redis; returns the report that `--json` prints."""
    known = {"CORRAL_GATEWAY_KEY_STALE_S": str(KNOWN_S), "CORRAL_GATEWAY_KEY_FRESH_S": str(KNOWN_S)}
    progress("starting two cells")
    with bench_stack("toy", env_of=lambda var: known) as one:

        def second(var: Path) -> dict[str, str]:
            shutil.copy(
                one.var / "secrets.json", var / "secrets.json"
            )  # one pepper, or no key is known there
            dsns = {f"CORRAL_PG_DSN_{role.upper()}": one.dsn(role) for role in ("owner", "app", "operator")}
            return known | dsns | {"CORRAL_CELL": CELLS[1]}

        with bench_stack("toy", env_of=second) as two:
            stacks = (one, two)
            for stack in stacks:
                stack.manage("deploy", MODEL, "--model", "toy", "--min", "1", "--max", "1", "--slo", "batch",
                             "--profile=max_num_seqs=256", f"--profile=toy_step_ms={STEP_MS}")  # fmt: skip
                stack.manage("ask", "ready?", "--model", MODEL)
            cases = []
            for number in range(repeats):
                for kind, worth in LIMITS.items():
                    cases.append(_limit(stacks, kind, worth, number))
                    progress(f"{kind}: {cases[-1]}")
                cases.append(_credit(stacks, number))
                progress(f"last credit: {cases[-1]}")
            progress("losing the Redis of the second cell")
            lost = _lose_redis(stacks, progress)
    report: dict[str, Any] = {
        "assumptions": {
            "cells": "two, each with its own Redis, gateways, machine and toy engine; one Postgres",
            "clients": f"{N_EACH} requests at once in each cell; limits on the organization",
            "budget": f"{N_CREDIT_STREAMS} streams in each cell share money for a quarter of what they want",
            "repeats": repeats,
        },
        "limits": cases,
        "lost_redis": lost,
    }  # fmt: skip
    report["goals"] = goals(cases, lost)
    return report


# -- limits


def _tenant(stacks: tuple[BenchStack, ...], slug: str, limits: dict[str, int]) -> tuple[str, str]:
    """(organization id, key) of a new tenant whose limits are on the organization, once both cells hold a part."""
    made = stacks[0].manage_json("create_organization", slug, "--owner", "cells@corral.local")
    options = [part for name, value in limits.items() for part in (f"--{name}", str(value))]
    key = stacks[0].manage_json("create_key", "cells", "--organization", slug, "--project", "main",
                                "--limits-on", "organization", *options)  # fmt: skip
    for stack in stacks:
        stack.manage("share", MODEL, "--with", slug)
    organization = ids.from_text(ids.Prefix.ORGANIZATION, made["id"]).hex
    deadline_s = time.monotonic() + LEASED_WITHIN_S
    while not _leased(stacks[0], organization, budget="budget-nano" in limits):
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"within {LEASED_WITHIN_S:g} s not both cells held a part of {slug}'s limits")
        time.sleep(0.25)
    return organization, str(key["api_key"])


def _leased(stack: BenchStack, organization: str, *, budget: bool) -> bool:
    query = "SELECT count(*) FROM tenants_celllease WHERE organization_id = %s AND scope = %s AND granted > 0"
    with psycopg.connect(stack.dsn("operator"), connect_timeout=5) as connection:
        for scope in ("share", "org") if budget else ("share",):
            row = connection.execute(query, [organization, scope]).fetchone()
            if row is None or row[0] < len(CELLS):
                return False
    return True


def _limit(stacks: tuple[BenchStack, ...], kind: str, worth: int, number: int) -> dict[str, Any]:
    """`N_EACH` requests in each cell at once; no answer ends before the last is sent."""
    _, key = _tenant(stacks, f"{kind}-{number}", {kind: worth})
    began_s = time.monotonic()
    replies = asyncio.run(_both(stacks, key, N_EACH, N_TOKENS))
    seconds = time.monotonic() - began_s
    each = [sum(reply.status == 200 for reply in cell) for cell in replies]
    unit = N_TOKENS if kind == "output-tpm" else 1
    allowed = worth // unit + (int(worth / unit * seconds / 60) if kind != "max-concurrency" else 0)
    return {
        "limit": kind, "allowed": allowed, "served": sum(each), "served_each": each,
        "statuses": dict(Counter(str(reply.status) for cell in replies for reply in cell)),
        "passed": 0 < sum(each) <= allowed and min(each) > 0,
    }  # fmt: skip


def _credit(stacks: tuple[BenchStack, ...], number: int) -> dict[str, Any]:
    """Streams of both cells against one budget."""
    worth = 2 * N_CREDIT_STREAMS * CREDIT_TOKENS // 4 * OUT_NANO
    organization, key = _tenant(stacks, f"credit-{number}", {"budget-nano": worth})
    replies = asyncio.run(_both(stacks, key, N_CREDIT_STREAMS, CREDIT_TOKENS))
    told = sum(reply.cost_nano for cell in replies for reply in cell)
    spent = _ledger(stacks[0], organization, told)
    return {
        "limit": "budget", "allowed": worth, "served": spent,
        "served_each": [sum(reply.cost_nano for reply in cell) for cell in replies],
        "finish": dict(Counter(reply.finish or reply.error for cell in replies for reply in cell)),
        "passed": 0 < spent <= worth and spent == told and all(
            any(reply.n_completion for reply in cell) for cell in replies
        ),
    }  # fmt: skip


def _ledger(stack: BenchStack, organization: str, told: int) -> int:
    """What is booked, once it is what clients were told or has not moved for long enough."""
    deadline_s, spent = time.monotonic() + BOOKED_WITHIN_S, -1
    with psycopg.connect(stack.dsn("operator"), autocommit=True, connect_timeout=5) as connection:
        while time.monotonic() < deadline_s and spent < told:
            row = connection.execute("SELECT corral_spent('org', %s)", [organization]).fetchone()
            spent = int(row[0]) if row else 0
            time.sleep(0.5)
    return spent


# -- a lost Redis


def _lose_redis(stacks: tuple[BenchStack, ...], progress: Callable[[str], None]) -> dict[str, Any]:
    """Streams in both cells; the second one's Redis dies with all it knew."""
    key = stacks[0].manage_json("create_key", "unlimited")["api_key"]
    plain = asyncio.run(_both(stacks, str(key), N_STREAMS, 2 * N_TOKENS, deployment=MODEL))
    replies = asyncio.run(_struck(stacks, str(key)))
    began_s = time.monotonic()
    while True:
        [[], [again]] = asyncio.run(_both(stacks, str(key), 1, 4, deployment=MODEL, cells=(1,)))
        if again.status == 200 and again.finish:
            break
        if time.monotonic() - began_s > STREAM_LIMIT_S:
            raise RuntimeError(f"the second cell never served again: {again}")
        time.sleep(0.25)
    progress(f"the second cell serves again after {time.monotonic() - began_s:.1f} s")
    kept, bereaved = replies
    return {
        "streams_each": N_STREAMS,
        "other_cell_equal": sum(
            a.text == b.text and a.finish == "length" for a, b in zip(kept, plain[0], strict=True)
        ),
        "other_cell_slowest_gap_ms": round(1000 * max(reply.slowest_gap_s for reply in kept)),
        "undisturbed_slowest_gap_ms": round(1000 * max(reply.slowest_gap_s for reply in plain[0])),
        "bereaved_told_to_retry": sum(
            "retry_after_ms" in reply.error or reply.status == 503 for reply in bereaved
        ),
        "bereaved_finished": sum(bool(reply.finish) for reply in bereaved),
    }


async def _struck(stacks: tuple[BenchStack, ...], key: str) -> list[list[Reply]]:
    streams = asyncio.create_task(_both(stacks, key, N_STREAMS, 2 * N_TOKENS, deployment=MODEL))
    await asyncio.sleep(2 * N_TOKENS * STEP_MS / 1000 / 3)  # all are in their middle
    await asyncio.to_thread(_forget_redis, stacks[1])
    return await streams


def _forget_redis(stack: BenchStack) -> None:
    """SIGKILL to the stack's Redis, and its log deleted; the supervisor starts it again, empty."""
    state = read_state(stack.var)
    found = [process for process in state.processes if process.name == "redis"] if state else []
    if not found or found[0].pid is None:
        raise RuntimeError("the stack has no Redis to lose")
    pid = found[0].pid
    with held(stack.var, "redis", 30.0):
        os.kill(pid, signal.SIGKILL)
        deadline_s = time.monotonic() + 5
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline_s:
            time.sleep(0.01)
        EmbeddedRedis(stack.var / "redis", port=1).forget()  # its port does not matter here


# -- clients


async def _both(
    stacks: tuple[BenchStack, ...], key: str, n_each: int, n_tokens: int, *,
    deployment: str = f"acme/{MODEL}", cells: tuple[int, ...] = (0, 1),
) -> list[list[Reply]]:  # fmt: skip
    """`n_each` streams in each cell at once; replies by cell."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=STREAM_LIMIT_S, limits=limits) as client:
        asked = [
            [_ask(client, stacks[cell], key, deployment, n, n_tokens) for n in range(n_each)]
            if cell in cells
            else []
            for cell in range(len(stacks))
        ]
        return list(await asyncio.gather(*(asyncio.gather(*each) for each in asked)))


async def _ask(
    client: httpx.AsyncClient, stack: BenchStack, key: str, deployment: str, number: int, n_tokens: int
) -> Reply:
    body = {
        "model": deployment, "max_tokens": n_tokens, "ignore_eos": True, "stream": True, "temperature": 0,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": f"Question {number} about cattle"}],
    }  # fmt: skip
    reply, last_s = Reply(), 0.0
    try:
        async with client.stream(
            "POST",
            f"{stack.facts.base_url}/chat/completions",
            json=body,
            headers={"authorization": f"Bearer {key}"},
        ) as response:
            reply.status = response.status_code
            if response.status_code != 200:
                reply.error = (await response.aread()).decode()[:500]
                return reply
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                now_s = time.monotonic()
                reply.slowest_gap_s = max(reply.slowest_gap_s, now_s - last_s if last_s else 0.0)
                last_s = now_s
                _take(reply, json.loads(line[6:]), line)
    except httpx.TransportError as error:
        reply.error = f"connection: {type(error).__name__}"
    return reply


def _take(reply: Reply, event: dict[str, Any], line: str) -> None:
    if "error" in event:
        reply.error = line[:500]
    for choice in event.get("choices", ()):
        reply.text += choice["delta"].get("content", "")
        reply.finish = choice.get("finish_reason") or reply.finish
    if event.get("corral", {}).get("finish"):
        reply.finish = event["corral"]["finish"]
    if event.get("usage"):
        reply.n_prompt = event["usage"]["prompt_tokens"]
        reply.n_completion = event["usage"]["completion_tokens"]


# -- the report


def goals(cases: list[dict[str, Any]], lost: dict[str, Any]) -> list[dict[str, Any]]:
    """Limits kept over both cells, and the loss of one cell's Redis kept to that cell."""
    rows = [
        {"figure": f"{case['limit']}: admitted by both cells together", "is": case["served"],
         "goal": f"<= {case['allowed']}, and some by each", "reached": case["passed"]}
        for case in cases
    ]  # fmt: skip
    n = lost["streams_each"]
    n_told = lost["bereaved_told_to_retry"] + lost["bereaved_finished"]
    return [
        *rows,
        {"figure": "streams of the other cell equal to an undisturbed run", "is": lost["other_cell_equal"],
         "goal": f"{n}", "reached": lost["other_cell_equal"] == n},
        {"figure": "streams of the bereaved cell finished or told to try again", "is": n_told,
         "goal": f"{n}", "reached": n_told == n},
    ]  # fmt: skip


def as_text(report: dict[str, Any]) -> str:
    """The report as lines for people."""
    lines = [f"{key}: {value}" for key, value in report["assumptions"].items()]
    lines += ["", f"{'limit':<18}{'allowed':>12}{'served':>12}   each cell"]
    lines += [
        f"{case['limit']:<18}{case['allowed']:>12}{case['served']:>12}   {case['served_each']}"
        for case in report["limits"]
    ]
    lines += ["", *(f"{key.replace('_', ' ')}: {value}" for key, value in report["lost_redis"].items()), ""]
    for goal in report["goals"]:
        verdict = "reached" if goal["reached"] else "NOT reached"
        lines.append(f"{goal['figure']}: {goal['is']} (goal {goal['goal']}): {verdict}")
    return "\n".join(lines)
