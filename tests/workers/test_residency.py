"""Which adapter goes: the longest unused, or the one whose absence costs least; never one in use."""

from __future__ import annotations

import pytest

from workers.residency import Popularity, Resident, least_recent, least_worth


def test_the_longest_unused_goes_and_never_one_in_use() -> None:
    held = [Resident("a", 4, 3.0), Resident("b", 4, 1.0, n_using=1), Resident("c", 4, 2.0)]
    assert (found := least_recent(held)) is not None
    assert found.adapter == "c"
    for resident in held:
        resident.n_using = 1
    assert least_recent(held) is least_worth(held, Popularity()) is None


def test_what_is_asked_for_often_or_loads_slowly_stays() -> None:
    asked = Popularity()
    for adapter in "aaaabbc":
        asked.note(adapter)
    held = [Resident("a", 1, 1.0), Resident("b", 1, 2.0), Resident("c", 1, 3.0)]
    assert (found := least_worth(held, asked)) is not None
    assert found.adapter == "c"
    held[2].load_s = 30.0
    assert (found := least_worth(held, asked)) is not None
    assert found.adapter == "b"
    held[1].n_using = 1
    assert (found := least_worth(held, asked)) is not None
    assert found.adapter == "a"


def test_popularity_is_a_share_and_fades_with_the_others_use() -> None:
    asked = Popularity(half_life_uses=100)
    for _ in range(2_000):
        asked.note("old")
    assert asked.share("old") == pytest.approx(1.0, rel=0.05)
    for _ in range(100):
        asked.note("new")
    assert asked.share("old") == pytest.approx(0.5, rel=0.05)
    assert asked.share("new") == pytest.approx(0.5, rel=0.05)
    for _ in range(60_000):  # weights are scaled back on the way
        asked.note("new")
    assert asked.share("new") == pytest.approx(1.0, rel=0.05)
    assert asked.share("old") == asked.share("never") == 0.0
    with pytest.raises(ValueError, match="half_life_uses"):
        Popularity(0)
