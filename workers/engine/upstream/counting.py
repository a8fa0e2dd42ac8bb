"""Tokens of an endpoint's texts, counted here: with the deployment's own tokenizer where it lies on this machine.

Called by the upstream engine. What the endpoint reports itself comes first, these counts only bound an answer while it
runs and stand in where no usage is reported. `by` says which it was, and travels to the bill. Never logs text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from workers.engine.base import BY_ESTIMATE

BY_UPSTREAM: Final = "upstream"  # the endpoint's own usage
BY_TOKENIZER: Final = "tokenizer"
TOY: Final = "toy"
_BYTES_PER_TOKEN: Final = 4
_TOKENS_PER_MESSAGE: Final = 4
_LEAST_BYTES: Final = 2  # of text per token that is handed on; single characters are no tokens
MAX_TOKENIZER_BYTES: Final = 64 << 20


class Counter:
    """`count(text)`, and by which means."""

    def __init__(self, sources: Sequence[str]) -> None:
        """`sources`: `toy`, or tokenizer.json files, the first that can be read is taken."""
        self.by = BY_ESTIMATE
        self._count: Callable[[str], int] = estimate
        for source in sources:
            found = _toy() if source == TOY else _from_file(Path(source))
            if found is not None:
                self.by, self._count = BY_TOKENIZER, found
                return

    def count(self, text: str) -> int:
        return self._count(text) if text else 0

    def chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> int:
        """Of a prompt: its texts and some tokens around each of them."""
        text = sum(self.count(str(message.get("content") or "")) for message in messages)
        text += sum(self.count(json.dumps(m["tool_calls"])) for m in messages if m.get("tool_calls"))
        more = self.count(json.dumps(tools)) if tools else 0
        return text + more + _TOKENS_PER_MESSAGE * len(messages)


class Running:
    """Tokens of an answer as it arrives, of which only the text is known."""

    __slots__ = ("_limit", "n", "n_bytes")

    def __init__(self, limit: int) -> None:
        self.n = self.n_bytes = 0
        self._limit = limit

    def add(self, text: str) -> int:
        """How many tokens to hand on with this piece: one, more with much text, none with hardly any. Never the last
        of those allowed: only the end of the answer knows which that is."""
        self.n_bytes += len(text.encode())
        due = max(self.n_bytes // _BYTES_PER_TOKEN, min(self.n + 1, self.n_bytes // _LEAST_BYTES), 1)
        added = max(0, min(due, self._limit - 1) - self.n)
        self.n += added
        return added


def estimate(text: str) -> int:
    """Of texts of any model: about four bytes each."""
    return max(1, -(-len(text.encode()) // _BYTES_PER_TOKEN))


def _toy() -> Callable[[str], int]:
    from workers.engine import toy_text

    return lambda text: len(toy_text.tokenize(text))


def _from_file(path: Path) -> Callable[[str], int] | None:
    try:
        if not 0 < path.stat().st_size <= MAX_TOKENIZER_BYTES:
            return None
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
    except Exception:  # missing, damaged, or of a kind this version cannot read: then it is estimated
        return None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
