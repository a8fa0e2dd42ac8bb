"""Whether the benchmark that compares times of refusals can tell what is apart, and does not tell what is not."""

from __future__ import annotations

import random

import pytest

from benchmarks.twosample import compare, holm, kolmogorov_smirnov, mann_whitney, smallest_seen
from tests.benchmarks.test_goals import kept


def times(seed: int, shift: float = 0.0, n: int = 800) -> list[float]:
    dice = random.Random(seed)
    return [dice.lognormvariate(6, 0.3) + shift for _ in range(n)]


def test_samples_of_one_distribution_are_told_apart_as_rarely_as_the_level_says() -> None:
    p_values = [mann_whitney(times(n), times(n + 1_000))[1] for n in range(40)]
    assert sum(p < 0.05 for p in p_values) <= 5
    assert sum(kolmogorov_smirnov(times(n), times(n + 1_000)) < 0.05 for n in range(40)) <= 5


def test_a_shift_and_a_wider_spread_are_seen() -> None:
    shifted = compare(times(1), times(2, 40))
    assert shifted.p_mann_whitney < 1e-6 and shifted.p_kolmogorov_smirnov < 1e-6
    assert shifted.auc > 0.55 and shifted.difference_95[0] > 0
    dice = random.Random(3)
    narrow, wide = [dice.gauss(0, 1) for _ in range(800)], [dice.gauss(0, 3) for _ in range(800)]
    assert kolmogorov_smirnov(narrow, wide) < 1e-6, "a spread has no rank, and shows all the same"


def test_the_rank_test_agrees_with_a_worked_example_with_ties() -> None:
    # 22.5 of 25 pairs; ties of 3 and 2: variance 22.2, z = 9.5 / 4.71
    auc, p = mann_whitney([1, 2, 3, 3, 4], [3, 4, 5, 6, 7])
    assert auc == pytest.approx(22.5 / 25)
    assert p == pytest.approx(0.0445, abs=0.002)
    assert mann_whitney([1] * 30, [1] * 30) == (0.5, 1.0)


def test_what_a_sample_could_have_shown_is_told() -> None:
    found = smallest_seen(times(5, n=3_000), 0.01, (1, 10, 20, 40, 80, 160))
    assert found is not None and 10 <= found <= 40
    assert smallest_seen(times(5, n=60), 0.01, (1, 2)) is None


def test_p_values_are_adjusted_for_their_number_and_keep_their_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    with pytest.raises(ValueError, match="20 values"):
        compare([1.0], [2.0])


def test_a_refusal_that_can_be_told_apart_misses_the_goal() -> None:
    from benchmarks.timing import CONTROL, KINDS, _judged

    sample = {kind: times(n) for n, kind in enumerate((*KINDS, CONTROL))}
    sample[KINDS[1]] = times(11, 200)
    judged = _judged(sample)["beside"]
    rows = [{"reached": judged[kind]["indistinguishable"]} for kind in KINDS[1:]]
    assert kept(rows) == [False, True, True]
