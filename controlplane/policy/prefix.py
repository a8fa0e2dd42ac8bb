"""Which beginnings of a prompt a replica probably holds in its cache: short salted hashes, pure.

`hashes` is called by the gateway per request; the cell remembers which of them each replica was given
(workers/lua/lib_queue.lua), and `PrefixIndex` is the same memory for the simulator. A wrong guess costs a
detour within the fairness window, never a wrong answer, so the hashes may be short.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

from controlplane.policy.ranking import Ranking

# The same numbers as in lib_queue.lua.
FIRST_TOKENS: Final = 64
MAX_PER_REPLICA: Final = 4096

ADAPTER_MARK: Final = "~"

FIRST_BYTES: Final = 256  # about FIRST_TOKENS tokens
_MAX_HASHES: Final = 10  # up to 128 KiB
_RUNGS: Final = (1, *(k << n for n in range(20) for k in (2, 3)))


def hashes(salt: str, text: bytes) -> tuple[str, ...]:
    """Hashes of the first 256, 512, 1024, ... bytes of `text`, 8 characters each, shortest first.

    Each continues the one before, so a prompt is read once, and ten of them cover 128 KiB (CRC-32: 10 us for
    50 KB, a tenth of any digest; two prompts of one replica's 4,096 meet by chance once in a million). `salt`
    is the organization: tenants share no prefix, as they share no cache.
    """
    if len(text) < FIRST_BYTES:
        return ()
    running = zlib.crc32(salt.encode())
    view = memoryview(text)
    found: list[str] = []
    start, end = 0, FIRST_BYTES
    while end <= len(text) and len(found) < _MAX_HASHES:
        running = zlib.crc32(view[start:end], running)
        found.append(f"{running:08x}")
        start, end = end, 2 * end
    return tuple(found)


def fine_hashes(salt: str, text: bytes) -> tuple[str, ...]:
    """Those of `hashes`, and between each two of them one at half the way: 256, 512, 768, 1,024, 1,536, ... bytes, for
    the gateway's own memory, where they cost no round trip. The others are every second from the end of the first."""
    if len(text) < FIRST_BYTES:
        return ()
    running = zlib.crc32(salt.encode())
    view = memoryview(text)
    found: list[str] = []
    start = 0
    for rung in _RUNGS[: 2 * _MAX_HASHES - 2]:
        end = FIRST_BYTES * rung
        if end > len(text):
            break
        running = zlib.crc32(view[start:end], running)
        found.append(f"{running:08x}")
        start = end
    return tuple(found)


def coarse(fine: Sequence[object]) -> tuple[object, ...]:
    """`hashes` of the text whose `fine_hashes` these are."""
    return (*fine[:1], *fine[1::2])


def rungs(n: int) -> tuple[int, ...]:
    """Lengths of `fine_hashes` in units of the first, up to `n`: 1, 2, 3, 4, 6, 8, 12, ..."""
    return _RUNGS[: bisect_right(_RUNGS, n)]


def ends(fine: Sequence[object], n_bytes: int, n_prompt: int) -> tuple[int, ...]:
    """Tokens at which each of a text's `fine_hashes` ends, the text having `n_bytes` and about `n_prompt` tokens."""
    per_rung = FIRST_BYTES * n_prompt / max(n_bytes, 1)
    return tuple(int(rung * per_rung) for rung in _RUNGS[: len(fine)])


def mark_of(adapter: str) -> str:
    """What stands before the prefixes of a request for a LoRA adapter: a replica that was given it holds the adapter,
    and the queue prefers it as it does one with the prompt's beginning. `adapter`: a UUIDv7 as hex, random at its
    end."""
    return ADAPTER_MARK + adapter[-7:]


def n_of_prompt(prefixes: Sequence[str], n_matched: int) -> int:
    """Of the first `n_matched`, those that stand for prompt tokens."""
    return n_matched - 1 if n_matched > 0 and prefixes[0].startswith(ADAPTER_MARK) else n_matched


def cached_tokens(n_matched: int, n_prompt: int) -> int:
    """Prompt tokens that `n_matched` known prefixes stand for."""
    return min(n_prompt, FIRST_TOKENS << (n_matched - 1)) if n_matched else 0


class PrefixIndex:
    """Prefixes one replica was given, the least recently used forgotten first."""

    __slots__ = ("_used",)

    def __init__(self) -> None:
        self._used = Ranking()

    def longest(self, prefixes: Sequence[str]) -> int:
        """How many of a request's prefixes (shortest first) the replica holds."""
        for n in range(len(prefixes), 0, -1):
            if prefixes[n - 1] in self._used:
                return n
        return 0

    def note(self, prefixes: Sequence[str], now_ms: int) -> None:
        """The replica is given a request with these prefixes."""
        for prefix in prefixes:
            self._used.put(prefix, now_ms)
        while len(self._used) > MAX_PER_REPLICA:
            self._used.drop(self._used.first())

    def clear(self) -> None:
        self._used = Ranking()

    def items(self) -> dict[str, int]:
        """Prefix -> instant of its last use."""
        return self._used.items()
