"""Who is stale, on the observer's clock."""

from autoscaler.watch.liveness import Liveness


def test_a_moving_number_is_alive_and_a_standing_one_is_not() -> None:
    beats = Liveness(2.0)
    now_s = 100.0
    for seq in range(20):
        now_s += 0.5
        assert not beats.look("r", seq, now_s)
    verdicts = [beats.look("r", 19, now_s := now_s + 0.25) for _ in range(12)]
    assert verdicts.index(True) == 8  # 2.25 s after the last change
    assert not beats.look("r", 20, now_s)


def test_a_beat_that_never_comes_is_stale_too() -> None:
    beats = Liveness(2.0)
    assert [beats.look("r", None, 100.0 + t) for t in (0, 1, 2, 3)] == [False, False, False, True]


def test_a_vanished_beat_counts_as_unchanged() -> None:
    beats = Liveness(2.0)
    beats.look("r", 7, 100.0)
    assert [beats.look("r", None, 100.0 + t) for t in (1, 2, 3)] == [False, False, True]


def test_our_own_long_pause_kills_nobody() -> None:
    beats = Liveness(2.0)
    beats.look("r", 7, 100.0)
    assert not beats.look("r", 7, 160.0)
    assert not beats.look("r", 8, 160.25)


def test_after_being_cut_off_everybody_is_forgiven() -> None:
    beats = Liveness(2.0)
    for t in range(4):
        stale = beats.look("r", 7, 100.0 + t)
    assert stale
    beats.forgive(200.0)
    assert not beats.look("r", 7, 201.9)


def test_a_restarted_replica_number_going_back_is_alive() -> None:
    beats = Liveness(2.0)
    beats.look("r", 700, 100.0)
    assert not beats.look("r", 1, 105.0)


def test_what_was_acted_on_is_stale_again_after_as_long_again_and_counts_from_the_beginning() -> None:
    beats = Liveness(2.0)
    verdicts = []
    for t in range(10):
        verdicts.append(beats.look("r", 7, 100.0 + t))
        if verdicts[-1]:
            beats.told("r", 100.0 + t)
    assert [t for t, stale in enumerate(verdicts) if stale] == [3, 6, 9]
    assert beats.silent_s("r", 109.0) == 9.0
    beats.look("r", 8, 110.0)
    assert beats.silent_s("r", 110.0) == 0.0
    assert beats.silent_s("nobody", 110.0) == 0.0
