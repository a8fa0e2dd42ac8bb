"""When is a pipelined connection stuck? Pure: counts and times in, verdict out; nothing stored per call.

`redis_client.Client` sweeps a few times per timeout. Replies come in order, so remembering how many calls had
been sent at each past sweep is enough to see that one of them is still unanswered after the timeout.
"""

from __future__ import annotations

from collections import deque


class DeadlineSweep:
    """Judge of one connection. Times in seconds of one monotonic clock."""

    def __init__(self, timeout_s: float, interval_s: float) -> None:
        self._timeout_s = timeout_s
        self._interval_s = interval_s
        self._marks: deque[tuple[float, int]] = deque()  # (when, calls sent by then), at most one per sweep
        self._n_sent_before = -1

    def is_overdue(self, *, now_s: float, due_at_s: float, n_sent: int, n_answered: int) -> bool:
        """Whether a call sent at least the timeout ago has no answer yet. Counts are totals, ever growing.

        A sweep that comes more than an interval after it was due means that the caller itself was held up,
        and answers may lie unread: it judges nothing, and the time lost counts for nobody.
        """
        late_s = now_s - due_at_s
        if late_s > self._interval_s:
            self._marks = deque((at_s + late_s, n) for at_s, n in self._marks)
            return False
        while self._marks and self._marks[0][0] <= now_s - self._timeout_s:
            if n_answered < self._marks.popleft()[1]:
                return True
        if n_sent > n_answered and n_sent != self._n_sent_before:  # nothing new to wait for: no mark
            self._marks.append((now_s, n_sent))
            self._n_sent_before = n_sent
        return False
