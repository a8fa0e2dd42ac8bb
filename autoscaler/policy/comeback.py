"""Whether growth waits for a machine that its provider is still stopping, or buys one: what serves sooner. Pure.

A machine that is being stopped can be started as soon as it is stopped, with the weights on its disk; a new one boots
for minutes. Called by decide.py for what found no room and no stopped machine.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stopping:
    """A machine that was told to stop. `n_free`: replicas it holds once it is back."""

    id: str
    since_s: float
    n_free: int


@dataclass(frozen=True, slots=True)
class StopTimes:
    """What it took so far, in seconds: from the order to stop until a machine is stopped, from the order to start it
    again until it answers, and from the order of a new one until that answers."""

    stop_s: float = 0.0
    resume_s: float = 0.0
    boot_s: float = 0.0


def left_s(machine: Stopping, times: StopTimes, now_s: float) -> float:
    """Until it is stopped: the rest of what a stop takes. One that is late by so much is expected to need as much
    again, so that nobody waits for good for one that hangs."""
    return abs(times.stop_s - max(now_s - machine.since_s, 0.0))


def worth_awaiting(stopping: tuple[Stopping, ...], times: StopTimes, now_s: float) -> tuple[Stopping, ...]:
    """Those that answer again sooner than a machine ordered now would, soonest first.

    None that is late by `boot_s - resume_s`: that long, and what was left of its stop, is the most that a request loses
    by having waited for it.
    """
    gain_s = times.boot_s - times.resume_s
    found = [(left_s(each, times, now_s), each.id, each) for each in stopping]
    return tuple(each for left, _, each in sorted(found, key=lambda f: f[:2]) if left < gain_s)
