"""One question to the public API, streamed: the smallest honest client of our own gateway.

Called by `manage.py ask` and by the first question of `manage.py up`. Uses no internals: base URL and API key only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. Times in milliseconds from sending the request; `ttft_ms` None when no text arrived."""

    text: str
    model: str
    finish_reason: str
    n_prompt_tokens: int
    n_completion_tokens: int
    ttft_ms: float | None
    total_ms: float
    request_id: str


class AskError(RuntimeError):
    """The API refused or broke off; the message carries status, code and sentence."""


def ask(
    base_url: str,
    api_key: str,
    model: str,
    question: str,
    *,
    max_tokens: int = 120,
    timeout_s: float = 120.0,
    on_text: Callable[[str], None] = lambda text: None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Answer:
    """Asks and returns the whole answer; `on_text` gets each piece, `on_stage` what the server says while waking.

    `timeout_s` bounds the silence between two lines and, at the next line, the whole. Raises AskError, or
    httpx.TransportError when the server cannot be reached.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": max_tokens,
    }
    started_s = time.perf_counter()
    pieces: list[str] = []
    ttft_ms: float | None = None
    finish, usage = "", {"prompt_tokens": 0, "completion_tokens": 0}
    with (
        httpx.Client(timeout=httpx.Timeout(timeout_s, connect=5.0), trust_env=False) as client,
        client.stream(
            "POST",
            f"{base_url}/chat/completions",
            json=body,
            headers={"authorization": f"Bearer {api_key}"},
        ) as response,
    ):
        if response.status_code != 200:
            raise AskError(_refusal(response.status_code, response.read()))
        for line in response.iter_lines():
            # Comments keep the connection alive, not the hope.
            if time.perf_counter() - started_s > timeout_s:
                raise AskError(f"no whole answer within {timeout_s:.0f} s")
            if line.startswith(":"):
                on_stage(line[1:].strip())
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise AskError(f"{event['error'].get('code')}: {event['error'].get('message')}")
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                text = choice["delta"].get("content") or ""
                if text:
                    ttft_ms = ttft_ms or (time.perf_counter() - started_s) * 1000
                    pieces.append(text)
                    on_text(text)
                finish = choice.get("finish_reason") or finish
        request_id = response.headers.get("x-request-id", "")
    return Answer(
        text="".join(pieces),
        model=model,
        finish_reason=finish,
        n_prompt_tokens=usage["prompt_tokens"],
        n_completion_tokens=usage["completion_tokens"],
        ttft_ms=ttft_ms,
        total_ms=(time.perf_counter() - started_s) * 1000,
        request_id=request_id,
    )


def _refusal(status: int, body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
        return f"HTTP {status} {error.get('code')}: {error.get('message')}"
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}"
