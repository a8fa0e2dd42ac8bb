"""Read an engine's answer to the end, keeping what tests ask about."""

from contextlib import aclosing
from dataclasses import dataclass, field

from workers.contract import FinishReason
from workers.engine.base import Engine, EngineRequest, TokenLogprob


@dataclass
class Answer:
    """`pieces` are (number of tokens so far, text of that delta)."""

    token_ids: list[int] = field(default_factory=list)
    pieces: list[tuple[int, str]] = field(default_factory=list)
    finish: FinishReason | None = None
    n_cached: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.pieces)

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    def texts_after(self, n_tokens: int) -> str:
        """Text of the deltas that came after the first `n_tokens` tokens, where a delta must end."""
        assert any(n == n_tokens for n, _ in self.pieces)
        return "".join(text for n, text in self.pieces if n > n_tokens)


async def read(engine: Engine, request: EngineRequest) -> Answer:
    answer = Answer()
    async with aclosing(engine.generate(request)) as deltas:
        async for delta in deltas:
            assert answer.finish is None, "a delta after the last one"
            answer.token_ids += delta.token_ids
            answer.pieces.append((len(answer.token_ids), delta.text))
            answer.finish = delta.finish
            answer.n_cached = max(answer.n_cached, delta.n_cached_prompt_tokens)
            answer.logprobs += delta.logprobs or ()
    assert answer.finish is not None
    return answer
