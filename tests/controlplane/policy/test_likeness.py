"""Who is copied, and how alike texts are."""

from __future__ import annotations

import pytest

from controlplane.policy.likeness import MAX_CHARS, is_chosen, similarity_ppm

IDS = [f"{(n * 0x9E3779B97F4A7C15F39CC0605CEDC834) % (1 << 128):032x}" for n in range(1, 4_001)]


@pytest.mark.parametrize("share_ppm", [0, 1_000, 100_000, 500_000, 1_000_000])
def test_as_many_are_chosen_as_the_share_says(share_ppm: int) -> None:
    n = sum(is_chosen(request, share_ppm) for request in IDS)
    assert abs(n / len(IDS) - share_ppm / 1e6) < 0.02
    if share_ppm in (0, 1_000_000):
        assert n == len(IDS) * share_ppm // 1_000_000


def test_a_larger_share_contains_the_smaller_and_a_canarys_chance_is_another() -> None:
    some, more = ({r for r in IDS if is_chosen(r, ppm)} for ppm in (100_000, 300_000))
    assert some < more
    canary = {r for r in IDS if int(r[-4:], 16) < 6_554}  # a tenth, by the last digits (gateway/routes.py)
    assert 0.05 < len(some & canary) / len(some) < 0.15


@pytest.mark.parametrize(
    ("one", "other", "least", "most"),
    [
        ("a b c d", "a b c d", 1_000_000, 1_000_000),
        ("", "", 1_000_000, 1_000_000),
        ("a b", "a  b\n", 1_000_000, 1_000_000),
        ("a b c d", "", 0, 0),
        ("a b c", "x y z", 0, 0),
        ("a b c d e", "a b c d x", 500_000, 500_000),  # 2 of 4 triples
    ],
)
def test_similarity_is_the_share_of_triples(one: str, other: str, least: int, most: int) -> None:
    assert least <= similarity_ppm(one, other) <= most
    assert similarity_ppm(one, other) == similarity_ppm(other, one)


def test_long_texts_are_compared_as_far_as_the_bound() -> None:
    words = "word " * (MAX_CHARS // 5)
    assert similarity_ppm(words + "and so on", words + "or not") == 1_000_000
