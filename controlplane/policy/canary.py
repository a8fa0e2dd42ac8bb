"""Whether a canary goes on, back or through, from what clients saw of it and of the stable arm. Pure.

Requests are given to the arms by chance (share of the ids), so both see the same traffic. Three figures are compared in
the same window: errors, missed promises, and how often a request's tokens come slower than those of a stable request
beside it. Looking again and again must not add up to an error, so the intervals are confidence sequences: with
probability 1 - alpha the true share lies in all of them at once, however often one looks (mixture martingale and
Ville's inequality; Robbins 1970, Howard et al. 2021). `alpha` is split evenly over the figures, the arms and the steps,
so that a canary as good as the stable arm is rolled back with probability alpha at most over the whole rollout, and one
that is worse by more than the tolerance promoted with probability alpha at most. Assumed: within a window of one step
a figure does not drift on its own in one arm only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

N_FIGURES: Final = 3
_BISECTIONS: Final = 40


@dataclass(frozen=True, slots=True)
class Limits:
    """What an operator may choose.

    alpha: probability of a wrong decision over the whole rollout, of each kind. tolerance: by how much errors and
    misses may be worse; slower_tolerance: the same of the share of slower requests, at most 0.5 between equals.
    slower_ratio: tokens count as slower from so many times the time on. min_requests: of the canary, per step, before
    it goes on. step_max_s: a step that long is decided by what is there. max_deaths: canary processes that may fail.
    """

    alpha: float = 0.05
    tolerance: float = 0.05
    slower_tolerance: float = 0.15
    slower_ratio: float = 1.15
    min_requests: int = 50
    step_max_s: float = 3600.0
    max_deaths: int = 1

    def __post_init__(self) -> None:
        for name, low, high in (
            ("alpha", 1e-6, 0.2),
            ("tolerance", 0.001, 0.5),
            ("slower_tolerance", 0.01, 0.5),
            ("slower_ratio", 1.0, 10.0),
            ("min_requests", 1, 100_000),
            ("step_max_s", 10, 7 * 86400),
            ("max_deaths", 0, 10),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} = {value} is out of range; allowed: {low:g} to {high:g}")


@dataclass(frozen=True, slots=True)
class Arm:
    """Requests that ended in the window: all, failed through no fault of theirs, and among the rest those that missed a
    target of their class."""

    n: int = 0
    n_errors: int = 0
    n_missed: int = 0


@dataclass(frozen=True, slots=True)
class Evidence:
    """Both arms in one window; pairs of requests beside each other, and in how many the canary was slower; processes of
    the canary that failed since the rollout began."""

    canary: Arm = Arm()
    stable: Arm = Arm()
    n_pairs: int = 0
    n_slower: int = 0
    n_deaths: int = 0


class Action(StrEnum):
    WAIT = "wait"
    NEXT = "next"  # a larger share, or all after the last step
    BACK = "back"


@dataclass(frozen=True, slots=True)
class Figure:
    """One comparison: intervals that hold at all times together."""

    name: str
    canary: tuple[float, float]
    stable: tuple[float, float]
    is_worse: bool
    is_fine: bool

    def __str__(self) -> str:
        return (
            f"{self.name} {self.canary[0]:.1%} to {self.canary[1]:.1%} "
            f"against {self.stable[0]:.1%} to {self.stable[1]:.1%}"
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """`is_weak`: the step's time was over and nothing spoke against it, but the tolerance was not shown to be kept."""

    action: Action
    reason: str
    figures: tuple[Figure, ...] = field(default=())
    is_weak: bool = False


def judge(
    evidence: Evidence, limits: Limits, *, n_steps: int, in_step_s: float, paused: bool = False
) -> Verdict:
    """A regression decides at any time; going on needs the minimum of requests and every figure within tolerance."""
    if evidence.n_deaths > limits.max_deaths:
        return Verdict(
            Action.BACK, f"{evidence.n_deaths} of its processes failed, allowed are {limits.max_deaths}"
        )
    figures = compare(evidence, limits, n_steps)
    worse = [figure for figure in figures if figure.is_worse]
    if worse:
        return Verdict(Action.BACK, "worse than the stable arm: " + "; ".join(map(str, worse)), figures)
    n = evidence.canary.n
    if paused:
        return Verdict(Action.WAIT, f"paused, {n} requests so far", figures)
    if n >= limits.min_requests and all(figure.is_fine for figure in figures):
        return Verdict(Action.NEXT, f"{n} requests, every figure within tolerance", figures)
    if in_step_s < limits.step_max_s:
        left = max(limits.min_requests - n, 0)
        open_ = ", ".join(figure.name for figure in figures if not figure.is_fine)
        told = f"{left} more requests at least" if left else f"not yet told apart: {open_}"
        return Verdict(Action.WAIT, f"{n} requests: {told}", figures)
    if n < limits.min_requests:
        return Verdict(
            Action.BACK,
            f"{n} of {limits.min_requests} requests in {in_step_s:.0f} s: too few to judge it",
            figures,
        )
    if _point_worse(evidence, limits):
        return Verdict(
            Action.BACK, f"{in_step_s:.0f} s are over and it looks worse, though not surely", figures
        )
    return Verdict(
        Action.NEXT, f"{in_step_s:.0f} s are over and nothing speaks against it", figures, is_weak=True
    )


def compare(evidence: Evidence, limits: Limits, n_steps: int) -> tuple[Figure, ...]:
    """The three figures with their intervals."""
    alpha = limits.alpha / (N_FIGURES * max(n_steps, 1))
    c, s = evidence.canary, evidence.stable
    found = []
    for name, (k_c, n_c), (k_s, n_s) in (
        ("errors", (c.n_errors, c.n), (s.n_errors, s.n)),
        ("missed promises", (c.n_missed, c.n - c.n_errors), (s.n_missed, s.n - s.n_errors)),
    ):
        ours, theirs = interval(k_c, n_c, alpha / 2), interval(k_s, n_s, alpha / 2)
        found.append(Figure(name, ours, theirs, ours[0] > theirs[1], ours[1] - theirs[0] <= limits.tolerance))
    slower = interval(evidence.n_slower, evidence.n_pairs, alpha)
    found.append(
        Figure(
            "slower tokens", slower, (0.0, 0.5), slower[0] > 0.5, slower[1] <= 0.5 + limits.slower_tolerance
        )
    )
    return tuple(found)


def interval(k: int, n: int, alpha: float) -> tuple[float, float]:
    """The shares not refuted by k of n, at this and any other time, with probability 1 - alpha.

    Refuted is p once the mixture over all shares (Beta(1/2, 1/2), Krichevsky and Trofimov's) makes what was seen
    1 / alpha times as likely as p does: a martingale under p, which Ville's inequality bounds at all times.
    """
    if n <= 0:
        return 0.0, 1.0
    log_mixture = _log_beta(k + 0.5, n - k + 0.5) - _log_beta(0.5, 0.5)
    most = log_mixture + math.log(alpha)  # log likelihood of p must stay above this

    def refuted(p: float) -> bool:
        if (p <= 0 and k) or (p >= 1 and k < n):
            return True
        likelihood = (k * math.log(p) if k else 0.0) + ((n - k) * math.log1p(-p) if k < n else 0.0)
        return likelihood < most

    mean = k / n
    low, high = 0.0, mean
    if k:
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if refuted(middle) else (low, middle)
    lower = low if k else 0.0
    low, high = mean, 1.0
    if k < n:
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if refuted(middle) else (middle, high)
    return lower, (high if k < n else 1.0)


def pairs(
    canary: Sequence[tuple[float, float]], stable: Iterable[tuple[float, float]], slower_ratio: float
) -> tuple[int, int]:
    """(pairs, pairs in which the canary was slower) of (instant, milliseconds per token), each sorted by instant.

    Each canary request goes with the latest stable one before it that no other has: neighbours in time, so that what
    slows everybody slows both.
    """
    n = n_slower = 0
    waiting: list[float] = []
    others = iter(stable)
    upcoming = next(others, None)
    for at, ms in canary:
        while upcoming is not None and upcoming[0] <= at:
            waiting.append(upcoming[1])
            upcoming = next(others, None)
        if waiting:
            n += 1
            n_slower += ms > waiting.pop() * slower_ratio
    return n, n_slower


def takes(request_id: str, share_ppm: int) -> bool:
    """Whether a request is the canary's, by its id: the same in every process, at every attempt. lua/lib_bind.lua says
    the same of `threshold(share_ppm)`."""
    return int(request_id[-4:], 16) < threshold(share_ppm)


def threshold(share_ppm: int) -> int:
    """A share as how many of the 65,536 endings of an id are the canary's: rounded down, it is a bound."""
    return share_ppm * 65_536 // 1_000_000


def _point_worse(evidence: Evidence, limits: Limits) -> bool:
    def rate(k: int, n: int) -> float:
        return k / n if n else 0.0

    c, s = evidence.canary, evidence.stable
    errors = rate(c.n_errors, c.n) - rate(s.n_errors, s.n)
    missed = rate(c.n_missed, c.n - c.n_errors) - rate(s.n_missed, s.n - s.n_errors)
    slower = rate(evidence.n_slower, evidence.n_pairs) - 0.5
    return errors > limits.tolerance or missed > limits.tolerance or slower > limits.slower_tolerance


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
