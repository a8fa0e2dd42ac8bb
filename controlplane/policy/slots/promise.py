"""A promise that one request alone would break cannot be kept: what is aimed at then."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from controlplane.policy.slots.types import SlotMemory, SlotTarget
from controlplane.policy.slots.window import JUDGED_BEATS, JUDGED_STEPS, newest, p95_ms

# Within so much of the best there is. What one alone takes is believed for so long, and never more than what any batch
# was seen to take since.
OUT_OF_REACH: Final = 1.5
ALONE_FOR_S: Final = 600.0


def aim_ms(memory: SlotMemory, target: SlotTarget) -> float:
    """The promise, or what is near the best there is where that is out of reach."""
    return max(target.itl_ms, OUT_OF_REACH * memory.alone_ms) if target.itl_ms else 0.0


def note_alone(memory: SlotMemory, at_s: float, target: SlotTarget) -> SlotMemory:
    """What one request alone takes, as far as it was seen: measured while no more than one ran, bounded by all else."""
    if not target.itl_ms:
        return memory
    recent = newest(memory.beats)
    if len(recent) < JUDGED_BEATS or sum(b.n_steps for b in recent) < JUDGED_STEPS:
        return memory
    single = tuple(b for b in memory.beats if b.n_tokens <= 1.5 * b.n_steps)
    if len(single) >= JUDGED_BEATS and single[-1] is memory.beats[-1]:
        memory = replace(memory, alone_ms=p95_ms(single), alone_at_s=at_s)
    elif at_s - memory.alone_at_s > ALONE_FOR_S:
        memory = replace(memory, alone_ms=0.0)
    alone_ms = min(memory.alone_ms, p95_ms(recent))
    return replace(memory, alone_ms=alone_ms if alone_ms > target.itl_ms else 0.0)
