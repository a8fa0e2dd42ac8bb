"""The `Engine` whose model runs elsewhere: each request is one call of an OpenAI-compatible endpoint, streamed.

Built by front.py where a replica's specification names an endpoint. Token ids are not known here: what is handed on
carries UNKNOWN_ID, so an answer begun here is never continued by another attempt (generate.py). Calls are tried again
before the first token only, within a bound; after it a failure ends the request with what was said. Never logs text,
headers or the credentials.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

from workers.contract import FinishReason, UpstreamSecret, UpstreamSpec
from workers.engine.base import (
    BY_ESTIMATE,
    UNKNOWN_ID,
    AdapterRefused,
    Counted,
    Delta,
    EngineFailed,
    EngineInputError,
    EngineRequest,
    EngineStats,
)
from workers.engine.chat import check_messages
from workers.engine.steps import Steps
from workers.engine.upstream.answer import NotAnAnswerError, Piece
from workers.engine.upstream.ask import PATHS, body_for
from workers.engine.upstream.breaker import Breaker
from workers.engine.upstream.calls import CallFailed, Calls
from workers.engine.upstream.counting import BY_UPSTREAM, Counter, Running
from workers.engine.upstream.spelling import Spelling

_BYTES_PER_TOKEN: Final = 64  # more text than so many bytes per token asked for is no answer to it
_SPARE_BYTES: Final = 64 << 10
_BACKOFF_S: Final = 0.25
_PATIENCE_S: Final = 2.0  # an endpoint that asks for a longer pause is not waited for


class UpstreamEngine:
    """See the module."""

    kv_tokens = 0  # unknown

    def __init__(
        self, spec: UpstreamSpec, secret: UpstreamSecret, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises RefusedAddressError for what is no URL that may be called."""
        self.spec = spec
        self.max_model_len = spec.max_model_len
        self.breaker = Breaker(spec.breaker_failures, spec.breaker_pause_s)
        self.counter = Counter(spec.tokenizers)
        self._now_s = now_s
        self._calls = Calls(spec, secret, now_s)

    # -- the Engine interface

    def tokenize(self, text: str) -> list[int]:
        return self._unknown(self.counter.count(text))

    def tokenize_chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        return self._unknown(self.counter.chat(check_messages(messages), tools))

    def _unknown(self, n: int) -> list[int]:
        """An estimate refuses nothing as too long for the context: the endpoint knows better."""
        most = self.max_model_len * 7 // 8 if self.counter.by == BY_ESTIMATE else n
        return [UNKNOWN_ID] * min(n, max(most, 1))

    async def start(self) -> None:
        """Nothing is called before a request comes."""

    async def stop(self) -> None:
        self._calls.close()

    async def check_health(self) -> None:
        """It does not die: an endpoint that fails is left alone for a while."""

    async def load_adapter(self, adapter: str, directory: Path) -> None:
        raise AdapterRefused("an endpoint elsewhere loads its own adapters")

    async def unload_adapter(self, adapter: str) -> None:
        """None is ever loaded."""

    def stats(self) -> EngineStats:
        # Time limits are its own: the watchdog, which looks for engines that hang, finds nothing to do.
        return EngineStats(0, 0, 0.0, 0, self._now_s(), 0.0)

    def take_steps(self) -> Steps:
        return Steps()

    def offered(self, slots: int) -> int:
        """How many requests to give it at once: none while it is left alone, one to find out how it is."""
        return self.breaker.offered(slots, self._now_s())

    @property
    def note(self) -> str:
        """`open upstream_timeout`, and the like: how it is treated, and why; empty while all is well."""
        code = self.breaker.code
        return f"{self.breaker.state(self._now_s()).value} {code}" if code else ""

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Delta, None]:
        """See Engine. Raises EngineFailed where the endpoint fails."""
        limit = request.sampling.max_tokens
        body = body_for(self.spec, request.endpoint, request.body, request.sampling, limit)
        answer = _Answer(request, limit, self.counter)
        n_tries = 0
        while True:
            self._enter()
            try:
                async with aclosing(self._calls.pieces(PATHS[request.endpoint], body)) as pieces:
                    async for piece in pieces:
                        for delta in answer.take(piece):
                            yield delta
                self.breaker.succeeded()
                break
            except CallFailed as error:
                if error.counts:
                    self.breaker.failed(error.code, self._now_s(), error.retry_after_s)
                else:
                    self.breaker.succeeded()  # it answers, even if not what was hoped for
                n_tries += 1
                pause_s = error.retry_after_s or _BACKOFF_S * 2 ** (n_tries - 1)
                final = answer.began or not error.again or n_tries > self.spec.n_retries
                if final or pause_s > _PATIENCE_S:
                    raise _told(error) from None
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            except BaseException:  # the client has gone, or we stop: it says nothing of the endpoint
                self.breaker.left()
                raise
        for delta in answer.last():
            yield delta

    def _enter(self) -> None:
        now_s = self._now_s()
        if not self.breaker.enter(now_s):
            wait_s = max(self.breaker.opens_in_s(now_s), 1.0)
            raise EngineFailed(
                503,
                "upstream_unavailable",
                f"the endpoint that serves this model fails and is left alone: try again in {wait_s:.0f} s",
            )


class _Answer:
    """Pieces of one answer into deltas. The text of the latest waits for nothing; counts are put right at the end."""

    def __init__(self, request: EngineRequest, limit: int, counter: Counter) -> None:
        self.began = False
        self._request = request
        self._limit = limit
        self._counter = counter
        self._running = Running(limit)
        self._texts: list[str] = []
        self._finish = FinishReason.STOP
        self._usage: Counted | None = None
        self._spelling = Spelling() if request.sampling.calls is not None else None

    def take(self, piece: Piece) -> list[Delta]:
        """Raises CallFailed for an answer that has no end."""
        if piece.finish is not None:
            self._finish = piece.finish
        if piece.usage is not None:
            said = piece.usage
            self._usage = Counted(
                said.n_prompt, said.n_cached, min(said.n_completion, self._limit), BY_UPSTREAM
            )
        text = piece.text if self._spelling is None else self._with_calls(self._spelling, piece)
        if not text:
            return []
        self.began = True
        self._texts.append(text)
        n = self._running.add(text)
        if self._running.n_bytes > _SPARE_BYTES + _BYTES_PER_TOKEN * self._limit:
            raise CallFailed(502, "upstream_garbage", "the endpoint that serves this model does not stop")
        logprobs = piece.logprobs if self._request.sampling.logprobs is not None else None
        return self._deltas(n, text, None, logprobs)

    @staticmethod
    def _with_calls(spelling: Spelling, piece: Piece) -> str:
        try:
            text = spelling.add(piece.text, piece.calls)
        except NotAnAnswerError:
            raise CallFailed(
                502, "upstream_garbage", "the endpoint that serves this model tells of half a call"
            ) from None
        # One that was cut off stays so.
        return text + spelling.close() if piece.finish is FinishReason.STOP else text

    def last(self) -> list[Delta]:
        """The end, with the tokens that were not told of yet. What was told too much of is not billed."""
        counted = self._usage
        if counted is None:
            n_completion = min(max(self._counter.count("".join(self._texts)), int(self.began)), self._limit)
            counted = Counted(-1, 0, n_completion, self._counter.by)
        n_more = max(0, counted.n_completion - self._running.n)
        deltas = self._deltas(n_more, "", self._finish, None)
        deltas[-1] = Delta(deltas[-1].token_ids, "", self._finish, counted=counted)
        return deltas

    def _deltas(self, n: int, text: str, finish: FinishReason | None, logprobs: Any) -> list[Delta]:
        if not self._request.single_tokens or n <= 1:
            return [Delta([UNKNOWN_ID] * n, text, finish, 0, logprobs)]
        singles = [Delta([UNKNOWN_ID], "") for _ in range(n - 1)]
        return [Delta([UNKNOWN_ID], text, None, 0, logprobs), *singles[:-1], Delta([UNKNOWN_ID], "", finish)]


def _told(error: CallFailed) -> EngineFailed | EngineInputError:
    if error.status == 400:
        return EngineInputError(error.code, error.param or "messages", error.message)
    return EngineFailed(error.status, error.code, error.message)
