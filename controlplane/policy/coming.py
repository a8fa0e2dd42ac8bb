"""Replicas that are being started, as capacity of a moment ahead: pure.

Called by outlook.py with what the control worker told of a deployment's starts. A start counts from when it will
probably be done. One that should have been done is late by a time nobody knows: it is taken to need as long again as it
is late already, so that a start that hangs, or a clock that is wrong, soon counts for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

MAX_STARTS: Final = 64  # told of one deployment: what a request could wait for is among the first of them
_MOST: Final = 10**15  # ms, and slots: beyond it is no instant


class Coming(NamedTuple):
    """So many slots, in so many seconds."""

    slots: int
    in_s: float


NONE: Final[tuple[Coming, ...]] = ()
Starts = tuple[tuple[int, int], ...]  # (slots, when they will be ready: Unix ms)


def text(starts: Iterable[tuple[int, int]]) -> str:
    """As the control worker tells it: the soonest, `slots:at_ms slots:at_ms`."""
    return " ".join(f"{slots}:{at_ms}" for slots, at_ms in sorted(starts, key=lambda s: s[1])[:MAX_STARTS])


def parse(told: bytes | None) -> Starts:
    """Of `text`; none of what is no such thing."""
    try:
        found = [tuple(map(int, word.split(b":"))) for word in (told or b"").split()[:MAX_STARTS]]
        starts = [(slots, at_ms) for slots, at_ms in found]
    except ValueError:
        return ()
    return tuple(s for s in starts if 0 < s[0] < _MOST and 0 < s[1] < _MOST)


def of(starts: Starts, now_ms: int) -> tuple[Coming, ...]:
    """Starts told as (slots, when they will be ready, in ms), soonest first."""
    return tuple(
        sorted((Coming(slots, abs(at_ms - now_ms) / 1000) for slots, at_ms in starts), key=lambda c: c.in_s)
    )


def drained_s(wait_s: float, slots: int, coming: Sequence[Coming]) -> float:
    """Slot time that is worked off within `wait_s`, a negative one included (what would have been)."""
    done_s = wait_s * slots
    for start in coming:
        if start.in_s >= wait_s:
            break
        done_s += start.slots * (wait_s - start.in_s)
    return done_s


def drains_in_s(work_s: float, slots: int, coming: Sequence[Coming]) -> float:
    """Seconds until so much slot time is worked off: the inverse of `drained_s`. Without any slot, now or coming, it is
    told as if there were one."""
    at_s, width = 0.0, slots
    for start in coming:
        if width and work_s <= (start.in_s - at_s) * width:
            break
        work_s -= (start.in_s - at_s) * width
        at_s, width = start.in_s, width + start.slots
    return at_s + work_s / max(width, 1)
