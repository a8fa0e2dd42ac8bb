"""How much of a workload's prompts any routing could find cached, given the memory of all replicas: bounds.

All replicas' memory as one cache, reached by every request: with the engines' own replacement (least recently used),
and with a replacement that knows the future (Belady), which nothing beats at that memory; and without a limit. Running
requests are given no memory of their own here, so the real bounds lie lower. Asked by the routing study.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

from autoscaler.sim.prefixcache import BLOCK
from autoscaler.sim.workload import Arrival

_NEVER: Final = 1 << 60


def infinite(arrivals: Sequence[Arrival]) -> float:
    """Share of all prompt tokens found when nothing is ever forgotten."""
    return least_recent(arrivals, _NEVER)


def least_recent(arrivals: Sequence[Arrival], n_blocks: int) -> float:
    """One cache of `n_blocks`, least recently used blocks forgotten first, a prompt's end before its beginning."""
    held: OrderedDict[int, None] = OrderedDict()
    n_hit = n_all = 0
    for arrival in arrivals:
        blocks = _blocks(arrival)
        n_hit += _found(arrival, blocks, held.__contains__)
        n_all += arrival.n_prompt
        for block in reversed(blocks):
            held[block] = None
            held.move_to_end(block)
        while len(held) > n_blocks:
            held.popitem(last=False)
    return n_hit / max(n_all, 1)


def clairvoyant(arrivals: Sequence[Arrival], n_blocks: int) -> float:
    """One cache of `n_blocks` that forgets what is used again last. A block's beginning is used whenever it is, so the
    rule keeps prompts whole from the front and is the best there is for prefixes, too."""
    upcoming: dict[int, int] = {}
    again: list[list[int]] = []
    for number in range(len(arrivals) - 1, -1, -1):
        blocks = _blocks(arrivals[number])
        again.append([upcoming.get(block, _NEVER) for block in blocks])
        for block in blocks:
            upcoming[block] = number
    held: dict[int, int] = {}
    heap: list[tuple[int, int, int]] = []
    n_hit = n_all = 0
    for arrival in arrivals:
        blocks, after = _blocks(arrival), again.pop()
        n_hit += _found(arrival, blocks, held.__contains__)
        n_all += arrival.n_prompt
        for depth, (block, at) in enumerate(zip(blocks, after, strict=True)):
            if at == _NEVER:
                held.pop(block, None)
                continue
            held[block] = at
            heapq.heappush(heap, (-at, -depth, block))
        while len(held) > n_blocks:
            at, _, block = heapq.heappop(heap)
            if held.get(block) == -at:
                del held[block]
    return n_hit / max(n_all, 1)


def _blocks(arrival: Arrival) -> tuple[int, ...]:
    """Whole blocks only, as engines share them."""
    return arrival.prefix[: arrival.n_prompt // BLOCK]


def _found(arrival: Arrival, blocks: tuple[int, ...], is_held: Callable[[object], bool]) -> int:
    n = 0
    for block in blocks:
        if not is_held(block):
            break
        n += 1
    return min(n * BLOCK, arrival.n_prompt - 1)  # the last token is always computed
