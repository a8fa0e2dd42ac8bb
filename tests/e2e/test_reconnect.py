"""Clients that come back, on the live stack: a gateway killed mid-stream, a cut connection, a key; booked once.

The gateway that is killed is the one that holds the test's connection, found by its socket.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest

from benchmarks.stack import BenchStack
from infra.local.stackstate import read_state

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]
Eventually = Callable[..., None]
MODEL = "reconnect"
N_TOKENS = 200  # two seconds


@pytest.fixture(scope="module")
def calls(stack: BenchStack) -> Iterator[Callable[..., Any]]:
    """`calls(prompt, **headers)`: a stream on a connection of its own, as a context manager."""
    stack.manage("deploy", MODEL, "--model", "toy", "--min", "1")
    with httpx.Client(base_url=stack.facts.base_url, timeout=60.0, trust_env=False) as warm:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
        auth = {"authorization": f"Bearer {stack.facts.api_key}"}
        assert warm.post("/chat/completions", json=body, headers=auth).status_code == 200
    clients: list[httpx.Client] = []

    def call(prompt: str, *, model: str = MODEL, n_tokens: int = N_TOKENS, **headers: str) -> Any:
        client = httpx.Client(base_url=stack.facts.base_url, timeout=60.0, trust_env=False)
        clients.append(client)
        content = {
            "model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": n_tokens,
            "ignore_eos": True, "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        return client.stream("POST", "/chat/completions", json=content, headers={**auth, **headers})

    yield call
    for client in clients:
        client.close()


class Read:
    """What has arrived of a stream."""

    def __init__(self, response: httpx.Response) -> None:
        assert response.status_code == 200, response.read()
        self.text = ""
        self.last_id = ""
        self.n_events = 0
        self.usage: dict[str, Any] = {}
        self.is_complete = False
        self._lines = response.iter_lines()

    def go_on(self, n_events: int = 1_000_000) -> None:
        """Up to so many events with text, or to the end."""
        for line in self._lines:
            if line.startswith("id: "):
                self.last_id = line[4:]
            elif line == "data: [DONE]":
                self.is_complete = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                assert "error" not in event, event
                self.usage = event.get("usage") or self.usage
                for choice in event["choices"]:
                    self.text += choice["delta"].get("content") or ""
                self.n_events += 1
                if self.n_events >= n_events:
                    return


def undisturbed(calls: Callable[..., Any], prompt: str, **options: Any) -> Read:
    with calls(prompt, **options) as response:
        read = Read(response)
        read.go_on()
    assert read.is_complete
    assert read.usage["completion_tokens"] == options.get("n_tokens", N_TOKENS)
    return read


def kill_gateway_of(stack: BenchStack, response: httpx.Response) -> None:
    port = response.extensions["network_stream"].get_extra_info("socket").getsockname()[1]
    state = read_state(stack.var)
    assert state
    for process in state.processes:
        if process.name.startswith("gateway") and process.pid is not None:
            connections = psutil.Process(process.pid).net_connections()
            if any(c.raddr and c.raddr.port == port for c in connections):
                os.kill(process.pid, signal.SIGKILL)
                return
    raise AssertionError("no gateway has this connection")


def booked(operator: psycopg.Connection, since: int) -> tuple[int, int, int]:
    """(requests, prompt tokens, completion tokens) of the model after the first `since` requests."""
    rows = operator.execute(
        "SELECT n_prompt_tokens, n_completion_tokens FROM billing_usageevent WHERE model = %s ORDER BY request_id",
        [MODEL],
    ).fetchall()[since:]
    return len(rows), sum(row[0] for row in rows), sum(row[1] for row in rows)


def n_booked(operator: psycopg.Connection, eventually: Eventually) -> int:
    """Rows so far, once no more arrive of what has ended."""
    seen = [-1]

    def settled() -> bool:
        n = booked(operator, 0)[0]
        seen.append(n)
        return len(seen) > 20 and len(set(seen[-20:])) == 1  # two seconds: intake works every second

    eventually(settled, "all usage is booked")
    return seen[-1]


def test_killed_gateway_costs_a_reconnecting_client_nothing(
    calls: Callable[..., Any], stack: BenchStack, operator: psycopg.Connection, eventually: Eventually
) -> None:
    whole = undisturbed(calls, "a story of two gateways")
    before = n_booked(operator, eventually)
    with calls("a story of two gateways") as response:
        first = Read(response)
        first.go_on(20)
        kill_gateway_of(stack, response)
        with pytest.raises(httpx.TransportError):
            first.go_on()
    with calls("a story of two gateways", **{"last-event-id": first.last_id}) as response:
        assert response.headers["x-corral-resumed"] == "attached"
        rest = Read(response)
        rest.go_on()
    assert rest.is_complete
    assert first.text + rest.text == whole.text
    assert rest.usage == whole.usage
    expected = (1, whole.usage["prompt_tokens"], N_TOKENS)
    eventually(lambda: booked(operator, before) == expected, "it is booked once")


@pytest.mark.full
def test_answer_of_a_killed_gateway_is_collected_by_its_key(
    calls: Callable[..., Any], stack: BenchStack, operator: psycopg.Connection, eventually: Eventually
) -> None:
    before = n_booked(operator, eventually)
    key = {"idempotency-key": "collected-later"}
    with calls("an answer nobody waits for", **key) as response:
        first = Read(response)
        first.go_on(5)
        kill_gateway_of(stack, response)
    eventually(lambda: booked(operator, before)[0] == 1, "intake books and settles it, though nobody came")
    with calls("an answer nobody waits for", **key) as response:
        assert response.headers["x-corral-resumed"] == "replayed"
        again = Read(response)
        again.go_on()
    assert again.text.startswith(first.text)
    assert again.text == undisturbed(calls, "an answer nobody waits for").text
    n_prompt = again.usage["prompt_tokens"]
    eventually(lambda: booked(operator, before) == (2, 2 * n_prompt, 2 * N_TOKENS), "the replay cost nothing")


def test_cut_stream_is_continued_and_its_tokens_are_booked_once(
    calls: Callable[..., Any], operator: psycopg.Connection, eventually: Eventually
) -> None:
    whole = undisturbed(calls, "a story that is cut off")
    before = n_booked(operator, eventually)
    with calls("a story that is cut off") as response:
        first = Read(response)
        first.go_on(20)
    with calls("a story that is cut off", **{"last-event-id": first.last_id}) as response:
        assert response.headers["x-corral-resumed"] in ("continued", "attached")
        rest = Read(response)
        rest.go_on()
    assert first.text + rest.text == whole.text
    assert rest.usage == whole.usage
    n_requests = 2 if response.headers["x-corral-resumed"] == "continued" else 1
    expected = (n_requests, whole.usage["prompt_tokens"], N_TOKENS)
    eventually(lambda: booked(operator, before) == expected, "prompt and tokens are booked once")


@pytest.mark.engine
@pytest.mark.full
def test_real_model_continues_what_was_cut_with_the_same_words(
    calls: Callable[..., Any], stack: BenchStack
) -> None:
    """Greedy, float32: as it would have gone on."""
    prompt, options = "Tell me about the sea.", {"model": stack.facts.deployment, "n_tokens": 80}
    whole = undisturbed(calls, prompt, **options)
    with calls(prompt, **options) as response:
        first = Read(response)
        first.go_on(20)
    with calls(prompt, **options, **{"last-event-id": first.last_id}) as response:
        assert response.headers["x-corral-resumed"] == "continued"
        rest = Read(response)
        rest.go_on()
    assert first.text + rest.text == whole.text
    assert rest.usage["completion_tokens"] == 80


def test_commands_of_the_guide_work_as_they_stand(
    calls: Callable[..., Any], stack: BenchStack, tmp_path: Path
) -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs" / "clients.md").read_text()
    commands = re.findall(r"```sh\n(.*?)```", guide, re.DOTALL)
    assert len(commands) == 3
    env = {**os.environ, "BASE_URL": stack.facts.base_url, "API_KEY": stack.facts.api_key, "MODEL": MODEL}
    for command in commands:
        shell = ["bash", "-euo", "pipefail", "-c", command]
        done = subprocess.run(shell, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, command + done.stdout + done.stderr
    assert (tmp_path / "rest.txt").read_text().endswith("data: [DONE]\n\n")
    assert json.loads((tmp_path / "first.json").read_text())["usage"]
    assert (tmp_path / "again.txt").read_text().count("data: ") > 2
