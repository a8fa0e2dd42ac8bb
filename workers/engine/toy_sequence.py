"""One request inside the toy engine: where it stands, and its next tokens. Used by toy.py only.

Which token comes when is settled by the prompt, so a step counts tokens only and they are made when somebody takes
them, many at a time. Only stop strings must be looked for as the text grows.
"""

from __future__ import annotations

import asyncio

from workers.contract import FinishReason
from workers.engine import toy_text
from workers.engine.base import EngineRequest
from workers.engine.text import StopMatcher

MIN_NATURAL_TOKENS, MAX_NATURAL_TOKENS = 16, 200  # the "model" ends by itself within these


class Sequence:
    """One request inside the engine. `n_computed` tokens of prompt + output have (pretended) KV; `n_out` tokens are
    produced, `n_told` of them taken; the consumer is woken at `n_due`."""

    __slots__ = (
        "_matcher",
        "_text",
        "ended",
        "finish",
        "key",
        "n_blocks",
        "n_computed",
        "n_due",
        "n_end",
        "n_out",
        "n_prompt",
        "n_room",
        "n_told",
        "request",
        "seed",
        "waiter",
    )

    def __init__(
        self, request: EngineRequest, key: tuple[int, int], n_context_left: int, adapter_seed: int = 0
    ) -> None:
        sampling = request.sampling
        self.request = request
        self.key = key
        self.n_prompt = len(request.prompt_token_ids)
        self.n_out = self.n_told = 0
        self.n_due = 1  # the first token is told at once, whatever the hint
        self.n_computed = self.n_blocks = self.n_room = 0
        self.seed = toy_text.seed_of(
            request.prompt_token_ids, sampling.seed if sampling.temperature else None
        )
        if adapter_seed:
            self.seed ^= adapter_seed
        natural = MIN_NATURAL_TOKENS + self.seed % (MAX_NATURAL_TOKENS - MIN_NATURAL_TOKENS + 1)
        limit = min(sampling.max_tokens, n_context_left)
        # Position at which the end-of-sequence token comes; beyond the limit it never does.
        self.n_end = limit if sampling.ignore_eos else min(limit, natural)
        self.ended = FinishReason.LENGTH if sampling.ignore_eos or limit < natural else FinishReason.STOP
        self._matcher = StopMatcher(sampling.stop) if sampling.stop else None
        self._text: list[str] = []  # with stop strings: what may be shown and was not taken
        self.finish: FinishReason | None = None
        self.waiter: asyncio.Future[None] | None = None

    @property
    def countable(self) -> bool:
        """Whether nothing but the number of tokens decides when it ends."""
        return self._matcher is None

    def advance(self) -> None:
        """One output token."""
        self.n_out += 1
        last = self.n_out >= self.n_end
        if last:
            self.finish = self.ended
        if self._matcher is not None:
            self._text.append(self._matcher.push(self._made(self.n_out - 1)[1], last))
            if self._matcher.stopped:
                self.finish = FinishReason.STOP

    def take(self) -> tuple[list[int], str]:
        """Token ids and text produced since the last call."""
        n_told, self.n_told = self.n_told, self.n_out
        if self._matcher is not None:
            text = "".join(self._text)
            self._text.clear()
            return self._made(n_told)[0], text
        if self.n_out == n_told + 1 and n_told > 0 and self.finish is None:  # the usual case of a stream
            token = toy_text.token_at(self.seed, n_told)
            return [token], toy_text.PIECES[token]
        return self._made(n_told)

    def take_singly(self) -> list[tuple[list[int], str]]:
        """The same, token by token; one empty portion where there is nothing new."""
        n_told = self.n_told
        held_back = list(self._text)
        ids, _ = self.take()
        if self._matcher is not None:
            texts = held_back
        else:
            texts = [toy_text.PIECES[token] for token in ids]
            if texts and n_told == 0:
                texts[0] = texts[0][1:]
        return [([token], text) for token, text in zip(ids, texts, strict=True)] or [([], "")]

    def replay(self) -> None:
        """Bring the state to where earlier attempts left off, emitting nothing."""
        for _ in self.request.prior_token_ids:
            if self.finish is not None:
                break
            self.advance()
        self.n_told = self.n_out
        self.n_due = self.n_out + 1
        self._text.clear()

    def wake(self) -> None:
        waiter = self.waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _made(self, start: int) -> tuple[list[int], str]:
        """Ids and text of the tokens from `start` on."""
        ids = toy_text.tokens_at(self.seed, start, self.n_out)
        if ids and self.n_out >= self.n_end and self.ended is FinishReason.STOP:
            ids[-1] = toy_text.EOS
        text = "".join([toy_text.PIECES[token] for token in ids])
        return ids, text if start else text[1:]


class Spelled(Sequence):
    """One whose answer is a given text."""

    __slots__ = ("_ids", "_texts")

    def __init__(
        self, request: EngineRequest, key: tuple[int, int], n_context_left: int, adapter_seed: int, text: str
    ) -> None:
        super().__init__(request, key, n_context_left, adapter_seed)
        self._ids, self._texts = toy_text.spelled(text)
        limit = min(request.sampling.max_tokens, n_context_left)
        self.n_end = min(limit, len(self._ids))
        self.ended = FinishReason.STOP if len(self._ids) <= limit else FinishReason.LENGTH

    def take(self) -> tuple[list[int], str]:
        if self._matcher is not None:
            return super().take()
        n_told, self.n_told = self.n_told, self.n_out
        return self._made(n_told)

    def take_singly(self) -> list[tuple[list[int], str]]:
        n_told = self.n_told
        held_back = list(self._text)
        ids, _ = self.take()
        texts = held_back if self._matcher is not None else self._texts[n_told : self.n_out]
        return [([token], text) for token, text in zip(ids, texts, strict=True)] or [([], "")]

    def _made(self, start: int) -> tuple[list[int], str]:
        return self._ids[start : self.n_out], "".join(self._texts[start : self.n_out])
