"""`manage.py bench limits`: 64 requests at once against a limit for ten of them, for each kind of limit at each level,
and 32 streams that share the last credit.

Starts the whole product with the toy engine. Prompts and answers have fixed lengths, so that "ten of them" is exact;
who was served is counted at the client, what was spent is read from the ledger after intake has booked it.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import psycopg

from benchmarks.stack import BenchStack, bench_stack
from controlplane import ids

N_REQUESTS, N_SERVED, N_TOKENS = 64, 10, 200
N_STREAMS, N_STREAM_TOKENS = 32, 400
IN_NANO, OUT_NANO = 100, 400  # the default price, a token
LEVELS = ("key", "project", "organization")
_SCOPE = {"key": "key", "project": "prj", "organization": "org"}
_LIMIT_NAME = {
    "rpm": "requests_per_minute",
    "input-tpm": "input_tokens_per_minute",
    "output-tpm": "output_tokens_per_minute",
    "max-concurrency": "concurrency",
    "budget-nano": "budget",
}
_MODEL = "bench-limits"
_BOOKED_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Answer:
    """One request as its client saw it."""

    status: int
    scope: str = ""
    limit: str = ""
    finish: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    input_estimate: int = 0


def measure(*, repeats: int = 1, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Every case, `repeats` times; returns the report that `--json` prints."""
    progress("starting a private stack with the toy engine")
    with bench_stack("toy") as stack:
        bench = _Bench(stack)
        cases = []
        for number in range(repeats):
            for kind in _LIMIT_NAME:
                for level in LEVELS:
                    if number:  # buckets of the run before must be full again
                        time.sleep(60 if kind.endswith("pm") and level != "key" else 0)
                    cases.append(bench.ten_of_64(kind, level))
                    progress(f"{kind} of the {level}: {cases[-1]}")
            for level in LEVELS:
                cases.append(bench.last_credit(level))
                progress(f"last credit of the {level}: {cases[-1]}")
    return {
        "assumptions": {
            "requests": N_REQUESTS, "limit_for": N_SERVED, "tokens": N_TOKENS, "streams": N_STREAMS,
            "stream_tokens": N_STREAM_TOKENS, "price_nano": {"input": IN_NANO, "output": OUT_NANO}, "repeats": repeats,
        },
        "cases": cases,
        "passed": all(case["passed"] for case in cases),
    }  # fmt: skip


def as_text(report: dict[str, Any]) -> str:
    rows = [f"{'limit':<18}{'level':<14}{'served':>7}{'of':>4}{'overspent':>11}{'unspent':>9}  passed"]
    for case in report["cases"]:
        rows.append(
            f"{case['limit']:<18}{case['level']:<14}{case['served']:>7}{case['sent']:>4}"
            f"{case.get('overspent_nano', '-'):>11}{case.get('unspent_nano', '-'):>9}  {case['passed']}"
        )
    return "\n".join([*rows, f"all passed: {report['passed']}"])


class _Bench:
    """The demo project of a stack, with limits that change from case to case."""

    def __init__(self, stack: BenchStack) -> None:
        self._stack = stack
        self._url = f"{stack.facts.base_url}/chat/completions"
        stack.manage(
            "deploy", _MODEL, "--model", "toy", "--min", "1", "--max", "1", "--profile", "toy_step_ms=10"
        )
        stack.manage("ask", "ready?", "--model", _MODEL)
        self._operator = psycopg.connect(stack.dsn("operator"), autocommit=True)
        self._n_keys = 0
        # The first answers teach the gateways how many tokens these prompts have.
        key = self._key("key", {"input-tpm": 1_000_000})
        for number in range(24):
            self._ask(key[1], number, N_TOKENS)
        probe = self._ask(key[1], 0, N_TOKENS)
        self._n_input = probe.input_estimate
        self._cost = _cost(probe)
        self._estimated_cost = max(self._cost, self._n_input * IN_NANO + N_TOKENS * OUT_NANO)

    def ten_of_64(self, kind: str, level: str) -> dict[str, Any]:
        """64 plain requests at once, where the limit is ten requests' worth."""
        worth = {
            "rpm": N_SERVED, "input-tpm": N_SERVED * self._n_input, "output-tpm": N_SERVED * N_TOKENS,
            "max-concurrency": N_SERVED, "budget-nano": N_SERVED * self._estimated_cost,
        }[kind]  # fmt: skip
        key_id, key, spent_before = self._limited(level, kind, worth)
        answers = list(self._at_once(N_REQUESTS, lambda n: self._ask(key, n, N_TOKENS)))
        whole = [a for a in answers if a.status == 200 and a.usage.get("completion_tokens") == N_TOKENS]
        refused = [a for a in answers if a.status == 429]
        right = [a for a in refused if (a.scope, a.limit) == (_SCOPE[level], _LIMIT_NAME[kind])]
        case: dict[str, Any] = {
            "limit": kind, "level": level, "sent": N_REQUESTS, "served": len(whole), "refused": len(refused),
            "statuses": dict(Counter(str(a.status) for a in answers)),
        }  # fmt: skip
        passed = len(whole) == N_SERVED and len(right) == N_REQUESTS - N_SERVED
        if kind == "budget-nano":
            case |= self._spent(key_id, level, spent_before, worth, answers)
            passed = passed and case["overspent_nano"] == 0
        return case | {"passed": passed}

    def last_credit(self, level: str) -> dict[str, Any]:
        """32 streams at once, with money for about a quarter of what they want."""
        worth = N_STREAMS * self._n_input * IN_NANO + N_STREAMS * N_STREAM_TOKENS // 4 * OUT_NANO + 77
        key_id, key, spent_before = self._limited(level, "budget-nano", worth)
        answers = list(self._at_once(N_STREAMS, lambda n: self._ask(key, n, N_STREAM_TOKENS, stream=True)))
        ran = [a for a in answers if a.status == 200 and a.usage.get("completion_tokens", 0) >= 1]
        case: dict[str, Any] = {
            "limit": "last credit", "level": level, "sent": N_STREAMS, "served": len(ran),
            "finish": dict(Counter(a.finish for a in answers)),
            "tokens": sorted(a.usage.get("completion_tokens", 0) for a in answers),
        }  # fmt: skip
        case |= self._spent(key_id, level, spent_before, worth, answers)
        exact = case["overspent_nano"] == 0 and case["unspent_nano"] < OUT_NANO
        return case | {"passed": len(ran) == N_STREAMS and exact and set(case["finish"]) == {"budget"}}

    # -- plumbing

    def _limited(self, level: str, kind: str, worth: int) -> tuple[str, str, int]:
        """(id of the scope, key, what was spent before): a new key under one limit at one level."""
        key_id, key = self._key(level, {})
        scope_id = self._scope_ids(key_id)[level]
        spent = self._ledger(level, scope_id)
        key_id, key = self._key(
            level, {kind: worth + (spent if kind == "budget-nano" and level != "key" else 0)}
        )
        if level == "key":
            scope_id, spent = key_id, 0
        return scope_id, key, spent

    def _key(self, level: str, limits: dict[str, int]) -> tuple[str, str]:
        self._n_keys += 1
        options = [part for name, value in limits.items() for part in (f"--{name}", str(value))]
        made = self._stack.manage_json("create_key", f"bench-{self._n_keys}", "--limits-on", level, *options)
        return ids.from_text(ids.Prefix.API_KEY, made["id"]).hex, str(made["api_key"])

    def _scope_ids(self, key_id: str) -> dict[str, str]:
        row = self._operator.execute(
            "SELECT project_id, organization_id FROM tenants_apikey WHERE id = %s", [key_id]
        ).fetchone()
        assert row is not None
        return {"key": key_id, "project": row[0].hex, "organization": row[1].hex}

    def _ledger(self, level: str, scope_id: str) -> int:
        """What is booked, once that stands still."""
        deadline, last = time.monotonic() + _BOOKED_TIMEOUT_S, -1
        while time.monotonic() < deadline:
            row = self._operator.execute("SELECT corral_spent(%s, %s)", [_SCOPE[level], scope_id]).fetchone()
            assert row is not None
            if row[0] == last:
                return int(last)
            last = row[0]
            time.sleep(2.5)  # intake runs every second
        raise RuntimeError("usage is still being booked")

    def _spent(
        self, scope_id: str, level: str, before: int, worth: int, answers: list[Answer]
    ) -> dict[str, Any]:
        spent = self._ledger(level, scope_id) - before
        return {
            "budget_nano": worth, "spent_nano": spent, "overspent_nano": max(spent - worth, 0),
            "unspent_nano": max(worth - spent, 0), "billed_as_seen": spent == sum(_cost(a) for a in answers),
        }  # fmt: skip

    @staticmethod
    def _at_once(n: int, ask: Callable[[int], Answer]) -> Iterator[Answer]:
        with ThreadPoolExecutor(n) as pool:
            yield from pool.map(ask, range(n))

    def _ask(self, key: str, number: int, n_tokens: int, *, stream: bool = False) -> Answer:
        body: dict[str, Any] = {
            "model": _MODEL, "max_tokens": n_tokens, "ignore_eos": True, "stream": stream,
            "messages": [{"role": "user", "content": f"Question {number:03d} about cattle"}],
        }  # fmt: skip
        if stream:
            body["stream_options"] = {"include_usage": True}
        request = urllib.request.Request(  # noqa: S310 - our own gateway
            self._url, json.dumps(body).encode(),
            {"authorization": f"Bearer {key}", "content-type": "application/json"},
        )  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=120) as response:  # noqa: S310
                text, headers = response.read().decode(), response.headers
        except urllib.error.HTTPError as error:
            return Answer(
                error.code, error.headers["x-corral-scope"] or "", error.headers["x-corral-limit"] or ""
            )
        taken = int(headers["x-ratelimit-limit-input-tokens"] or 0) - int(
            headers["x-ratelimit-remaining-input-tokens"] or 0
        )
        events = (
            [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
            if stream
            else []
        )
        whole = json.loads(text) if not stream else {}
        for event in events or [whole]:
            if event.get("usage"):
                whole = whole | {"usage": event["usage"]}
            if event.get("corral"):
                whole = whole | {"corral": event["corral"]}
        finish = (whole.get("corral") or {}).get("finish", "")
        return Answer(200, finish=finish, usage=whole.get("usage", {}), input_estimate=taken)


def _cost(answer: Answer) -> int:
    usage = answer.usage
    return int(usage.get("prompt_tokens", 0) * IN_NANO + usage.get("completion_tokens", 0) * OUT_NANO)
