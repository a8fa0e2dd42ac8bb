"""How many requests a replica may run at once, so that the gaps between tokens stay within the promise.

AIMD with a prediction guard, one replica at a time; what does not fit waits in our queue, not in the engine's. Slots
grow by a fixed step while requests want them and the predicted 95th percentile of the gaps, the KV cache and the
engine's own queue stay below their marks; they shrink when a mark is broken in most of several beats, and not again
before the running requests have come down to them. Called by autoscaler/watch/slots.py with every heartbeat. Pure:
the time comes with the observation, the memory goes in and comes out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from workers.engine.steps import quantile_ms

PERCENTILE: Final = 0.95
# Slots grow to this share of the target and shrink above all of it: between the two nothing moves.
CALM: Final = 0.9
KV_CALM: Final = 0.8  # as the saturation detector of llm-d has it
KV_FULL: Final = 0.95
# The engine's own queue, as a share of the slots (one request at least): more is a queue in the wrong place.
ENGINE_QUEUE: Final = 0.03

GROW_BEATS, GROW_STEPS = 2, 8
SHRINK_BEATS, SHRINK_STEPS = 4, 8  # two seconds of a beat every half second
# Below this share of the target one slot more (or a sixteenth) is tried although nothing can be predicted yet.
PROBE, PROBE_SHARE = 0.75, 16
MAX_BEATS: Final = 40  # remembered since the last change: a mild breach needs that many steps to be sure of
SURE: Final = 3.0  # standard deviations beyond the 5 % of late steps that chance alone may bring
STEPS_OF_GROWTH: Final = 8  # from one slot to the ceiling
LEAST_GROWTH: Final = 20  # a step below one twentieth of the slots is not worth the unrest
SHRINK_MOST: Final = 0.5  # of one decision
SHRINK_FACTOR: Final = 0.75  # of what the promise allows, where keeping clear of it would cost still more
# A promise that one request alone would break cannot be kept: then within so much of the best there is. What one
# alone takes is believed for so long, and never more than what any batch was seen to take since.
OUT_OF_REACH: Final = 1.5
ALONE_FOR_S: Final = 600.0
# No growth so soon after a shrink, and twice as long after each that undid a growth of the last minute.
PATIENCE_FIRST_S, PATIENCE_MAX_S = 5.0, 120.0
UNDONE_WITHIN_S: Final = 60.0
# Without anybody waiting slots follow the prediction this slowly: a pool scaled out for a bad hour finds back.
UNASKED_EVERY_S: Final = 10.0
# It is not the batch that is slow but the host, or long prompts, when two shrinks in a row changed nothing, or when
# half of the slots did not mend gaps whose median is far from the target. Give them back, then ask again.
FUTILE_SHRINKS: Final = 2
FUTILE_RATIO: Final = 0.95
TAIL_RATIO: Final = 0.5
SERIES_S: Final = 60.0  # a shrink that soon after another belongs to the same series
QUIET_FIRST_S, QUIET_MAX_S = 30.0, 600.0
_FIT_DECAY: Final = 0.95  # per beat: some ten seconds
_FIT_MAX_WEIGHT: Final = 20.0
_FIT_MIN_WEIGHT: Final = 20.0
_FIT_SURPRISE: Final = 0.25  # a beat so far from the line ends it: the load has another shape now
_NEVER_S: Final = -1e18

Gaps = tuple[tuple[float, int], ...]  # (milliseconds, tokens that came after so long), by rising length


@dataclass(frozen=True, slots=True)
class SlotTarget:
    """What is promised and possible. `itl_ms` 0: no promise, only KV cache and engine queue bind."""

    itl_ms: float
    ceiling: int
    floor: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.floor <= self.ceiling:
            raise ValueError(f"floor {self.floor} and ceiling {self.ceiling}: set 1 <= floor <= ceiling")


@dataclass(frozen=True, slots=True)
class SlotObservation:
    """One new heartbeat of a replica and what the cell holds of it.

    slots, used: as the cell has them now. n_queued: requests that wait in the deployment's queue. n_steps 0: the
    engine ran nothing, or does not measure. engine_queue: sequences in the engine's own queue, mean over the steps.
    kv_used_ratio: the fullest that the cache was.
    """

    at_s: float
    slots: int
    used: int
    n_queued: int
    n_steps: int = 0
    gaps: Gaps = ()
    engine_queue: float = 0.0
    kv_used_ratio: float = 0.0
    n_preempted: int = 0


@dataclass(frozen=True, slots=True)
class Beat:
    """What one heartbeat adds to a judgement."""

    n_steps: int
    n_tokens: int
    gaps: Gaps
    engine_queue: float
    kv_used_ratio: float
    n_preempted: int
    wants_more: bool


@dataclass(frozen=True, slots=True)
class StepFit:
    """Step time over batch size: a line through the decayed beats, by least squares. Sums of weight w."""

    w: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def plus(self, batch: float, step_ms: float, n_steps: int) -> StepFit:
        """One beat: its mean batch, its typical step."""
        slope_ms = self.slope_ms
        if slope_ms is not None:
            expected_ms = self.y / self.w + slope_ms * (batch - self.x / self.w)
            if abs(step_ms - expected_ms) > _FIT_SURPRISE * expected_ms:
                return StepFit().plus(batch, step_ms, n_steps)
        w, d = min(float(n_steps), _FIT_MAX_WEIGHT), _FIT_DECAY
        return StepFit(
            self.w * d + w,
            self.x * d + w * batch,
            self.y * d + w * step_ms,
            self.xx * d + w * batch * batch,
            self.xy * d + w * batch * step_ms,
        )

    @property
    def slope_ms(self) -> float | None:
        """Milliseconds per sequence; None while the batch has hardly varied. Never negative."""
        if self.w < _FIT_MIN_WEIGHT:
            return None
        mean_x, mean_y = self.x / self.w, self.y / self.w
        variance = self.xx / self.w - mean_x * mean_x
        if variance < max(0.25, (0.08 * mean_x) ** 2):
            return None
        slope = (self.xy / self.w - mean_x * mean_y) / variance
        return min(max(slope, 0.0), mean_y / mean_x)


@dataclass(frozen=True, slots=True)
class Shrink:
    """The last shrink for slowness: what it was to better; the slots before the series, and before its futile end."""

    p95_ms: float
    typical_ms: float
    batch: float
    began: int
    helped: int
    n_futile: int = 0


@dataclass(frozen=True, slots=True)
class SlotMemory:
    """What one beat leaves to the next. `slots`: as this controller last set them. Bounded by MAX_BEATS."""

    slots: int
    beats: tuple[Beat, ...] = ()
    fit: StepFit = StepFit()
    grown_at_s: float = _NEVER_S
    shrunk_at_s: float = _NEVER_S
    shrink: Shrink | None = None
    alone_ms: float = 0.0  # 95th percentile of one request alone; 0: not known, or within the promise
    alone_at_s: float = _NEVER_S
    patience_s: float = PATIENCE_FIRST_S
    quiet_s: float = QUIET_FIRST_S
    quiet_until_s: float = _NEVER_S


@dataclass(frozen=True, slots=True)
class _Window:
    """The beats since the last change, as one."""

    n_beats: int
    n_steps: int
    batch: float
    typical_ms: float
    p95_ms: float
    engine_queue: float
    kv_used_ratio: float
    n_preempted: int
    wants_more: bool
    n_late: float  # steps longer than the target
    n_late_beats: int  # beats whose own percentile is
    crowded: bool  # most beats saw a queue in the engine, preemptions or a full cache

    @property
    def is_slow(self) -> bool:
        """Late more often than chance explains, and in most beats: neither one bad beat nor one bad step decides."""
        share, n = 1 - PERCENTILE, self.n_steps
        allowed = share * n + SURE * math.sqrt(share * PERCENTILE * n)
        return n >= SHRINK_STEPS and 2 * self.n_late_beats > self.n_beats and self.n_late > allowed

    def at_ms(self, batch: float, slope_ms: float) -> float:
        """The 95th percentile predicted at another batch size, along the fitted line from what is measured."""
        return max(self.p95_ms + self._spread * slope_ms * (batch - self.batch), 0.0)

    def feasible(self, limit_ms: float, slope_ms: float | None) -> float:
        """The largest batch whose prediction keeps within the limit: along the fitted line; without one in
        proportion, the least that a straight line allows above and the most that it allows below.
        """
        in_proportion = self.batch * limit_ms / max(self.p95_ms, 1e-3)
        if slope_ms is None:
            return in_proportion
        if self._spread * slope_ms < 1e-6:
            return math.inf if self.p95_ms <= limit_ms else 0.0
        on_line = self.batch + (limit_ms - self.p95_ms) / (self._spread * slope_ms)
        return max(on_line, in_proportion) if self.p95_ms <= limit_ms else min(on_line, in_proportion)

    @property
    def _spread(self) -> float:
        return self.p95_ms / max(self.typical_ms, 1e-3)


def first_slots(learned: int | None, target: SlotTarget) -> int:
    """What a new replica begins with: what another of the same deployment came to, else its engine's batch."""
    return _clamp(target.ceiling if learned is None else learned, target)


def next_slots(
    memory: SlotMemory, observation: SlotObservation, target: SlotTarget
) -> tuple[int, SlotMemory, str]:
    """(slots, memory, reason) after one new heartbeat. The reason is one sentence, with numbers.

    No measurement, no change: an idle replica keeps its slots, and so does one that does not report steps.
    """
    if observation.slots != memory.slots:  # set by somebody else: judge anew
        memory = replace(memory, slots=observation.slots, beats=(), shrink=None)
    if observation.slots != _clamp(observation.slots, target):
        slots = _clamp(observation.slots, target)
        why = f"{observation.slots} slots are outside {target.floor} to {target.ceiling}"
        return slots, replace(memory, slots=slots, beats=()), why
    n_tokens = sum(n for _, n in observation.gaps)
    if observation.n_steps <= 0 or n_tokens <= 0:
        return memory.slots, replace(memory, beats=()), "nothing was measured: slots stay"
    memory = _note(memory, observation, n_tokens)
    n_running = max(float(observation.used), n_tokens / observation.n_steps - 0.5)
    if n_running > memory.slots:
        why = f"{n_running:.0f} still run: judged when they have come down to {memory.slots}"
        # A shrink is as old as its effect.
        return memory.slots, replace(memory, beats=(), shrunk_at_s=observation.at_s), why
    memory = _alone(memory, observation.at_s, target)
    promised_ms = target.itl_ms
    target = replace(target, itl_ms=_aim_ms(memory, target))
    window = _window(_newest(memory.beats), memory.slots, target)
    for rule in (_relieve, _slow_down, _grow):
        found = rule(memory, window, observation, target)
        if found is not None:
            slots, memory, reason = found
            if memory.alone_ms:
                reason += f"; {promised_ms:g} is out of reach, one alone takes {memory.alone_ms:.0f}"
            return slots, memory, reason
    return memory.slots, memory, "slots stay"  # _grow always has a word


def _note(memory: SlotMemory, seen: SlotObservation, n_tokens: int) -> SlotMemory:
    """The beat joins the window (the newest that make up a judgement) and the fit."""
    beat = Beat(
        n_steps=seen.n_steps,
        n_tokens=n_tokens,
        gaps=seen.gaps,
        engine_queue=seen.engine_queue,
        kv_used_ratio=seen.kv_used_ratio,
        n_preempted=seen.n_preempted,
        wants_more=seen.n_queued > 0 or seen.used >= seen.slots,
    )
    fit = memory.fit.plus(n_tokens / seen.n_steps, _typical_ms(seen.gaps), seen.n_steps)
    return replace(memory, beats=(*memory.beats, beat)[-MAX_BEATS:], fit=fit)


def _alone(memory: SlotMemory, at_s: float, target: SlotTarget) -> SlotMemory:
    """What one request alone takes, as far as it was seen: measured while no more than one ran, bounded by all else."""
    if not target.itl_ms:
        return memory
    recent = _newest(memory.beats)
    if len(recent) < SHRINK_BEATS or sum(b.n_steps for b in recent) < SHRINK_STEPS:
        return memory
    single = tuple(b for b in memory.beats if b.n_tokens <= 1.5 * b.n_steps)
    if len(single) >= SHRINK_BEATS and single[-1] is memory.beats[-1]:
        memory = replace(memory, alone_ms=_window(single, memory.slots, target).p95_ms, alone_at_s=at_s)
    elif at_s - memory.alone_at_s > ALONE_FOR_S:
        memory = replace(memory, alone_ms=0.0)
    seen_ms = _window(recent, memory.slots, target).p95_ms
    alone_ms = min(memory.alone_ms, seen_ms)
    return replace(memory, alone_ms=alone_ms if alone_ms > target.itl_ms else 0.0)


def _aim_ms(memory: SlotMemory, target: SlotTarget) -> float:
    """The promise, or what is near the best there is where that is out of reach."""
    return max(target.itl_ms, OUT_OF_REACH * memory.alone_ms) if target.itl_ms else 0.0


def _newest(beats: tuple[Beat, ...]) -> tuple[Beat, ...]:
    """As few of the last beats as make up a judgement."""
    n, n_steps = 0, 0
    while n < len(beats) and (n < SHRINK_BEATS or n_steps < SHRINK_STEPS):
        n += 1
        n_steps += beats[-n].n_steps
    return beats[len(beats) - n :]


def _window(beats: tuple[Beat, ...], slots: int, target: SlotTarget) -> _Window:
    merged: dict[float, int] = {}
    for beat in beats:
        for ms, n in beat.gaps:
            merged[ms] = merged.get(ms, 0) + n
    gaps = tuple(sorted(merged.items()))
    n_steps = sum(b.n_steps for b in beats)
    n_tokens = sum(b.n_tokens for b in beats)
    most = len(beats) // 2 + 1
    mark = _queue_mark(slots)
    return _Window(
        n_beats=len(beats),
        n_steps=n_steps,
        batch=max(n_tokens / n_steps, 1.0),
        typical_ms=_typical_ms(gaps),
        p95_ms=quantile_ms(gaps, PERCENTILE),
        engine_queue=sum(b.engine_queue * b.n_steps for b in beats) / n_steps,
        kv_used_ratio=max(b.kv_used_ratio for b in beats),
        n_preempted=sum(b.n_preempted for b in beats),
        wants_more=sum(b.wants_more for b in beats) >= most,
        n_late=n_steps * sum(n for ms, n in gaps if ms > target.itl_ms) / n_tokens,
        n_late_beats=sum(quantile_ms(b.gaps, PERCENTILE) > target.itl_ms for b in beats),
        crowded=sum(b.engine_queue > mark or b.n_preempted > 0 or b.kv_used_ratio > KV_FULL for b in beats)
        >= most,
    )


_Found = tuple[int, SlotMemory, str] | None


def _relieve(memory: SlotMemory, window: _Window, seen: SlotObservation, target: SlotTarget) -> _Found:
    """Requests that wait or are put back inside the engine belong in our queue: down to what really runs."""
    if not window.crowded or window.n_beats < SHRINK_BEATS or memory.slots <= target.floor:
        return None
    runs = window.batch if window.engine_queue > _queue_mark(memory.slots) else KV_CALM * memory.slots
    slots = _shrunk(memory.slots, runs, target)
    why = (
        f"shrinks from {memory.slots}: {window.engine_queue:.1f} wait in the engine, {window.n_preempted} put back, "
        f"KV cache {window.kv_used_ratio:.0%} used, {window.batch:.1f} run"
    )
    return slots, _after_shrink(memory, slots, seen, None), why


def _slow_down(memory: SlotMemory, window: _Window, seen: SlotObservation, target: SlotTarget) -> _Found:
    """Multiplicative decrease when the gaps break the promise, unless fewer slots cannot mend it."""
    if not target.itl_ms or window.n_beats < SHRINK_BEATS:
        return None
    if not window.is_slow:
        window = _window(memory.beats, memory.slots, target)
    if not window.is_slow:
        return None
    said = _said(window, target)
    if seen.at_s < memory.quiet_until_s:
        return memory.slots, memory, f"{said}: fewer slots did not help, left alone for now"
    if memory.slots <= target.floor or window.batch <= 1.0:
        return memory.slots, memory, f"{said}: the fewest slots there can be"
    last = memory.shrink
    if last is None or seen.at_s - memory.shrunk_at_s > SERIES_S:
        last = Shrink(math.inf, math.inf, math.inf, memory.slots, memory.slots)
    came_down = memory.grown_at_s < memory.shrunk_at_s and window.batch < last.batch
    futile = came_down and window.p95_ms > FUTILE_RATIO * last.p95_ms
    last = replace(
        last,
        n_futile=last.n_futile + 1 if futile else 0,
        helped=last.helped if futile else memory.slots,
    )
    least = math.ceil(SHRINK_MOST * last.began) if window.typical_ms <= TAIL_RATIO * target.itl_ms else 1
    by_tail = memory.slots <= least
    if last.n_futile >= FUTILE_SHRINKS or by_tail:
        return _give_back(memory, last.began if by_tail else last.helped, seen, said)
    slope_ms = memory.fit.slope_ms
    if slope_ms is None:
        slope_ms = _slope_of(last, window)
    wanted = window.feasible(CALM * target.itl_ms, slope_ms)
    if slope_ms is not None:
        alone_ms = window.at_ms(1.0, slope_ms)
        if alone_ms > target.itl_ms:
            memory = replace(memory, alone_ms=alone_ms, alone_at_s=seen.at_s)
            target = replace(target, itl_ms=_aim_ms(memory, target))
            if window.p95_ms <= target.itl_ms:
                return memory.slots, memory, f"{said}: slots stay"
        wanted = max(
            window.feasible(CALM * target.itl_ms, slope_ms),
            SHRINK_FACTOR * window.feasible(target.itl_ms, slope_ms),
        )
    slots = _shrunk(memory.slots, max(wanted, float(least)), target)
    shrink = replace(last, p95_ms=window.p95_ms, typical_ms=window.typical_ms, batch=window.batch)
    return slots, _after_shrink(memory, slots, seen, shrink), f"shrinks from {memory.slots}: {said}"


def _slope_of(last: Shrink, window: _Window) -> float | None:
    """Milliseconds per sequence between the last shrink and now, where the fit (too much noise) knows none."""
    if not 1.2 * window.batch < last.batch < math.inf:
        return None
    slope_ms = (last.typical_ms - window.typical_ms) / (last.batch - window.batch)
    return min(max(slope_ms, 0.0), window.typical_ms / window.batch)


def _after_shrink(memory: SlotMemory, slots: int, seen: SlotObservation, shrink: Shrink | None) -> SlotMemory:
    undone = seen.at_s - memory.grown_at_s < UNDONE_WITHIN_S
    patience_s = min(2 * memory.patience_s, PATIENCE_MAX_S) if undone else PATIENCE_FIRST_S
    return replace(memory, slots=slots, beats=(), shrunk_at_s=seen.at_s, shrink=shrink, patience_s=patience_s)


def _give_back(memory: SlotMemory, slots: int, seen: SlotObservation, said: str) -> _Found:
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


def _grow(memory: SlotMemory, window: _Window, seen: SlotObservation, target: SlotTarget) -> _Found:
    """Additive increase, as far as the prediction and the KV cache carry it."""

    def stay(why: str) -> tuple[int, SlotMemory, str]:
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
    if window.engine_queue > _queue_mark(memory.slots) or window.n_preempted:
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
        said = _said(window, target)
    if window.kv_used_ratio > 0:
        limit = min(limit, _whole(window.batch * KV_CALM / window.kv_used_ratio))
    if unasked:
        limit = min(limit, _whole(2 * window.batch))
    slots = _clamp(limit, target)
    if slots < min(memory.slots + max(1, memory.slots // LEAST_GROWTH), target.ceiling):
        return stay(f"{said}: more would come too near")
    why = f"grows from {memory.slots}: {said}, {seen.n_queued} queued"
    return slots, replace(memory, slots=slots, beats=(), grown_at_s=seen.at_s), why


def _said(window: _Window, target: SlotTarget) -> str:
    return (
        f"95 % of gaps within {window.p95_ms:.1f} ms (target {target.itl_ms:g}) at {window.batch:.1f} running"
    )


def _typical_ms(gaps: Gaps) -> float:
    """Mean of the gaps up to twice the median: finer than a bucket, and no hiccup of the host moves it."""
    most_ms = 2 * quantile_ms(gaps, 0.5)
    n = sum(n for ms, n in gaps if ms <= most_ms)
    return sum(ms * n for ms, n in gaps if ms <= most_ms) / n if n else 0.0


def _shrunk(slots: int, wanted: float, target: SlotTarget) -> int:
    """At least one fewer, at most half of them in one go."""
    least = math.ceil(slots * SHRINK_MOST)
    return _clamp(min(max(_whole(wanted), least), slots - 1), target)


def _queue_mark(slots: int) -> float:
    return max(1.0, ENGINE_QUEUE * slots)


def _whole(n: float) -> int:
    return int(min(n, 1e9))


def _clamp(slots: int, target: SlotTarget) -> int:
    return min(max(slots, target.floor), target.ceiling)
