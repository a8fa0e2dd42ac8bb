"""The beginnings of a simulated prompt as a gateway would hash them: at the same lengths, and as few of them.

A recording knows a prompt by blocks of BLOCK tokens, so a beginning that ends inside a block is known by that block:
two prompts that part inside one share none of it here. Called by the production router and queue of the simulator
(routers.py, queues.py).
"""

from __future__ import annotations

from typing import Final

from autoscaler.sim.job import Job
from autoscaler.sim.prefixcache import BLOCK
from controlplane.policy.prefix import FIRST_TOKENS, rungs

_MOST: Final = 18  # as `fine_hashes` of the gateway: the beginnings of 128 KiB
_RUNGS: Final = tuple(
    (rung, rung * FIRST_TOKENS, -(-rung * FIRST_TOKENS // BLOCK) - 1) for rung in rungs(1 << 20)[:_MOST]
)  # (rung, tokens, block in which it ends)

Beginnings = tuple[list[tuple[int, int]], list[int]]
_NONE: Final[Beginnings] = ([], [])


def fine(job: Job) -> Beginnings:
    """What `fine_hashes` and `ends` (policy/prefix.py) would say: keys, shortest first, and the tokens each ends at."""
    blocks = job.prefix
    if not blocks:
        return _NONE
    keys, ends = [], []
    n_tokens, n_blocks = job.n_prompt, len(blocks)
    for rung, end, block in _RUNGS:
        if end > n_tokens or block >= n_blocks:
            break
        keys.append((blocks[block], rung))
        ends.append(end)
    return keys, ends


def names(job: Job) -> tuple[str, ...]:
    """Those that the cell's queue is told (`coarse`), as names."""
    keys, _ = fine(job)
    return tuple(f"{block}:{rung}" for block, rung in (*keys[:1], *keys[1::2]))
