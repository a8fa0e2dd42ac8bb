"""Whether a request will probably be served in time, and how much may wait before it for that: pure.

Mooncake (FAST 25) refuses at once what would miss its target, instead of letting it wait for nothing. Here the number
that decides is the slot time that waits before a request in the fair queue, not how many requests: the gateway computes
how much of it the target allows, and the admission script, which alone knows the queue at that instant, compares
(workers/lua/admit.lua; controlplane/policy/fairness.py for the simulator). A request for which a slot is free is never
refused: nothing would be gained.

    first word = (slot time before it + one mean request) / slots + its own prefill

times a factor that is learned as quantiles of observed over predicted (perfbias.py), per class. Between the two
quantiles errors are taken as log-normal, which gives the probability of meeting any target. What is predicted is
compared with what came: where the quantiles do not hold, nobody is refused by them until they do.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from controlplane.policy.fairness import ANY_MS, TOKEN
from controlplane.policy.pace import Pace
from controlplane.policy.perfbias import Bias
from controlplane.policy.promises import Promise

# Refused below this probability of meeting the target. Under overload the queue stands where the last one admitted has
# just this, so it is about what those admitted attain. A higher floor does not leave slots idle, since any queue fills
# them: in tests/controlplane/policy/test_outlook.py, at loads from 0.8 to 4, 0.95 serves more in time than 0.9 or 0.8.
FLOOR: Final = 0.95
_Z90: Final = 1.2815515655446004
_Z_FLOOR: Final = 1.6448536269514722  # of FLOOR
# Requests to have seen before anything is refused: a pace, and first words of requests that waited.
MIN_SEEN: Final = 10
MIN_JUDGED: Final = 30
# Shares of first words within the quantile, over about the last 50: beyond these the quantiles do not hold. The lower
# bound is what protects those who are admitted, the upper one those who would be refused for nothing.
_P90_LEAST: Final = 0.75
_P50_MOST: Final = 0.95
_SLOWEST_WEIGHT: Final = 0.02
# Of those that would be refused one in so many is let in, so that a wrong prediction cannot feed on itself.
PROBE_EVERY: Final = 50
_MAX_RETRY_S: Final = 300.0
# The queue stands at its bound as long as the overload lasts: who comes back at once finds it there.
_MIN_RETRY_S: Final = 1.0


class Terms(NamedTuple):
    """What admission goes by: slot time that the request takes, the most that may wait before it (ANY_MS: any; below 0:
    it may not wait at all), what another flow may get ahead in the fairness window; and its own prefill in seconds,
    uncorrected."""

    slot_ms: int
    most_ahead_ms: int
    window_ms: int
    first_s: float
    is_hopeless: bool = (
        False  # what waits for its first word there already makes it late, wherever a slot is free
    )


class Outlook(NamedTuple):
    """When the first word will come: in half of the cases, in nine of ten; and the probability of the target."""

    p50_s: float
    p90_s: float
    attainment: float


class Track(NamedTuple):
    """How predictions did: shares of first words within each quantile, of `n`."""

    n: int = 0
    p50: float = 0.5
    p90: float = 0.9

    @property
    def holds(self) -> bool:
        return self.n < MIN_JUDGED or (self.p90 >= _P90_LEAST and self.p50 <= _P50_MOST)

    def seen(self, within_p50: bool, within_p90: bool) -> Track:
        weight = max(1 / (self.n + 10), _SLOWEST_WEIGHT)
        return Track(
            self.n + 1,
            self.p50 + weight * (within_p50 - self.p50),
            self.p90 + weight * (within_p90 - self.p90),
        )


class _Class:
    """Of one service class: the correction, its record, and the share of a target that a prediction may take."""

    __slots__ = ("bias", "n_late", "share", "track")

    def __init__(self) -> None:
        self.bias = Bias()
        self.track = Track()
        self.n_late = 0
        self.share = share_of_target(self.bias)


class Gate:
    """Predictions for one deployment, for one gateway or simulated queue. Everything is O(1)."""

    def __init__(self, pace: Pace | None = None) -> None:
        self.pace = pace or Pace()
        self.classes: dict[str, _Class] = {}  # a handful

    def terms(
        self,
        promise: Promise,
        n_prompt: int,
        n_output: int,
        *,
        slots: int,
        n_prefill: int = 0,
        window: int = 0,
        predicts: bool = True,
    ) -> Terms:
        """For a request of `n_prompt` tokens and an answer of probably `n_output`. `slots`: of all ready replicas (0:
        none is known); `n_prefill`: prompt tokens that wait for their first word where it would go; `window`: of
        fairness, in counter units. Without `predicts` nothing is refused, and all is predicted all the same."""
        pace = self.pace
        slot_s = pace.slot_s(n_prompt, n_output)
        first_s = pace.first_s(n_prompt + n_prefill)
        window_ms = int(window / TOKEN * pace.slot_s_per_cost * 1000) if window else 0
        most, is_hopeless = ANY_MS, False
        if predicts and slots > 0 and pace.n >= MIN_SEEN:
            known = self.classes.get(promise.name)
            if known is None:
                known = self.classes[promise.name] = _Class()
            if known.track.holds and known.n_late < PROBE_EVERY:
                longest_s = longest(promise, slot_s) * known.share
                most = int(((longest_s - first_s) * slots - pace.mean_slot_s) * 1000)
                most = max(-1, min(most, ANY_MS))
                is_hopeless = n_prefill > 0 and first_s > longest_s
        return Terms(max(1, int(slot_s * 1000)), most, window_ms, first_s, is_hopeless)

    def total_s(self, terms: Terms, ahead_ms: int, slots: int) -> float:
        """Seconds to the first word of a request that must wait, uncorrected."""
        return (ahead_ms / 1000 + self.pace.mean_slot_s) / max(slots, 1) + terms.first_s

    def outlook(self, promise: Promise, total_s: float) -> Outlook:
        """What that means, by what was seen of this class."""
        known = self.classes.get(promise.name)
        bias = Bias() if known is None else known.bias
        return Outlook(
            total_s * bias.p50, total_s * bias.p90, attainment(promise.ttft_ms / 1000, total_s, bias)
        )

    def late(self, promise: Promise, terms: Terms, ahead_ms: int, slots: int) -> float:
        """A request was refused: seconds after which as much has drained as was too much."""
        known = self.classes.get(promise.name)
        if known is not None:
            known.n_late += 1
        too_much_s = (ahead_ms - max(terms.most_ahead_ms, 0)) / 1000 / max(slots, 1)
        return min(max(too_much_s, _MIN_RETRY_S), _MAX_RETRY_S)

    def waited(self, promise: Promise, total_s: float, observed_s: float) -> None:
        """A request that had to wait got its first word after `observed_s`; `total_s` was said, uncorrected."""
        known = self.classes.get(promise.name)
        if known is None:
            known = self.classes[promise.name] = _Class()
        if total_s <= 0 or observed_s <= 0:
            return
        bias = known.bias
        known.track = known.track.seen(observed_s <= total_s * bias.p50, observed_s <= total_s * bias.p90)
        known.bias = bias.seen(observed_s / total_s)
        known.share = share_of_target(known.bias)

    def let_in(self, promise: Promise, terms: Terms) -> None:
        """A request was admitted: if it was the one in so many, the next are judged again."""
        known = self.classes.get(promise.name)
        if known is not None and terms.most_ahead_ms == ANY_MS and known.n_late >= PROBE_EVERY:
            known.n_late = 0


def longest(promise: Promise, slot_s: float) -> float:
    """Seconds to the first word that the promise allows: its target, or, where it can wait, what leaves time for the
    answer before the deadline."""
    if promise.can_wait:
        return max(promise.deadline_s - slot_s, 0.0)
    return promise.ttft_ms / 1000


def attainment(target_s: float, predicted_s: float, bias: Bias) -> float:
    """Probability that it takes no longer than the target: log-normal through both quantiles."""
    if predicted_s <= 0:
        return 1.0
    sigma = (bias.log_p90 - bias.log_p50) / _Z90
    off = math.log(target_s / predicted_s) - bias.log_p50
    if sigma <= 1e-9:
        return 1.0 if off >= 0 else 0.0
    return 0.5 * math.erfc(-off / (sigma * math.sqrt(2)))


def share_of_target(bias: Bias) -> float:
    """The share of a target that an uncorrected prediction may take, so that FLOOR of such cases meet it."""
    return math.exp(-(bias.log_p50 + _Z_FLOOR / _Z90 * (bias.log_p90 - bias.log_p50)))
