"""The deadline sweep, walked through seconds of a virtual clock."""

from workers.redis_deadline import DeadlineSweep

TIMEOUT_S, INTERVAL_S = 2.0, 0.25


class Walk:
    """Sweeps every interval; `sent` and `answered` are set by the test as it goes."""

    def __init__(self) -> None:
        self.sweep = DeadlineSweep(TIMEOUT_S, INTERVAL_S)
        self.now_s = 100.0
        self.n_sent = self.n_answered = 0

    def step(self, late_s: float = 0.0) -> bool:
        due_at_s = self.now_s + INTERVAL_S
        self.now_s = due_at_s + late_s
        return self.sweep.is_overdue(
            now_s=self.now_s, due_at_s=due_at_s, n_sent=self.n_sent, n_answered=self.n_answered
        )

    def seconds_until_overdue(self, limit_s: float = 10.0) -> float | None:
        start_s = self.now_s
        while self.now_s - start_s < limit_s:
            if self.step():
                return self.now_s - start_s
        return None


def test_an_unanswered_call_is_overdue_after_the_timeout_and_at_most_one_sweep() -> None:
    walk = Walk()
    walk.n_sent = 1
    assert walk.seconds_until_overdue() == TIMEOUT_S + INTERVAL_S


def test_a_busy_connection_that_answers_everything_in_time_is_never_overdue() -> None:
    walk = Walk()
    for _ in range(200):
        walk.n_answered = walk.n_sent
        walk.n_sent += 1000
        assert not walk.step()


def test_the_oldest_call_counts_however_many_follow() -> None:
    walk = Walk()
    for _ in range(8):
        walk.n_sent += 1
        assert not walk.step()
    assert walk.seconds_until_overdue() == INTERVAL_S


def test_answers_that_keep_coming_but_ever_later_are_overdue() -> None:
    walk = Walk()
    walk.n_sent = 1000
    verdicts = []
    for _ in range(10):
        walk.n_answered += 10
        verdicts.append(walk.step())
    assert verdicts.index(True) == int(TIMEOUT_S / INTERVAL_S)


def test_an_idle_connection_is_never_overdue() -> None:
    walk = Walk()
    walk.n_sent = walk.n_answered = 5
    assert walk.seconds_until_overdue(60.0) is None


def test_a_sweep_that_was_held_up_judges_nothing_and_the_time_lost_does_not_count() -> None:
    walk = Walk()
    walk.n_sent = 1
    walk.step()
    assert not walk.step(late_s=30.0)
    assert walk.seconds_until_overdue() == TIMEOUT_S - INTERVAL_S


def test_a_little_lateness_is_ordinary() -> None:
    walk = Walk()
    walk.n_sent = 1
    for _ in range(8):
        assert not walk.step(late_s=0.01)
    assert walk.step(late_s=0.01)
