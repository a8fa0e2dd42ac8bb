"""Probabilities of the output tokens, from the wire's form into OpenAI's two.

Called by sse.py for requests that asked for them. The wire carries per token `[text, logprob, [[text,
logprob], ...]]`; what a machine sends in another form is left out, not trusted.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

_FLOOR: Final = -9999.0  # OpenAI's word for "as good as impossible"; JSON knows no infinity

Token = tuple[str, float, list[tuple[str, float]]]


def tokens_of(wire: list[object] | None) -> list[Token]:
    """Tokens as tuples; empty for None and for what does not have the wire's form."""
    if not wire:
        return []
    try:
        return msgspec.convert(wire, list[Token])
    except msgspec.ValidationError:
        return []


def chat_logprobs(tokens: list[Token]) -> dict[str, Any] | None:
    """`choices[].logprobs` of a chat answer or chunk; None without tokens."""
    if not tokens:
        return None
    content = [
        {**_entry(text, logprob), "top_logprobs": [_entry(t, p) for t, p in top]}
        for text, logprob, top in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: list[Token], n_chars_before: int) -> dict[str, Any] | None:
    """`choices[].logprobs` of a completion, whose text before these tokens has `n_chars_before`
    characters."""
    if not tokens:
        return None
    offsets = []
    for text, _, _ in tokens:
        offsets.append(n_chars_before)
        n_chars_before += len(text)
    return {
        "tokens": [text for text, _, _ in tokens],
        "token_logprobs": [_finite(logprob) for _, logprob, _ in tokens],
        "top_logprobs": [{text: _finite(logprob) for text, logprob in top} or None for _, _, top in tokens],
        "text_offset": offsets,
    }


def _entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode("utf-8", "surrogatepass"))}


def _finite(logprob: float) -> float:
    return logprob if logprob > _FLOOR else _FLOOR  # NaN falls to the floor, too
