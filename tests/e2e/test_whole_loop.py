"""The whole product on the real engine: one command, a real answer, metered once, and honest refusals."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import psycopg
import pytest

from benchmarks.stack import BenchStack
from controlplane import ids
from controlplane.askclient import ask
from infra.local.preflight import engine_verdict, gather
from workers.modelcache.tiny import make_tiny_model

pytestmark = [pytest.mark.stack, pytest.mark.engine, pytest.mark.timeout(400)]
Eventually = Callable[..., None]


@pytest.fixture
def client(stack: BenchStack) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=stack.facts.base_url, api_key=stack.facts.api_key, max_retries=0, timeout=120.0
    )


def usage_rows(operator: psycopg.Connection, request_id: str) -> list[tuple[Any, ...]]:
    return operator.execute(
        "SELECT n_prompt_tokens, n_completion_tokens, cost_nano, finish_reason FROM billing_usageevent "
        "WHERE request_id = %s",
        [ids.from_text(ids.Prefix.REQUEST, request_id)],
    ).fetchall()


def test_up_asked_its_first_question_and_printed_the_answer(stack: BenchStack) -> None:
    path = stack.var / "quickstart.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert set(json.loads(path.read_text())) == {
        "base_url", "api_key", "console_url", "admin_email", "admin_password", "project", "deployment",
    }  # fmt: skip
    assert stack.facts.console_url in stack.printed
    assert stack.facts.api_key in stack.printed, "shown once: here"
    assert "first answer" in stack.printed


def test_the_real_model_knows_the_capital_of_france(stack: BenchStack) -> None:
    runs, why = engine_verdict(gather())
    if not runs:
        pytest.skip(f"the engine cannot run on this machine: {why}")
    assert "Paris" in stack.manage("ask", "What is the capital of France?")


def test_published_sdk_has_functions_called_and_their_results_read(
    client: openai.OpenAI, stack: BenchStack, operator: psycopg.Connection, eventually: Eventually
) -> None:
    city = {"type": "string", "enum": ["Rome", "Oslo"]}
    schema = {
        "type": "object",
        "properties": {"city": city},
        "required": ["city"],
        "additionalProperties": False,
    }
    asked: Any = {
        "model": stack.facts.deployment,
        "messages": [{"role": "user", "content": "What is the weather in Rome?"}],
        "tools": [
            {"type": "function", "function": {"name": "get_weather", "strict": True, "parameters": schema}}
        ],
        "max_tokens": 60,
        "temperature": 0,
    }
    must = {"type": "function", "function": {"name": "get_weather"}}
    response = client.chat.completions.with_raw_response.create(**asked, tool_choice=must)
    (choice,) = response.parse().choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in city["enum"]
    with client.chat.completions.stream(**asked, tool_choice=must) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls or []
    assert [(c.function.name, c.function.arguments) for c in streamed] == [
        (call.function.name, call.function.arguments)
    ]
    result = {"role": "tool", "tool_call_id": call.id, "content": "It rains."}
    followed = client.chat.completions.create(
        **asked | {"messages": [*asked["messages"], choice.message, result]}, tool_choice="auto"
    )
    usage = response.parse().usage
    assert usage is not None
    assert followed.usage is not None
    assert followed.usage.prompt_tokens > usage.prompt_tokens, "call and result are in the prompt"
    request_id = response.headers["x-request-id"]
    eventually(lambda: usage_rows(operator, request_id), "the request is booked")
    ((n_prompt, n_completion, _, finish),) = usage_rows(operator, request_id)
    assert (n_prompt, n_completion, finish) == (usage.prompt_tokens, usage.completion_tokens, "stop")


def test_published_sdk_streams_and_usage_is_booked_once(
    client: openai.OpenAI, stack: BenchStack, operator: psycopg.Connection, eventually: Eventually
) -> None:
    response = client.chat.completions.with_raw_response.create(
        model=stack.facts.deployment,
        messages=[{"role": "user", "content": "Count to five."}],
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=24,
        temperature=0,
    )
    chunks = list(response.parse())
    usage = chunks[-1].usage
    assert usage is not None
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text
    assert 0 < usage.completion_tokens <= 24
    request_id = response.headers["x-request-id"]
    eventually(lambda: usage_rows(operator, request_id), "the request is booked")
    ((n_prompt, n_completion, cost_nano, _),) = usage_rows(operator, request_id)
    assert (n_prompt, n_completion) == (usage.prompt_tokens, usage.completion_tokens)
    assert cost_nano > 0

    again = client.chat.completions.create(
        model=stack.facts.deployment,
        messages=[{"role": "user", "content": "Count to five."}],
        max_tokens=24,
        temperature=0,
    )
    assert again.choices[0].message.content == text, "streamed or not, the same greedy answer"


def test_completions_and_models(client: openai.OpenAI, stack: BenchStack) -> None:
    assert stack.facts.deployment in [model.id for model in client.models.list()]
    answer = client.completions.create(
        model=stack.facts.deployment, prompt="The sky is", max_tokens=5, temperature=0
    )
    assert answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


def test_refusals_are_the_sdks_exceptions_and_name_the_field(
    client: openai.OpenAI, stack: BenchStack
) -> None:
    model = stack.facts.deployment
    hello: Any = [{"role": "user", "content": "hello"}]
    stranger = client.with_options(api_key="sk-crl-000000000000-" + "x" * 43)
    with pytest.raises(openai.AuthenticationError) as refused:
        stranger.chat.completions.create(model=model, messages=hello)
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="no-such-model", messages=hello)
    assert model in str(refused.value), "names the models the key may use"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=model, messages=hello, temperature=9)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "long " * 5000}], stream=True
        )
    assert refused.value.code == "context_length_exceeded"


def test_a_refused_prompt_gives_its_hold_back(stack: BenchStack) -> None:
    key = stack.manage_json("create_key", "one-at-a-time", "--max-concurrency", "1")["api_key"]
    client = openai.OpenAI(base_url=stack.facts.base_url, api_key=key, max_retries=0, timeout=120.0)
    for _ in range(3):
        with pytest.raises(openai.BadRequestError, match="context"):
            client.chat.completions.create(
                model=stack.facts.deployment, messages=[{"role": "user", "content": "long " * 5000}]
            )
    assert ask(stack.facts.base_url, key, stack.facts.deployment, "Hi", max_tokens=3).n_completion_tokens


def test_scales_to_zero_and_from_zero_while_the_client_is_told(
    stack: BenchStack, operator: psycopg.Connection, eventually: Eventually
) -> None:
    stack.manage("deploy", "sleeper", "--model", "toy", "--idle-timeout-s", "1")
    told: list[str] = []
    answer = ask(stack.facts.base_url, stack.facts.api_key, "sleeper", "wake up", on_stage=told.append)
    assert answer.n_completion_tokens > 0
    assert any("stage=" in line for line in told), f"a waiting client sees stages, saw {told}"

    def phase() -> str:
        row = operator.execute("SELECT phase FROM deployments_deployment WHERE name = 'sleeper'").fetchone()
        return str(row[0]) if row else ""

    live = (
        "SELECT count(*) FROM autoscaler_replica r JOIN deployments_deployment d ON d.id = r.deployment_id "
        "WHERE d.name = 'sleeper' AND r.phase NOT IN ('stopped', 'failed')"
    )
    eventually(lambda: operator.execute(live).fetchone() == (0,), "the last replica is gone")
    eventually(lambda: phase() == "idle", "the deployment says that it sleeps")
    assert ask(stack.facts.base_url, stack.facts.api_key, "sleeper", "again").n_completion_tokens > 0
    decisions = operator.execute(
        "SELECT count(*) FROM autoscaler_decision c JOIN deployments_deployment d ON d.id = c.deployment_id "
        "WHERE d.name = 'sleeper' AND c.commands::text <> '[]'"
    ).fetchone()
    assert decisions is not None
    assert decisions[0] >= 3, "start, stop and start again are on record"


@pytest.mark.parametrize(("name", "why"), [("too-big", "memory"), ("bad-weights", "weights")])
def test_a_replica_that_cannot_start_says_why(
    stack: BenchStack,
    operator: psycopg.Connection,
    eventually: Eventually,
    tmp_path: Path,
    name: str,
    why: str,
) -> None:
    """Eight terabytes of KV cache fit nowhere; weights of another shape than config.json says load nowhere."""
    runs, why_not = engine_verdict(gather())
    if not runs:
        pytest.skip(f"the engine cannot run on this machine: {why_not}")
    if name == "too-big":
        how = ("--model", "tiny", "--profile", f"kv_cache_bytes={1 << 43}")
    else:
        make_tiny_model(tmp_path / "model")
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        config["intermediate_size"] *= 2
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        how = ("--model", f"dir:{tmp_path / 'model'}", "--profile", f"kv_cache_bytes={64 << 20}")
    stack.manage("deploy", name, *how, "--profile", "max_model_len=512", timeout_s=300)
    client = openai.OpenAI(
        base_url=stack.facts.base_url, api_key=stack.facts.api_key, max_retries=0, timeout=120.0
    )
    with pytest.raises(openai.InternalServerError) as refused:
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "hello"}])
    assert refused.value.status_code == 503
    assert "retry-after" in refused.value.response.headers
    assert why in str(refused.value).lower()

    def last_error() -> str:
        query = "SELECT last_error FROM deployments_deployment WHERE name = %s"
        row = operator.execute(query, [name]).fetchone()
        return str(row[0]) if row else ""

    eventually(lambda: why in last_error().lower(), "the deployment says why")


def test_a_client_that_leaves_ends_the_generation_and_pays_for_what_was_made(
    stack: BenchStack, operator: psycopg.Connection, eventually: Eventually
) -> None:
    stack.manage("deploy", "slow", "--model", "toy", "--profile", "toy_step_ms=50")
    body = {
        "model": "slow",
        "messages": [{"role": "user", "content": "a long story"}],
        "stream": True,
        "max_tokens": 2000,
        "ignore_eos": True,
    }
    headers = {"authorization": f"Bearer {stack.facts.api_key}"}
    url = f"{stack.facts.base_url}/chat/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60.0, trust_env=False) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        assert len([next(lines) for _ in range(5)]) == 5
        request_id = response.headers["x-request-id"]
    eventually(lambda: usage_rows(operator, request_id), "the request is booked")
    ((_, n_completion, cost_nano, finish_reason),) = usage_rows(operator, request_id)
    assert finish_reason == "abort"
    assert 3 <= n_completion < 200, "two thousand were asked for, and nobody waited"
    assert cost_nano > 0


def test_prompts_completions_and_keys_are_in_no_log(client: openai.OpenAI, stack: BenchStack) -> None:
    secret = "xylophone-zebra-4711"
    answer = client.chat.completions.create(
        model=stack.facts.deployment,
        messages=[{"role": "user", "content": f"Repeat: {secret}"}],
        max_tokens=12,
        temperature=0,
    )
    completion = (answer.choices[0].message.content or "").strip()
    key_secret = stack.facts.api_key.split("-", 3)[3][-20:]
    logs = list(stack.var.rglob("*.log"))
    assert logs
    for path in logs:
        text = Path(path).read_text(errors="replace")
        assert secret not in text, path
        assert key_secret not in text, path
        assert len(completion) < 8 or completion not in text, path
