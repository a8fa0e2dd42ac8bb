"""The one rounding rule, splitting without loss, and dollars as text."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.money import (
    MAX_NANO,
    MoneyFormatError,
    Nano,
    NanoPerMillion,
    Rates,
    cost_nano,
    format_usd,
    parse_usd,
    request_cost,
    split_largest_remainder,
    token_cost_ceiling,
    worst_case_cost,
)

counts = st.integers(0, 10_000_000)
rate = st.integers(0, 10**13).map(NanoPerMillion)
amounts = st.integers(-MAX_NANO, MAX_NANO).map(Nano)
rates = st.builds(Rates, rate, rate, rate)


@pytest.mark.parametrize(
    ("n_tokens", "rate_nano", "cost"),
    [
        (1_000_000, 100_000_000, 100_000_000),  # a million tokens at $0.10
        (1, 100_000_000, 100),
        (1, 500_000, 0),  # 0.5 → 0: half to even
        (3, 500_000, 2),  # 1.5 → 2
        (5, 500_000, 2),  # 2.5 → 2
        (1, 500_001, 1),
        (1, 499_999, 0),
        (0, 10**12, 0),
    ],
)
def test_cost_is_rounded_half_to_even(n_tokens: int, rate_nano: int, cost: int) -> None:
    assert cost_nano(n_tokens, NanoPerMillion(rate_nano)) == cost


@given(counts, rate)
def test_cost_is_the_exact_product_rounded_as_fractions_round(
    n_tokens: int, rate_nano: NanoPerMillion
) -> None:
    assert cost_nano(n_tokens, rate_nano) == round(Fraction(n_tokens * rate_nano, 1_000_000))


@given(rates, counts, counts, counts)
def test_a_request_is_rounded_once(r: Rates, n_prompt: int, n_cached: int, n_completion: int) -> None:
    n_cached = min(n_cached, n_prompt)
    exact = Fraction(
        (n_prompt - n_cached) * r.input + n_cached * r.cached + n_completion * r.output, 1_000_000
    )
    cost = request_cost(r, n_prompt=n_prompt, n_cached=n_cached, n_completion=n_completion)
    assert cost == round(exact)
    assert abs(cost - exact) <= Fraction(1, 2)


@given(rates, counts, counts, counts, counts)
def test_the_worst_case_holds_enough(
    r: Rates, n_prompt: int, n_cached: int, n_completion: int, n_more: int
) -> None:
    used = request_cost(r, n_prompt=n_prompt, n_cached=min(n_cached, n_prompt), n_completion=n_completion)
    assert used <= worst_case_cost(r, n_prompt=n_prompt, n_completion=n_completion + n_more)


@given(rate)
def test_a_tokens_ceiling_is_never_below_its_price(rate_nano: NanoPerMillion) -> None:
    ceiling = token_cost_ceiling(rate_nano)
    assert 0 <= ceiling * 1_000_000 - rate_nano < 1_000_000


def test_impossible_counts_are_refused() -> None:
    r = Rates(NanoPerMillion(1), NanoPerMillion(1), NanoPerMillion(1))
    with pytest.raises(ValueError, match="n_cached=5"):
        request_cost(r, n_prompt=4, n_cached=5, n_completion=0)
    with pytest.raises(ValueError, match="negative"):
        cost_nano(-1, NanoPerMillion(1))
    with pytest.raises(ValueError, match="output rate"):
        Rates(NanoPerMillion(1), NanoPerMillion(1), NanoPerMillion(-1))


@given(amounts, st.lists(st.integers(0, 10**9), min_size=1, max_size=20).filter(any))
def test_a_split_loses_nothing_and_is_within_one_of_its_share(total: Nano, weights: list[int]) -> None:
    parts = split_largest_remainder(total, weights)
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - Fraction(total * weight, sum(weights))) < 1
        assert weight or part == 0


def test_the_largest_remainder_goes_first_and_ties_to_the_earlier() -> None:
    assert split_largest_remainder(Nano(10), [1, 1, 1]) == [4, 3, 3]
    assert split_largest_remainder(Nano(100), [1, 2, 4]) == [14, 29, 57]
    assert split_largest_remainder(Nano(-10), [1, 1, 1]) == [-4, -3, -3]


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1]])
def test_nothing_to_split_by_is_an_error(weights: list[int]) -> None:
    with pytest.raises(ValueError, match="weights"):
        split_largest_remainder(Nano(1), weights)


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "$0.00"),
        (1, "$0.000000001"),
        (1_200_000, "$0.0012"),
        (12_500_000_000, "$12.50"),
        (-500_000_000, "-$0.50"),
        (1_234_567_000_000_000, "$1,234,567.00"),
    ],
)
def test_dollars_as_text(amount: int, text: str) -> None:
    assert format_usd(Nano(amount)) == text


@given(amounts)
def test_text_reads_back_to_the_same_amount(amount: Nano) -> None:
    assert parse_usd(format_usd(amount)) == amount


@pytest.mark.parametrize(
    "text", ["", "$", "1.", ".5", "1e3", "0.0000000001", "ten", "1.2.3", "--1", "٣", "9" * 20]
)
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(MoneyFormatError):
        parse_usd(text)
