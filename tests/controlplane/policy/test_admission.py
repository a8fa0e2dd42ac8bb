"""Holds: at least what the request can cost, at most what the context allows."""

from hypothesis import given
from hypothesis import strategies as st

from billing.money import NanoPerMillion, Rates, request_cost
from controlplane.policy.admission import hold, rest

RATES = Rates(NanoPerMillion(1_000_000), NanoPerMillion(500_000), NanoPerMillion(2_000_000))
rates = st.integers(0, 10**12).map(NanoPerMillion)


def test_hold_of_a_plain_request() -> None:
    taken = hold(10, 20, 2048, RATES)
    assert (taken.n_prompt, taken.n_output, taken.money_nano, taken.output_rate_nano) == (10, 20, 50, 2.0)


def test_money_is_held_for_the_prompt_that_may_be_and_tokens_for_the_one_expected() -> None:
    taken = hold(2000, 20, 4096, RATES, n_paid=2100)
    assert (taken.n_prompt, taken.n_paid, taken.money_nano, taken.prompt_nano) == (2000, 2100, 2140, 2100.0)
    assert hold(2000, 20, 4096, RATES).n_paid == 2000
    assert rest(taken, 2000, 10, RATES).money_nano == 120, "the rest of both"


def test_continuation_holds_the_rest_and_at_least_one_token() -> None:
    whole = hold(10, 20, 2048, RATES, streaming=True)
    taken = rest(whole, 10, 15, RATES)
    assert (taken.n_prompt, taken.n_output, taken.money_nano, taken.share) == (0, 5, 10, whole.share)
    assert rest(whole, 12, 20, RATES).n_output == 1
    assert rest(whole, 0, 0, RATES) == whole, "nothing was charged before"


def test_open_request_holds_what_the_context_leaves_for_a_prompt_of_half_the_estimate() -> None:
    assert hold(1000, None, 2048, RATES).n_output == 1548
    assert hold(1000, 5000, 2048, RATES).n_output == 1548
    assert hold(9000, None, 2048, RATES).n_output == 1, "the replica refuses it by its exact count"


@given(
    n_prompt=st.integers(1, 10**6),
    asked=st.none() | st.integers(1, 10**6),
    context=st.integers(1, 10**6),
    prices=st.builds(Rates, rates, rates, rates),
    used=st.floats(0, 1),
    cached=st.floats(0, 1),
)
def test_no_outcome_within_the_hold_costs_more_than_was_held(
    n_prompt: int, asked: int | None, context: int, prices: Rates, used: float, cached: float
) -> None:
    taken = hold(n_prompt, asked, context, prices)
    assert 1 <= taken.n_output <= max(1, context)
    assert asked is None or taken.n_output <= asked
    cost = request_cost(
        prices,
        n_prompt=taken.n_prompt,
        n_cached=int(taken.n_prompt * cached),
        n_completion=int(taken.n_output * used),
    )
    assert cost <= taken.money_nano
