"""An endpoint that others run, attached to the live stack: answers, bills and copies, with the published SDK.

In short with a small server of this process; whole (`full`) with vLLM's own OpenAI server on CPU.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psycopg
import pytest

from benchmarks.stack import BenchStack
from controlplane import ids
from infra.local.ports import free_port
from infra.local.preflight import engine_verdict, gather
from tests.workers.endpoints import Call, endpoint
from workers.modelcache.tiny import make_tiny_model

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]
Eventually = Callable[..., None]
RATES = {"input_nano_per_million": 3_000_000, "output_nano_per_million": 5_000_000}  # 3 and 5 nano a token
KEY = "sk-theirs"


@contextmanager
def small_server() -> Iterator[int]:
    """Answers with four words, streamed."""

    async def well(call: Call) -> None:
        assert call.headers["authorization"] == f"Bearer {KEY}"
        await call.words("badi", " hoga", " dete", " fike", n_prompt=11)

    ready, loop = threading.Event(), asyncio.new_event_loop()
    found: dict[str, Any] = {}

    async def serve() -> None:
        async with endpoint(well) as there:
            found.update(port=there.port, over=asyncio.Event())
            ready.set()
            await found["over"].wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield found["port"]
    finally:
        loop.call_soon_threadsafe(found["over"].set)
        thread.join(10)


@contextmanager
def vllm_server(folder: Path) -> Iterator[int]:
    """vLLM's OpenAI server with a random model of 5 MB, in a process of its own."""
    model, port = make_tiny_model(folder / "tiny"), free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")} | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    argv += [
        "--served-model-name",
        "their-model",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--api-key",
        KEY,
    ]
    argv += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    argv += ["--kv-cache-memory-bytes", str(64 << 20)]
    with (folder / "vllm.log").open("wb") as log:
        server = subprocess.Popen(argv, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline_s = time.monotonic() + 300
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            said = (folder / "vllm.log").read_text(errors="replace")[-2000:]
            assert server.poll() is None and time.monotonic() < deadline_s, said
            time.sleep(0.2)
        yield port
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(20)


class Outside:
    """What a tenant does by REST."""

    def __init__(self, stack: BenchStack, operator: psycopg.Connection, eventually: Eventually) -> None:
        token = stack.manage_json("create_token", "upstreams", "--role", "owner")["token"]
        self.http = httpx.Client(
            base_url=f"{stack.facts.console_url}/api/v1",
            headers={"authorization": f"Bearer {token}"},
            timeout=30,
        )
        self.stack, self.operator, self.eventually = stack, operator, eventually

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = self.http.request(method, path, json=body)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def attach(self, name: str, deployment: str, port: int, **values: Any) -> str:
        """Its id, once its replica is ready."""
        row = self.operator.execute(
            "SELECT id FROM deployments_deployment WHERE name = %s AND deleted_at IS NULL", [deployment]
        ).fetchone()
        assert row is not None
        body = {
            "name": name,
            "deployment_id": ids.to_text(ids.Prefix.DEPLOYMENT, row[0]),
            "base_url": f"http://127.0.0.1:{port}/v1",
            "model": "their-model",
            "api_key": KEY,
            **RATES,
            **values,
        }
        made: str = self.call("POST", "/upstreams", body)["id"]
        ready = (
            "SELECT count(*) FROM autoscaler_replica r JOIN upstreams_upstreamreplica u ON u.replica_id = r.id "
            "WHERE r.phase = 'ready' AND u.upstream_id = %s"
        )
        of = ids.from_text(ids.Prefix.UPSTREAM, made)
        self.eventually(lambda: self.operator.execute(ready, [of]).fetchone() == (1,), f"{name} is ready")
        return made


def answers_bills_and_copies(
    stack: BenchStack, operator: psycopg.Connection, eventually: Eventually, port: int, name: str
) -> list[str]:
    """A deployment that an endpoint alone serves, with a shadow that is the same endpoint: the texts of a plain and a
    streamed answer, and of the endpoint asked without us. Asserts bills, copies and sums on the way."""
    outside = Outside(stack, operator, eventually)
    client = openai.OpenAI(
        base_url=stack.facts.base_url, api_key=stack.facts.api_key, max_retries=0, timeout=60
    )
    direct = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=60)
    stack.manage("deploy", name, "--model", "toy", "--min", "0")
    outside.call("PUT", "/outside-consent", {"agreed": True})
    served = outside.attach(f"{name}-theirs", name, port, role="replica")
    shadow = outside.attach(f"{name}-copies", name, port, role="shadow", shadow_ppm=1_000_000)
    ask: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Where do the numbers come from?"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    told = direct.chat.completions.create(
        model="their-model", stream=True, stream_options={"include_usage": True}, **ask
    )
    chunks = list(told)
    expected = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    counts = next(c.usage for c in reversed(chunks) if c.usage)
    assert expected

    answered: list[str] = []
    plain = client.chat.completions.with_raw_response.create(model=name, **ask)
    answered.append(plain.headers["x-request-id"])
    body = plain.parse()
    texts = [body.choices[0].message.content]
    assert (body.usage.prompt_tokens, body.usage.completion_tokens) == (
        counts.prompt_tokens,
        counts.completion_tokens,
    )
    streamed = client.chat.completions.with_raw_response.create(
        model=name, stream=True, stream_options={"include_usage": True}, **ask
    )
    answered.append(streamed.headers["x-request-id"])
    chunks = list(streamed.parse())
    texts.append("".join(c.choices[0].delta.content or "" for c in chunks if c.choices))
    assert chunks[-1].usage.completion_tokens == counts.completion_tokens

    booked = (
        "SELECT u.n_prompt_tokens, u.n_completion_tokens, u.counted_by, u.status, abs(u.cost_nano "
        "- (u.n_prompt_tokens - u.n_cached_tokens)::numeric * p.input_nano_per_million / 1000000 "
        "- u.n_cached_tokens::numeric * p.cached_nano_per_million / 1000000 "
        "- u.n_completion_tokens::numeric * p.output_nano_per_million / 1000000) <= 1, u.cost_nano > 0 "
        "FROM billing_usageevent u JOIN billing_priceversion p ON p.id = u.price_version_id "
        "WHERE u.request_id = ANY(%s)"
    )
    requests = [ids.from_text(ids.Prefix.REQUEST, each) for each in answered]
    eventually(lambda: len(operator.execute(booked, [requests]).fetchall()) == 2, "both are billed")
    for row in operator.execute(booked, [requests]).fetchall():
        assert row == (counts.prompt_tokens, counts.completion_tokens, "upstream", 200, True, True)

    def summary() -> dict[str, Any]:
        found: dict[str, Any] = outside.call("GET", f"/upstreams/{shadow}/shadow-summary")
        return found

    eventually(lambda: summary()["n"] == 2, "both were copied and compared")
    found = summary()
    assert (found["n_failed"], found["n_compared"], found["same_ppm"]) == (0, 2, 1_000_000), found
    assert (found["same_finish_ppm"], found["skipped"], found["errors"]) == (1_000_000, {}, {})
    assert (found["first_token_ms"]["n"], found["duration_ms"]["n"]) == (1, 2)
    each_nano = 3 * counts.prompt_tokens + 5 * counts.completion_tokens
    assert found["cost_nano"] <= 2 * each_nano  # what was cached there is free
    copied = outside.call("GET", f"/upstreams/{shadow}/shadow-results")["data"]
    assert {row["request_id"] for row in copied} == set(answered)

    def use(of: str) -> dict[str, Any]:
        answer: dict[str, Any] = outside.call("GET", f"/upstreams/{of}/use")
        return answer

    eventually(lambda: (use(served)["n_requests"], use(shadow)["n_requests"]) == (2, 2), "each is summed")
    assert use(served)["revenue_nano"] > 0
    assert (use(shadow)["revenue_nano"], use(shadow)["cost_nano"]) == (0, found["cost_nano"])
    outside.call("DELETE", f"/upstreams/{shadow}")
    outside.call("DELETE", f"/upstreams/{served}")
    outside.call("PUT", "/outside-consent", {"agreed": False})
    return [*texts, expected]


def test_an_endpoint_answers_is_billed_and_is_copied_to(
    stack: BenchStack, operator: psycopg.Connection, eventually: Eventually
) -> None:
    with small_server() as port:
        texts = answers_bills_and_copies(stack, operator, eventually, port, "elsewhere")
    assert texts == [texts[-1]] * 3


@pytest.mark.full
@pytest.mark.engine
def test_the_same_with_a_real_vllm_server(
    stack: BenchStack, operator: psycopg.Connection, eventually: Eventually, tmp_path: Path
) -> None:
    runs, why = engine_verdict(gather())
    if not runs:
        pytest.skip(f"the engine cannot run on this machine: {why}")
    with vllm_server(tmp_path) as port:
        texts = answers_bills_and_copies(stack, operator, eventually, port, "real-elsewhere")
    assert texts == [texts[-1]] * 3
