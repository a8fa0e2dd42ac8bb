"""What of a prompt tells how long its answer will be: hashed words and a few counts. Pure, and cheap enough for a
gateway (docs/results/lengths.md says how cheap).

Used alike by training and by the model that runs; a change here makes old artefacts worthless, so it raises VERSION.
"""

from __future__ import annotations

import math
import re
import zlib
from typing import Final, NamedTuple

VERSION: Final = 1
BUCKETS: Final = 2048
# What is asked stands at the beginning or at the end; what lies between is material.
_HEAD, _TAIL = 600, 400
_WORDS: Final = re.compile(r"[a-z]+|[0-9]+|[^\sa-z0-9]")
_SIZE: Final = re.compile(
    r"([0-9]{1,5})[\s-]*(?:words?|characters?|sentences?|paragraphs?|pages?|items?|lines?)"
)
DENSE: Final = (
    "log_chars",
    "log_lines",
    "is_question",
    "has_code",
    "non_ascii_share",
    "digit_share",
    "log_size_asked",
)


class Features(NamedTuple):
    """`words`: distinct buckets; `dense`: values in the order of DENSE, all within a few units of 0."""

    words: tuple[int, ...]
    dense: tuple[float, ...]


def features(text: str) -> Features:
    """Of a prompt's text (of a chat: the last message of the user)."""
    n = len(text)
    part = text if n <= _HEAD + _TAIL else f"{text[:_HEAD]} {text[-_TAIL:]}"
    lower = part.lower()
    crc = zlib.crc32
    words = {crc(word.encode()) % BUCKETS for word in set(_WORDS.findall(lower))}
    n_part = max(len(part), 1)
    size = _SIZE.search(lower)
    dense = (
        math.log1p(n) / 5 - 1,
        math.log1p(text.count("\n")) / 2,
        1.0 if part.rstrip().endswith(("?", "？")) else 0.0,
        1.0 if "```" in text or "def " in part or "#include" in part else 0.0,
        0.0 if part.isascii() else (len(part.encode()) - n_part) / n_part / 2,
        sum(map(part.count, "0123456789")) / n_part * 5,
        math.log1p(int(size[1])) / 5 if size else 0.0,
    )
    return Features(tuple(sorted(words)), dense)
