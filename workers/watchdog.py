"""Notices, inside a front, an engine or a loop that has stopped moving, and ends the process.

A thread, because what it watches may be the loop itself. The agent watches the beat file from outside for the
case that not even this thread runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from workers.failure import ReplicaFailure

_INTERVAL_S: Final = 0.5
_PATIENCE: Final = 4.0  # times the expected step


@dataclass(frozen=True, slots=True)
class Glance:
    """What the watchdog sees at one instant (seconds of the monotonic clock)."""

    now_s: float
    loop_beat_at_s: float
    n_engine_work: int
    last_step_at_s: float
    expected_step_s: float


def judge(glance: Glance, hang_s: float) -> ReplicaFailure | None:
    """A failure when loop or engine owe a sign of life for longer than max(hang_s, 4 × the expected step)."""
    silent_s = glance.now_s - glance.loop_beat_at_s
    if silent_s > 2 * hang_s:
        return ReplicaFailure("loop_hung", f"the replica's event loop has not turned for {silent_s:.1f} s")
    allowed_s = max(hang_s, _PATIENCE * glance.expected_step_s)
    stuck_s = glance.now_s - glance.last_step_at_s
    if glance.n_engine_work > 0 and stuck_s > allowed_s:
        return ReplicaFailure(
            "engine_hung",
            f"the engine has work and made no step for {stuck_s:.1f} s ({allowed_s:.1f} s allowed)",
        )
    return None


class Watchdog:
    """Calls `on_hang` once, from its own thread."""

    def __init__(
        self, look: Callable[[], Glance], hang_s: float, on_hang: Callable[[ReplicaFailure], None]
    ) -> None:
        self._look = look
        self._hang_s = hang_s
        self._on_hang = on_hang
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        due_at_s = time.monotonic() + _INTERVAL_S
        while not self._stop.wait(_INTERVAL_S):
            now_s = time.monotonic()
            late_s, due_at_s = now_s - due_at_s, now_s + _INTERVAL_S
            if late_s > _INTERVAL_S:
                continue  # we did not run ourselves: a stopped or starved machine, no judgement
            failure = judge(self._look(), self._hang_s)
            if failure is not None:
                self._on_hang(failure)
                return
