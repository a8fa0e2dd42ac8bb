"""When a replica is given fewer slots: it is crowded inside, or its gaps break the promise."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

from controlplane.policy.slots.promise import aim_ms
from controlplane.policy.slots.types import (
    PATIENCE_FIRST_S,
    QUIET_FIRST_S,
    Answer,
    Shrink,
    SlotMemory,
    SlotObservation,
    SlotTarget,
)
from controlplane.policy.slots.window import (
    CALM,
    JUDGED_BEATS,
    JUDGED_STEPS,
    KV_CALM,
    Window,
    newest,
    queue_mark,
)

SHRINK_MOST: Final = 0.5  # of one decision
SHRINK_FACTOR: Final = 0.75  # of what the promise allows, where keeping clear of it would cost still more
# A growth of the last minute that a shrink undoes doubles the time until the next one.
PATIENCE_MAX_S: Final = 120.0
UNDONE_WITHIN_S: Final = 60.0
# It is not the batch that is slow but the host, or long prompts, when two shrinks in a row changed nothing, or when
# half of the slots did not mend gaps whose median is far from the target. Give them back, then ask again.
FUTILE_SHRINKS: Final = 2
FUTILE_RATIO: Final = 0.95
TAIL_RATIO: Final = 0.5
SERIES_S: Final = 60.0  # a shrink that soon after another belongs to the same series
QUIET_MAX_S: Final = 600.0


def relieve(memory: SlotMemory, window: Window, seen: SlotObservation, target: SlotTarget) -> Answer | None:
    """Requests that wait or are put back inside the engine belong in our queue: down to what really runs."""
    if not window.crowded or window.n_beats < JUDGED_BEATS or memory.slots <= target.floor:
        return None
    runs = window.batch if window.engine_queue > queue_mark(memory.slots) else KV_CALM * memory.slots
    slots = _shrunk(memory.slots, runs, target)
    why = (
        f"shrinks from {memory.slots}: {window.engine_queue:.1f} wait in the engine, {window.n_preempted} put back, "
        f"KV cache {window.kv_used_ratio:.0%} used, {window.batch:.1f} run"
    )
    return slots, _after_shrink(memory, slots, seen, None), why


def relent(memory: SlotMemory, seen: SlotObservation, target: SlotTarget) -> Answer | None:
    """All that run keep their slots where they were crowded only while they began: a replica that takes another's
    requests over computes their prompts at once, and what would shrink for that is not given to newcomers for as long
    as the longest of them runs.
    """
    beats = newest(memory.above)
    if memory.shrink is not None or len(beats) < JUDGED_BEATS or sum(b.n_steps for b in beats) < JUDGED_STEPS:
        return None
    window = Window.of(beats, seen.used, target)
    if max(b.engine_queue for b in beats) > queue_mark(seen.used) or window.n_preempted:
        return None
    if window.kv_used_ratio > KV_CALM or (target.itl_ms and window.p95_ms > CALM * target.itl_ms):
        return None
    slots = target.clamp(seen.used)
    if slots <= memory.slots:
        return None
    why = f"back from {memory.slots} to {slots}: they run, none waits in the engine, {window.said(target)}"
    return slots, replace(memory, slots=slots, above=(), grown_at_s=seen.at_s), why


def slow_down(memory: SlotMemory, window: Window, seen: SlotObservation, target: SlotTarget) -> Answer | None:
    """Multiplicative decrease when the gaps break the promise, unless fewer slots cannot mend it."""
    if not target.itl_ms or window.n_beats < JUDGED_BEATS:
        return None
    if not window.is_slow:
        window = Window.of(memory.beats, memory.slots, target)
    if not window.is_slow:
        return None
    said = window.said(target)
    if seen.at_s < memory.quiet_until_s:
        return memory.slots, memory, f"{said}: fewer slots did not help, left alone for now"
    if memory.slots <= target.floor or window.batch <= 1.0:
        return memory.slots, memory, f"{said}: the fewest slots there can be"
    last = _judged(memory, window, seen)
    least = math.ceil(SHRINK_MOST * last.began) if window.typical_ms <= TAIL_RATIO * target.itl_ms else 1
    by_tail = memory.slots <= least
    if last.n_futile >= FUTILE_SHRINKS or by_tail:
        return _give_back(memory, last.began if by_tail else last.helped, seen, said)
    slope_ms = memory.fit.slope_ms
    if slope_ms is None:
        slope_ms = _slope_of(last, window)
    if slope_ms is None:
        wanted = window.feasible(CALM * target.itl_ms, None)
    else:
        alone_ms = window.at_ms(1.0, slope_ms)
        if alone_ms > target.itl_ms:
            memory = replace(memory, alone_ms=alone_ms, alone_at_s=seen.at_s)
            target = replace(target, itl_ms=aim_ms(memory, target))
            if window.p95_ms <= target.itl_ms:
                return memory.slots, memory, f"{said}: slots stay"
        wanted = max(
            window.feasible(CALM * target.itl_ms, slope_ms),
            SHRINK_FACTOR * window.feasible(target.itl_ms, slope_ms),
        )
    slots = _shrunk(memory.slots, max(wanted, float(least)), target)
    shrink = replace(last, p95_ms=window.p95_ms, typical_ms=window.typical_ms, batch=window.batch)
    return slots, _after_shrink(memory, slots, seen, shrink), f"shrinks from {memory.slots}: {said}"


def _judged(memory: SlotMemory, window: Window, seen: SlotObservation) -> Shrink:
    """The shrink before this one, with whether it helped; a new series where there was none of late."""
    last = memory.shrink
    if last is None or seen.at_s - memory.shrunk_at_s > SERIES_S:
        last = Shrink(math.inf, math.inf, math.inf, memory.slots, memory.slots)
    came_down = memory.grown_at_s < memory.shrunk_at_s and window.batch < last.batch
    if came_down and window.p95_ms > FUTILE_RATIO * last.p95_ms:
        return replace(last, n_futile=last.n_futile + 1)
    return replace(last, n_futile=0, helped=memory.slots)


def _slope_of(last: Shrink, window: Window) -> float | None:
    """Milliseconds per sequence between the last shrink and now, where the fit (too much noise) knows none."""
    if not 1.2 * window.batch < last.batch < math.inf:
        return None
    slope_ms = (last.typical_ms - window.typical_ms) / (last.batch - window.batch)
    return min(max(slope_ms, 0.0), window.typical_ms / window.batch)


def _after_shrink(memory: SlotMemory, slots: int, seen: SlotObservation, shrink: Shrink | None) -> SlotMemory:
    undone = seen.at_s - memory.grown_at_s < UNDONE_WITHIN_S
    patience_s = min(2 * memory.patience_s, PATIENCE_MAX_S) if undone else PATIENCE_FIRST_S
    return replace(memory, slots=slots, beats=(), shrunk_at_s=seen.at_s, shrink=shrink, patience_s=patience_s)


def _give_back(memory: SlotMemory, slots: int, seen: SlotObservation, said: str) -> Answer | None:
    again = seen.at_s - memory.quiet_until_s < SERIES_S
    quiet_s = min(2 * memory.quiet_s, QUIET_MAX_S) if again else QUIET_FIRST_S
    memory = replace(
        memory,
        slots=slots,
        beats=(),
        shrink=None,
        quiet_s=quiet_s,
        quiet_until_s=seen.at_s + quiet_s,
    )
    return slots, memory, f"back to {slots}: {said}, and fewer slots did not help"


def _shrunk(slots: int, wanted: float, target: SlotTarget) -> int:
    """At least one fewer, at most half of them in one go."""
    return target.clamp(max(int(min(wanted, slots - 1)), math.ceil(SHRINK_MOST * slots)))
