"""From a request's body to prompt token ids, exactly as the engine will see them.

Short bodies on the loop, long ones in a small thread pool, so that one long prompt does not stall every
stream (0.5 ms per 1,000 characters). Called by serve.py. Never logs text.
"""

from __future__ import annotations

import asyncio
import time
from queue import SimpleQueue
from threading import Thread
from typing import Any, Final

import msgspec

from workers.contract import Endpoint, RequestEnvelope
from workers.engine.base import Engine, EngineInputError

_N_THREADS: Final = 2  # the tokenizer releases the GIL; more threads would take cores from the engine


class _Chat(msgspec.Struct):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None


class _Completion(msgspec.Struct):
    prompt: str | list[int | str | list[int]]


_Job = tuple[Endpoint, bytes, "asyncio.Future[tuple[list[int], int]]"]
_chat = msgspec.json.Decoder(_Chat)
_completion = msgspec.json.Decoder(_Completion)


class Prompts:
    """Tokenisation for one engine. The number waiting is bounded by the replica's slots."""

    def __init__(self, engine: Engine, inline_bytes: int) -> None:
        self._engine = engine
        self._inline_bytes = inline_bytes
        self._waiting: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[Thread] = []
        self.cpu_ns = 0  # spent on tokenising so far, decoding the body included

    async def token_ids(self, envelope: RequestEnvelope) -> list[int]:
        """EngineInputError when the body cannot be a prompt of this model, or leaves no room for an
        answer.
        """
        if len(envelope.payload) <= self._inline_bytes:
            ids, cpu_ns = self._measured(envelope.endpoint, envelope.payload)
        else:
            loop = asyncio.get_running_loop()
            done: asyncio.Future[tuple[list[int], int]] = loop.create_future()
            if len(self._threads) < _N_THREADS:
                self._threads.append(Thread(target=self._work, args=(loop,), name="tokenise", daemon=True))
                self._threads[-1].start()
            self._waiting.put((envelope.endpoint, envelope.payload, done))
            ids, cpu_ns = await done
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
        for _ in self._threads:
            self._waiting.put(None)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        """A thread's life: an executor would make a lock, two futures and a semaphore's turn of every prompt."""
        while (job := self._waiting.get()) is not None:
            endpoint, payload, done = job
            if done.cancelled():
                continue
            try:
                outcome: tuple[list[int], int] | Exception = self._measured(endpoint, payload)
            except Exception as error:
                outcome = error
            try:
                loop.call_soon_threadsafe(_hand_over, done, outcome)
            except RuntimeError:  # the loop has ended
                return

    def _measured(self, endpoint: Endpoint, payload: bytes) -> tuple[list[int], int]:
        began_ns = time.thread_time_ns()
        ids = self._tokenise(endpoint, payload)
        return ids, time.thread_time_ns() - began_ns

    def _tokenise(self, endpoint: Endpoint, payload: bytes) -> list[int]:
        try:
            if endpoint is Endpoint.CHAT:
                chat = _chat.decode(payload)
                # A model that may call nothing is told of nothing: it would try.
                tools = chat.tools if chat.tools and chat.tool_choice != "none" else None
                return self._engine.tokenize_chat(chat.messages, tools)
            prompt = _completion.decode(payload).prompt
        except msgspec.MsgspecError as error:
            raise EngineInputError("invalid_body", param_of(endpoint), str(error)) from None
        if isinstance(prompt, str):
            return self._engine.tokenize(prompt)
        if len(prompt) == 1 and isinstance(prompt[0], str):
            return self._engine.tokenize(prompt[0])
        ids = prompt[0] if len(prompt) == 1 and isinstance(prompt[0], list) else prompt
        known = [token for token in ids if isinstance(token, int)]
        if known and len(known) == len(ids):
            return known
        raise EngineInputError(
            "invalid_prompt", "prompt", "prompt must be one string or one list of token ids per request"
        )


def _hand_over(
    done: asyncio.Future[tuple[list[int], int]], outcome: tuple[list[int], int] | Exception
) -> None:
    if done.done():
        return
    if isinstance(outcome, Exception):
        done.set_exception(outcome)
    else:
        done.set_result(outcome)


def param_of(endpoint: Endpoint) -> str:
    """The public field that holds the prompt."""
    return "messages" if endpoint is Endpoint.CHAT else "prompt"
