"""Which requests a shadow is sent copies of, and how alike two answers are: pure.

Called by the gateway (shadows.py), after the request's own answer has gone out. Works on texts in memory, keeps none.
"""

from __future__ import annotations

from typing import Final

_WHOLE_PPM: Final = 1_000_000
_CHANCE_DIGITS: Final = 8
# Of each text, so that two long answers cost some milliseconds at most.
MAX_CHARS: Final = 20_000


def is_chosen(request: str, share_ppm: int) -> bool:
    """Whether a request (32 hex digits, a UUIDv7) is among `share_ppm` millionths of all. The same for every shadow, so
    that two of one share see the same requests; independent of who is a canary's, which the last digits say."""
    chance = int(request[-4 - _CHANCE_DIGITS : -4] or "f" * _CHANCE_DIGITS, 16)
    return chance * _WHOLE_PPM < share_ppm << (4 * _CHANCE_DIGITS)


def similarity_ppm(one: str, other: str) -> int:
    """The words' triples in common, as a share of all (Jaccard): 1,000,000 for the same words, 0 for nothing shared.
    Texts of fewer than three words count as one triple."""
    mine, theirs = _triples(one[:MAX_CHARS]), _triples(other[:MAX_CHARS])
    if not mine and not theirs:
        return _WHOLE_PPM
    return _WHOLE_PPM * len(mine & theirs) // len(mine | theirs)


def _triples(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    if not words:
        return set()
    return {tuple(words[i : i + 3]) for i in range(max(len(words) - 2, 1))}
