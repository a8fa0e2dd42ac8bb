"""Who is alive, judged by heartbeat numbers that move, on the observer's own clock.

A machine whose clock is wrong neither lives nor dies by it, and an observer that was itself stopped or cut off
does not take its own silence for theirs. Called by watcher.py; holds no I/O and takes the time as an argument.
"""

from __future__ import annotations

from dataclasses import dataclass

# Beats must have been looked at so often without a change: one long pause of ours proves nothing.
MIN_LOOKS = 3


@dataclass(slots=True)
class _Seen:
    seq: int | None
    since_s: float
    n_looks: int = 0
    told_at_s: float | None = None  # when its silence was last acted on


class Liveness:
    """Staleness of any number of subjects. `stale_after_s`: unchanged for longer than this is stale."""

    def __init__(self, stale_after_s: float) -> None:
        self.stale_after_s = stale_after_s
        self._seen: dict[str, _Seen] = {}

    def look(self, subject: str, seq: int | None, now_s: float) -> bool:
        """Note the number seen now (None: no beat there); whether the subject is stale."""
        seen = self._seen.get(subject)
        if seen is None or (seq is not None and seq != seen.seq):
            self._seen[subject] = _Seen(seq, now_s)
            return False
        seen.n_looks += 1
        since_s = seen.since_s if seen.told_at_s is None else seen.told_at_s
        return seen.n_looks >= MIN_LOOKS and now_s - since_s > self.stale_after_s

    def told(self, subject: str, now_s: float) -> None:
        """Its silence was acted on: it is stale again after as long again, if it stays silent."""
        seen = self._seen.get(subject)
        if seen is not None:
            seen.told_at_s, seen.n_looks = now_s, 0

    def silent_s(self, subject: str, now_s: float) -> float:
        """How long its number has not moved; 0 for one never looked at."""
        seen = self._seen.get(subject)
        return 0.0 if seen is None else now_s - seen.since_s

    def forgive(self, now_s: float) -> None:
        """We could not look for a while: everybody's silence begins now."""
        for seen in self._seen.values():
            seen.since_s, seen.n_looks, seen.told_at_s = now_s, 0, None

    def forget_all_but(self, subjects: set[str]) -> None:
        for subject in self._seen.keys() - subjects:
            del self._seen[subject]
