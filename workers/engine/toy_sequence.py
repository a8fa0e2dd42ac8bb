"""One request inside the toy engine: where it stands, and its next token. Used by toy.py only."""

from __future__ import annotations

import asyncio

from workers.contract import FinishReason
from workers.engine import toy_text
from workers.engine.base import EngineRequest
from workers.engine.text import StopMatcher

MIN_NATURAL_TOKENS, MAX_NATURAL_TOKENS = 16, 200  # the "model" ends by itself within these


class Sequence:
    """One request inside the engine. `n_computed` tokens of prompt + output have (pretended) KV."""

    __slots__ = (
        "ended",
        "finish",
        "key",
        "matcher",
        "n_blocks",
        "n_computed",
        "n_delta",
        "n_end",
        "n_out",
        "n_prompt",
        "n_room",
        "new_ids",
        "new_text",
        "request",
        "seed",
        "waiter",
    )

    def __init__(self, request: EngineRequest, key: tuple[int, int], n_context_left: int) -> None:
        sampling = request.sampling
        self.request = request
        self.key = key
        self.n_prompt = len(request.prompt_token_ids)
        self.n_delta = 1  # tokens that make a delta; the first one is told at once, whatever the hint
        self.n_out = 0
        self.n_computed = self.n_blocks = self.n_room = 0
        self.seed = toy_text.seed_of(
            request.prompt_token_ids, sampling.seed if sampling.temperature else None
        )
        natural = MIN_NATURAL_TOKENS + self.seed % (MAX_NATURAL_TOKENS - MIN_NATURAL_TOKENS + 1)
        limit = min(sampling.max_tokens, n_context_left)
        # Position at which the end-of-sequence token comes; beyond the limit it never does.
        self.n_end = limit if sampling.ignore_eos else min(limit, natural)
        self.ended = FinishReason.LENGTH if sampling.ignore_eos or limit < natural else FinishReason.STOP
        self.matcher = StopMatcher(sampling.stop)
        self.finish: FinishReason | None = None
        self.new_ids: list[int] = []
        self.new_text: list[str] = []
        self.waiter: asyncio.Future[None] | None = None

    def advance(self) -> None:
        """One output token: id, text, end."""
        at = self.n_out
        self.n_out = at + 1
        last = self.n_out >= self.n_end
        if last and self.ended is FinishReason.STOP:
            token, piece = toy_text.EOS, ""
        else:
            token = toy_text.token_at(self.seed, at)
            piece = toy_text.PIECES[token] if at else toy_text.PIECES[token][1:]
        self.new_ids.append(token)
        self.new_text.append(self.matcher.push(piece, last))
        if self.matcher.stopped:
            self.finish = FinishReason.STOP
        elif last:
            self.finish = self.ended

    def replay(self) -> None:
        """Bring the state to where earlier attempts left off, emitting nothing."""
        for _ in self.request.prior_token_ids:
            if self.finish is not None:
                break
            self.advance()
        self.new_ids.clear()
        self.new_text.clear()

    def wake(self) -> None:
        waiter = self.waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
