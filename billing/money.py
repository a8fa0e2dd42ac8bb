"""Money: whole nano-dollars, rates per million tokens, and the one rounding rule of the product.

Every amount that is stored, held, shown or invoiced goes through here; no other file multiplies tokens by a
rate. Integers only: a float cannot hold a cent exactly. 1 dollar = 10^9 nano-dollars, so a signed 64-bit
column reaches 9.2 billion dollars.

The rounding rule: the charges of one request are summed exactly (tokens times rate, in millionths of a
nano-dollar) and rounded once, half to even. Half to even favours neither side over many requests, and a
single rounding per request keeps the error below half a nano-dollar whatever the number of components.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NewType

Nano = NewType("Nano", int)  # an amount, nano-dollars
NanoPerMillion = NewType("NanoPerMillion", int)  # a rate, nano-dollars per million tokens

NANO_PER_DOLLAR: Final = 1_000_000_000
TOKENS_PER_RATE: Final = 1_000_000
MAX_NANO: Final = (1 << 63) - 1  # what the database column holds


class MoneyFormatError(ValueError):
    """The text is no amount of dollars; the message says what one looks like."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Token prices of one price version. Cached prompt tokens have a rate of their own, usually lower."""

    input: NanoPerMillion
    cached: NanoPerMillion
    output: NanoPerMillion

    def __post_init__(self) -> None:
        for name, rate in (("input", self.input), ("cached", self.cached), ("output", self.output)):
            if not 0 <= rate <= MAX_NANO:
                raise ValueError(f"{name} rate {rate}: must be from 0 to {MAX_NANO} nano-dollars per million")


def cost_nano(n_tokens: int, rate: NanoPerMillion) -> Nano:
    """Price of one kind of token. For a whole request use request_cost, which rounds once, not per kind."""
    _check_counts(n_tokens)
    return _round(n_tokens * rate)


def request_cost(rates: Rates, *, n_prompt: int, n_cached: int, n_completion: int) -> Nano:
    """Price of a request. `n_cached` is the part of `n_prompt` that the prefix cache served.

    Grows with every count (as long as cached tokens cost no more than others), so the price of the worst case
    is a sufficient hold. Raises ValueError for impossible counts.
    """
    _check_counts(n_prompt, n_cached, n_completion)
    if n_cached > n_prompt:
        raise ValueError(f"n_cached={n_cached}: must be at most n_prompt={n_prompt}")
    return _round((n_prompt - n_cached) * rates.input + n_cached * rates.cached + n_completion * rates.output)


def worst_case_cost(rates: Rates, *, n_prompt: int, n_completion: int) -> Nano:
    """The most that request_cost can be with these counts, whatever share of the prompt turns out cached."""
    _check_counts(n_prompt, n_completion)
    return _round(n_prompt * max(rates.input, rates.cached) + n_completion * rates.output)


def token_cost_ceiling(rate: NanoPerMillion) -> Nano:
    """Whole nano-dollars that one token costs at most: for holds that are cut token by token."""
    return Nano(-(-rate // TOKENS_PER_RATE))


def split_largest_remainder(total: Nano, weights: Sequence[int]) -> list[Nano]:
    """Parts of `total` in proportion to `weights`, none lost: they sum to `total` exactly.

    Each part is its exact share rounded down, and the nano-dollars left go one each to the largest
    remainders, ties to the earlier position. A negative total (a credit) splits as its opposite does. Raises
    ValueError where there is nothing to split by: no weight, a negative one, or all zero.
    """
    if not weights or min(weights) < 0 or sum(weights) == 0:
        raise ValueError("weights: need at least one, none negative, not all zero")
    if total < 0:
        return [Nano(-part) for part in split_largest_remainder(Nano(-total), weights)]
    whole = sum(weights)
    parts = [total * weight // whole for weight in weights]
    left = total - sum(parts)
    by_remainder = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % whole), i))
    for i in by_remainder[:left]:
        parts[i] += 1
    return [Nano(part) for part in parts]


def format_usd(amount: Nano) -> str:
    """`$0.0012`: exact, at least two decimals, no zeros after that, thousands separated, minus sign first."""
    dollars, nanos = divmod(abs(amount), NANO_PER_DOLLAR)
    decimals = f"{nanos:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if amount < 0 else ''}${dollars:,}.{decimals}"


def parse_usd(text: str) -> Nano:
    """The amount behind `0.0012`, `$5` or `-$1,250.00`. Raises MoneyFormatError; never rounds."""
    plain = text.strip()
    sign = -1 if plain.startswith("-") else 1
    plain = plain.removeprefix("-").removeprefix("$").replace(",", "")
    whole, point, decimals = plain.partition(".")
    digits = whole + decimals
    if not (digits.isascii() and digits.isdigit() and whole) or (point and not decimals):
        raise MoneyFormatError(f"{text[:40]!r} is no amount: write dollars such as 12.50")
    if len(decimals) > 9:
        raise MoneyFormatError(f"{text[:40]!r}: at most 9 decimals, one nano-dollar is the smallest amount")
    amount = int(whole) * NANO_PER_DOLLAR + int(decimals.ljust(9, "0"))
    if amount > MAX_NANO:
        raise MoneyFormatError(f"{text[:40]!r} is more than {format_usd(Nano(MAX_NANO))}")
    return Nano(sign * amount)


def _round(millionths: int) -> Nano:
    """THE rounding rule: half to even, exact for integers of any size."""
    quotient, remainder = divmod(millionths, TOKENS_PER_RATE)
    if 2 * remainder > TOKENS_PER_RATE or (2 * remainder == TOKENS_PER_RATE and quotient % 2):
        quotient += 1
    return Nano(quotient)


def _check_counts(*counts: int) -> None:
    if min(counts) < 0:
        raise ValueError(f"token counts {counts}: must not be negative")
