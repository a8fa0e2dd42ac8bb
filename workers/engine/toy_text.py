"""The toy engine's language: 4,096 two-syllable words, a tokenizer for any text, a chat template, a "model".

Pure and fast: a token costs some 0.2 microseconds. Words of the language are one token each; other text is
cut into pieces of up to four characters, so a token is about four characters either way, as with real
tokenizers.
"""

from __future__ import annotations

import re
import zlib
from array import array
from itertools import chain
from typing import Any, Final

from workers.engine.chat import check_messages

BOS, EOS, DIE, HANG = 1, 2, 3, 4
_ROLES: Final = {"system": 8, "developer": 8, "user": 9, "assistant": 10, "tool": 11}
_FIRST_WORD: Final = 16
_SYLLABLES: Final = [onset + vowel for onset in "bdfghjklmnprstvz" for vowel in "aeio"]
_WORDS: Final = [a + b for a in _SYLLABLES for b in _SYLLABLES]
N_WORDS: Final = len(_WORDS)
# Text of every token id; special ids have none.
PIECES: Final = [""] * _FIRST_WORD + [" " + word for word in _WORDS]
_FAULTS: Final = {"<die>": DIE, "<hang>": HANG}
# Every word of the language has four characters, so cutting at four finds words and other text alike.
_PIECE_OR_FAULT: Final = re.compile(r"<die>|<hang>|\S{1,4}")
_MAX_REMEMBERED: Final = 65_536
_MAX_REMEMBERED_CHARS: Final = 32  # a longer word is cut anew each time: bounds what is remembered
_LONG_PROMPT: Final = 2048  # tokens


class _Ids(dict[str, int]):
    """Token ids of pieces; those outside the language are hashed into it, and remembered up to a bound."""

    def __missing__(self, piece: str) -> int:
        token = _FIRST_WORD + zlib.crc32(piece.encode("utf-8", "surrogatepass")) % N_WORDS
        if len(self) < _MAX_REMEMBERED:
            self[piece] = token
        return token


_IDS: Final = _Ids({word: _FIRST_WORD + i for i, word in enumerate(_WORDS)})


class _WordIds(dict[str, tuple[int, ...]]):
    """Token ids of whole words (between white space), remembered up to a bound."""

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple([_IDS[word[at : at + 4]] for at in range(0, len(word), 4)])
        if len(self) < _MAX_REMEMBERED and len(word) <= _MAX_REMEMBERED_CHARS:
            self[word] = ids
        return ids


_WORD_IDS: Final = _WordIds()


def tokenize(text: str, faults: bool = False) -> list[int]:
    """Token ids of any text; equal texts give equal ids. 1,000 characters take some 10 microseconds.

    `faults`: `<die>` and `<hang>` get their own tokens.
    """
    if faults:
        return [_FAULTS.get(piece) or _IDS[piece] for piece in _PIECE_OR_FAULT.findall(text)]
    return list(chain.from_iterable(map(_WORD_IDS.__getitem__, text.split())))


def decode(ids: list[int]) -> str:
    return "".join(PIECES[i] for i in ids).removeprefix(" ")


def tokenize_chat(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, faults: bool = False
) -> list[int]:
    """`bos (role content eos)* assistant`.

    Raises EngineInputError naming the message that is not understood.
    """
    checked = check_messages(messages)
    ids = [BOS]
    if tools:
        ids += [_ROLES["system"], *tokenize(repr(tools)), EOS]
    for message in checked:
        ids += [_ROLES[message["role"]], *tokenize(message["content"], faults)]
        if message.get("tool_calls"):
            ids += tokenize(repr(message["tool_calls"]))
        ids.append(EOS)
    ids.append(_ROLES["assistant"])
    return LongPrompt(ids) if len(ids) >= _LONG_PROMPT else ids


def spelled(text: str) -> tuple[list[int], list[str]]:
    """Token ids of any text and the text of each, which together are the text; the end is a token without."""
    texts = [text[at : at + 4] for at in range(0, len(text), 4)]
    return [*(_IDS[piece] for piece in texts), EOS], [*texts, ""]


def seed_of(prompt_token_ids: list[int], seed: int | None) -> int:
    """A 32-bit number that stands for the prompt (and the sampling seed)."""
    if not seed and isinstance(prompt_token_ids, LongPrompt):
        return prompt_token_ids.seed
    return zlib.crc32(array("I", prompt_token_ids), (seed or 0) & 0xFFFFFFFF)


class LongPrompt(list[int]):
    """Token ids with the number that stands for them. It takes 90 us for 50 KB of text, and long texts are tokenised in
    a thread (workers/prompt.py): there it keeps nobody waiting, on the engine's loop every stream."""

    __slots__ = ("seed",)

    def __init__(self, ids: list[int]) -> None:
        super().__init__(ids)
        self.seed = seed_of(ids, None)


def token_at(seed: int, position: int) -> int:
    """The output token at a position (from 0): an integer hash, uniform over the words."""
    x = (seed + position * 0x9E3779B1) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x85EBCA6B) & 0xFFFFFFFF
    return _FIRST_WORD + ((x >> 13) ^ x) % N_WORDS


def tokens_at(seed: int, start: int, stop: int) -> list[int]:
    """`token_at` for the positions `start` to `stop - 1`, without a call each."""
    return [
        _FIRST_WORD
        + (
            (
                (x := (((x := (seed + at * 0x9E3779B1) & 0xFFFFFFFF) ^ (x >> 15)) * 0x85EBCA6B) & 0xFFFFFFFF)
                >> 13
            )
            ^ x
        )
        % N_WORDS
        for at in range(start, stop)
    ]


def alternatives(token: int, n: int) -> list[int]:
    """The chosen token and its `n - 1` neighbours, for well-formed logprobs."""
    return [token] + [_FIRST_WORD + (token + k) % N_WORDS for k in range(1, n)] if n else []
