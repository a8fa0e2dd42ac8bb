"""From a request's body to prompt token ids, exactly as the engine will see them.

Short bodies on the loop, long ones in a small thread pool, so that one long prompt does not stall every
stream (0.5 ms per 1,000 characters). Called by serve.py. Never logs text.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import msgspec

from workers.contract import Endpoint, RequestEnvelope
from workers.engine.base import Engine, EngineInputError

_N_THREADS: Final = 2  # the tokenizer releases the GIL; more threads would take cores from the engine


class _Chat(msgspec.Struct):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


class _Completion(msgspec.Struct):
    prompt: str | list[int | str]


_chat = msgspec.json.Decoder(_Chat)
_completion = msgspec.json.Decoder(_Completion)


class Prompts:
    """Tokenisation for one engine. The number waiting is bounded by the replica's slots."""

    def __init__(self, engine: Engine, inline_bytes: int) -> None:
        self._engine = engine
        self._inline_bytes = inline_bytes
        self._threads = ThreadPoolExecutor(_N_THREADS, thread_name_prefix="tokenise")
        self.cpu_ns = 0  # spent on tokenising so far, decoding the body included

    async def token_ids(self, envelope: RequestEnvelope) -> list[int]:
        """EngineInputError when the body cannot be a prompt of this model, or leaves no room for an
        answer.
        """
        if len(envelope.payload) <= self._inline_bytes:
            ids, cpu_ns = self._measured(envelope.endpoint, envelope.payload)
        else:
            loop = asyncio.get_running_loop()
            ids, cpu_ns = await loop.run_in_executor(
                self._threads, self._measured, envelope.endpoint, envelope.payload
            )
        self.cpu_ns += cpu_ns
        n_context = self._engine.max_model_len
        if len(ids) >= n_context:
            raise EngineInputError(
                "context_length_exceeded",
                param_of(envelope.endpoint),
                f"this model's context holds {n_context} tokens and the prompt alone has {len(ids)}: "
                "shorten the prompt, at least one token must remain for the answer",
            )
        if not ids:
            raise EngineInputError(
                "empty_prompt", param_of(envelope.endpoint), "the prompt has no tokens; send some text"
            )
        return ids

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _measured(self, endpoint: Endpoint, payload: bytes) -> tuple[list[int], int]:
        began_ns = time.thread_time_ns()
        ids = self._tokenise(endpoint, payload)
        return ids, time.thread_time_ns() - began_ns

    def _tokenise(self, endpoint: Endpoint, payload: bytes) -> list[int]:
        try:
            if endpoint is Endpoint.CHAT:
                chat = _chat.decode(payload)
                return self._engine.tokenize_chat(chat.messages, chat.tools)
            prompt = _completion.decode(payload).prompt
        except msgspec.MsgspecError as error:
            raise EngineInputError("invalid_body", param_of(endpoint), str(error)) from None
        if isinstance(prompt, str):
            return self._engine.tokenize(prompt)
        if len(prompt) == 1 and isinstance(prompt[0], str):
            return self._engine.tokenize(prompt[0])
        if prompt and all(isinstance(token, int) for token in prompt):
            return [int(token) for token in prompt]
        raise EngineInputError(
            "invalid_prompt", "prompt", "prompt must be one string or one list of token ids per request"
        )


def param_of(endpoint: Endpoint) -> str:
    """The public field that holds the prompt."""
    return "messages" if endpoint is Endpoint.CHAT else "prompt"
