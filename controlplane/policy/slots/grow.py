"""When a replica is given more slots: requests want them, and the prediction and the KV cache carry them."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from controlplane.policy.slots.types import Answer, SlotMemory, SlotObservation, SlotTarget
from controlplane.policy.slots.window import CALM, KV_CALM, Window, queue_mark

GROW_BEATS, GROW_STEPS = 2, 8
# Below this share of the target one slot more (or a sixteenth) is tried although nothing can be predicted yet.
PROBE, PROBE_SHARE = 0.75, 16
STEPS_OF_GROWTH: Final = 8  # from one slot to the ceiling
LEAST_GROWTH: Final = 20  # a step below one twentieth of the slots is not worth the unrest
# Without anybody waiting slots follow the prediction this slowly: a pool scaled out for a bad hour finds back.
UNASKED_EVERY_S: Final = 10.0


def grow(memory: SlotMemory, window: Window, seen: SlotObservation, target: SlotTarget) -> Answer:
    """Additive increase, as far as the prediction and the KV cache carry it."""

    def stay(why: str) -> Answer:
        return memory.slots, memory, why

    slope_ms = memory.fit.slope_ms
    if memory.slots >= target.ceiling:
        return stay(f"all {target.ceiling} slots are given")
    if window.n_beats < GROW_BEATS or window.n_steps < GROW_STEPS:
        return stay("too little was measured yet")
    if seen.at_s - memory.shrunk_at_s < memory.patience_s:
        return stay("shrunk a moment ago")
    unasked = not window.wants_more
    changed_at_s = max(memory.grown_at_s, memory.shrunk_at_s)
    if unasked and (slope_ms is None or seen.at_s - changed_at_s < UNASKED_EVERY_S):
        return stay("nobody wants more")
    if window.engine_queue > queue_mark(memory.slots) or window.n_preempted:
        return stay(
            f"{window.engine_queue:.1f} wait in the engine and {window.n_preempted} were put back: no more"
        )
    if window.kv_used_ratio >= KV_CALM:
        return stay(f"KV cache {window.kv_used_ratio:.0%} used: no more")
    limit = memory.slots + max(1, target.ceiling // STEPS_OF_GROWTH)
    said = "no promise on gaps"
    if target.itl_ms:
        calm_ms = CALM * target.itl_ms
        feasible = _whole(window.feasible(calm_ms, slope_ms))
        if slope_ms is None and window.p95_ms <= PROBE * target.itl_ms:
            feasible = max(feasible, memory.slots + max(1, memory.slots // PROBE_SHARE))
        limit = min(limit, feasible)
        said = window.said(target)
    if window.kv_used_ratio > 0:
        limit = min(limit, _whole(window.batch * KV_CALM / window.kv_used_ratio))
    if unasked:
        limit = min(limit, _whole(2 * window.batch))
    slots = target.clamp(limit)
    if slots < min(memory.slots + max(1, memory.slots // LEAST_GROWTH), target.ceiling):
        return stay(f"{said}: more would come too near")
    why = f"grows from {memory.slots}: {said}, {seen.n_queued} queued"
    return slots, replace(memory, slots=slots, beats=(), grown_at_s=seen.at_s), why


def _whole(n: float) -> int:
    return int(min(n, 1e9))
