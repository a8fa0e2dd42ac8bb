"""From token ids to the text a client may see: incremental decoding and stop strings, exact across attempts.

Both engines use it. Text may be held back (half of a UTF-8 character, the possible start of a stop string, or of a
call that native_calls.py rewrites); what is held back depends on the token ids alone, so a resumed attempt that replays
the prior ids arrives at exactly the text already emitted and continues from there. That is why the engines' own stop
handling is not used: it starts from nothing on every attempt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from workers.engine.native_calls import NativeCalls

# Prompt ids that prime the decoder, so that it knows whether the first output token begins a word.
_N_PRIMING: Final = 32


class StopMatcher:
    """Cuts a growing text at the first stop string and holds back what might become one."""

    __slots__ = ("_held", "_n_hold", "_stops", "stopped")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(s for s in stops if s)
        self._n_hold = max((len(s) for s in self._stops), default=1) - 1
        self._held = ""  # the last characters, not emitted yet: a stop string may begin in them
        self.stopped = False

    def push(self, piece: str, final: bool = False) -> str:
        """The text that may be emitted now that `piece` has arrived.

        After a match `stopped` is True and the text ends before the stop string. `final`: nothing follows,
        release everything.
        """
        if not self._stops:
            return piece
        text = self._held + piece
        cuts = [at for s in self._stops if (at := text.find(s)) >= 0]
        if cuts:
            self.stopped = True
            return text[: min(cuts)]
        n_out = len(text) if final else max(0, len(text) - self._n_hold)
        self._held = text[n_out:]
        return text[:n_out]


class Detokenizer:
    """Text of one sequence, token by token, through the model's own (Rust) tokenizer; special tokens have
    none.
    """

    __slots__ = ("_calls", "_matcher", "_shown", "_stream", "_tokenizer")

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: list[int],
        stops: tuple[str, ...],
        shown: dict[int, str] | None = None,
        calls: NativeCalls | None = None,
    ) -> None:
        """`shown`: special tokens that have a text all the same. `calls`: rewrites those in the text."""
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=prompt_token_ids[-_N_PRIMING:], skip_special_tokens=True)
        self._matcher = StopMatcher(stops)
        self._shown = shown or {}
        self._calls = calls

    @property
    def stopped(self) -> bool:
        return self._matcher.stopped

    def push(self, token_ids: list[int], final: bool = False) -> tuple[int, str]:
        """How many of `token_ids` count (all, or those up to the one that completed a stop string), and the
        text that may be emitted now. `final`: release what was held back, save half of a character."""
        out = []
        for n, token_id in enumerate(token_ids, start=1):
            piece = self._step(token_id)
            if piece:
                out.append(self._matcher.push(piece))
                if self._matcher.stopped:
                    text = "".join(out)
                    return n, text if self._calls is None else self._calls.read(text, final=True)
        if final:
            out.append(self._matcher.push("", final=True))
        text = "".join(out)
        return len(token_ids), text if self._calls is None else self._calls.read(text, final=final)

    def _step(self, token_id: int) -> str | None:
        if token_id in self._shown:
            return self._shown[token_id]
        try:
            return self._stream.step(self._tokenizer, token_id)
        except Exception as error:
            # Some tokenizers yield text that shrinks (invalid UTF-8); the stream then starts afresh.
            # Deterministic in the ids, so still equal on every attempt.
            if not str(error).startswith("Invalid prefix encountered"):
                raise
            from tokenizers.decoders import DecodeStream

            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self._tokenizer, token_id)
