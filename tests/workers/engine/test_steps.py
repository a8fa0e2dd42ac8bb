"""Windows of engine steps: what a heartbeat says of the gaps between tokens."""

import pytest

from workers.engine.steps import N_BUCKETS, Steps, StepWindow, gaps_of, quantile_ms


def test_a_step_counts_once_per_running_sequence() -> None:
    window = StepWindow()
    for _ in range(9):
        window.add(10.0, n_running=4, n_waiting=0)
    window.add(100.0, n_running=4, n_waiting=5)
    steps = window.take()
    assert (steps.n_steps, steps.n_tokens, steps.n_waiting) == (10, 40, 0.5)
    gaps = gaps_of(steps.buckets)
    assert [n for _, n in gaps] == [36, 4]
    assert quantile_ms(gaps, 0.5) == pytest.approx(10.0, rel=0.025)
    assert quantile_ms(gaps, 0.95) == pytest.approx(100.0, rel=0.025)


def test_taking_a_window_begins_the_next() -> None:
    window = StepWindow()
    window.add(10.0, 1, 0)
    assert window.take().n_steps == 1
    assert window.take() == Steps()


def test_several_steps_alike_are_added_in_one_go() -> None:
    one, many = StepWindow(), StepWindow()
    many.add(3.0, 5, 1, n_steps=7)
    for _ in range(7):
        one.add(3.0, 5, 1)
    assert one.take() == many.take()


@pytest.mark.parametrize("ms", [0.0, 0.01, 1.0, 12.3, 999.0, 90_000.0])
def test_every_length_finds_its_place(ms: float) -> None:
    window = StepWindow()
    window.add(ms, 1, 0)
    (found, _), *more = gaps_of(window.take().buckets)
    assert not more
    assert found == pytest.approx(ms, rel=0.025, abs=0.1)


def test_a_length_beyond_the_last_bucket_counts_in_it() -> None:
    window = StepWindow()
    window.add(1e9, 2, 0)
    assert window.take().buckets == (N_BUCKETS - 1, 2)


@pytest.mark.parametrize("pairs", [(1,), (-1, 5), (N_BUCKETS, 5), (3, -1), (0, 1) * (N_BUCKETS + 1)])
def test_what_no_window_wrote_gives_nothing(pairs: tuple[int, ...]) -> None:
    assert gaps_of(pairs) == ()


def test_no_gaps_have_no_quantile() -> None:
    assert quantile_ms((), 0.95) == 0.0
