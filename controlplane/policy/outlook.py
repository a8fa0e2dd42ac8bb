"""Whether a request will probably be served in time, and how much may wait before it for that: pure.

Mooncake (FAST 25) refuses at once what would miss its target, instead of letting it wait for nothing. Here the number
that decides is the slot time that waits before a request in the fair queue, not how many requests: the gateway computes
how much of it the target allows, and the admission script, which alone knows the queue at that instant, compares
(workers/lua/admit.lua; controlplane/policy/fairness.py for the simulator). A request for which a slot is free is never
refused: nothing would be gained.

    first word = (slot time before it + one mean request) / slots + its own prefill

where replicas that are being started add their slots from when they will probably be ready (coming.py). That is taken
times a factor that is learned as quantiles of observed over predicted (perfbias.py), per organization and class.
Between the two quantiles errors are taken as log-normal, which gives the probability of meeting any target. What is
predicted is compared with what came: where the quantiles do not hold, nobody is refused by them until they do.

An organization that is late because others wait beside it, while it has no more waiting than its share of the slots
would serve in time, is let in. Refused, it would leave its share to them, and they would make it later still.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from controlplane.policy.coming import NONE, Coming, drained_s, drains_in_s
from controlplane.policy.flows import ANY_MS
from controlplane.policy.pace import Pace, Speed
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
MAX_RECORDS: Final = 1_000  # organizations and classes, of one gate
# The queue stands at its bound as long as the overload lasts: who comes back at once finds it there.
_MIN_RETRY_S: Final = 1.0


class Terms(NamedTuple):
    """What admission goes by: slot time that the request takes, the most that may wait before it (ANY_MS: any; below 0:
    it may not wait at all); the most that its organization, if all slots were its own, may have waiting to be let in
    all the same where others wait, too; and its own prefill in seconds, uncorrected."""

    slot_ms: int
    most_ahead_ms: int
    most_own_ms: int
    first_s: float
    # What waits for its first word there already makes it late, wherever a slot is free.
    is_hopeless: bool = False


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


class Record:
    """Of one organization in one service class: the correction, how it did, and the share of a target that a prediction
    may take."""

    __slots__ = ("bias", "n_late", "share", "track")

    def __init__(self) -> None:
        self.bias = Bias()
        self.track = Track()
        self.n_late = 0
        self.share = share_of_target(self.bias)

    @property
    def judges(self) -> bool:
        """Whether anybody is refused by it: where predictions hold, but for one in so many that would be."""
        return self.n_late < PROBE_EVERY and self.track.holds

    def outlook(self, promise: Promise, total_s: float) -> Outlook:
        """What an uncorrected prediction means."""
        bias = self.bias
        return Outlook(
            total_s * bias.p50, total_s * bias.p90, attainment(promise.ttft_ms / 1000, total_s, bias)
        )

    def late(self, terms: Terms, ahead_ms: int, slots: int, coming: Sequence[Coming] = NONE) -> float:
        """A request was refused: seconds after which as much has drained as was too much."""
        self.n_late += 1
        too_much_s = drains_in_s((ahead_ms - max(terms.most_ahead_ms, 0)) / 1000, slots, coming)
        return min(max(too_much_s, _MIN_RETRY_S), _MAX_RETRY_S)

    def let_in(self, terms: Terms) -> None:
        """A request was admitted: if it was the one in so many, the next are judged again."""
        if terms.most_ahead_ms == ANY_MS and self.n_late >= PROBE_EVERY:
            self.n_late = 0

    def waited(self, total_s: float, observed_s: float) -> None:
        """A request that had to wait got its first word after `observed_s`; `total_s` was said, uncorrected."""
        if total_s <= 0 or observed_s <= 0:
            return
        bias = self.bias
        self.track = self.track.seen(observed_s <= total_s * bias.p50, observed_s <= total_s * bias.p90)
        self.bias = bias.seen(observed_s / total_s)
        self.share = share_of_target(self.bias)


class Gate:
    """Predictions for one deployment, for one gateway or simulated queue. Everything is O(1)."""

    def __init__(self, pace: Pace | None = None) -> None:
        self.pace = pace or Pace()
        self.presumed: Speed | None = None
        self._records: OrderedDict[tuple[str, str], Record] = (
            OrderedDict()
        )  # the one not used for longest goes

    def presume(self, speed: Speed) -> None:
        """The pace begins with this, whatever it began with. For a pace that has not seen an answer yet."""
        self.presumed, self.pace = speed, Pace(*speed)

    def records(self) -> Iterable[tuple[tuple[str, str], Record]]:
        """(organization, class) and its record, of those seen here lately."""
        return self._records.items()

    def record(self, organization: str, promise: Promise) -> Record:
        """How predictions did for this organization in this class, to be written in place."""
        at = (organization, promise.name)
        known = self._records.get(at)
        if known is None:
            known = self._records[at] = Record()
            if len(self._records) > MAX_RECORDS:
                self._records.popitem(last=False)
        else:
            self._records.move_to_end(at)
        return known

    def terms(
        self,
        organization: str,
        promise: Promise,
        n_prompt: int,
        n_output: int,
        *,
        slots: int,
        n_prefill: int = 0,
        predicts: bool = True,
        coming: Sequence[Coming] = NONE,
    ) -> Terms:
        """For a request of `n_prompt` tokens and an answer of probably `n_output`. `slots`: of all ready replicas (0:
        none is known); `n_prefill`: prompt tokens that wait for their first word where it would go; `coming`: replicas
        that are being started. Without `predicts` nothing is refused, and all is predicted all the same."""
        pace = self.pace
        slot_s = pace.slot_s(n_prompt, n_output)
        first_s = pace.first_s(n_prompt + n_prefill)
        most, own, is_hopeless = ANY_MS, ANY_MS, False
        record = self.record(organization, promise)
        if predicts and slots > 0 and pace.n >= MIN_SEEN and record.judges:
            longest_s = longest(promise, slot_s)
            most = self._most_ms(longest_s * record.share - first_s, slots, coming)
            own = self._most_ms(longest_s * _SHARE - first_s, slots, coming)
            is_hopeless = n_prefill > 0 and first_s > longest_s * _SHARE
        return Terms(max(1, int(slot_s * 1000)), most, own, first_s, is_hopeless)

    def _most_ms(self, wait_s: float, slots: int, coming: Sequence[Coming]) -> int:
        """Slot time that drains in `wait_s`, less a request's own wait for a slot; at least -1."""
        done_s = drained_s(wait_s, slots, coming) if coming else wait_s * slots
        return max(-1, min(int((done_s - self.pace.mean_slot_s) * 1000), ANY_MS))

    def total_s(self, terms: Terms, ahead_ms: int, slots: int, coming: Sequence[Coming] = NONE) -> float:
        """Seconds to the first word of a request that must wait, uncorrected."""
        return drains_in_s(ahead_ms / 1000 + self.pace.mean_slot_s, slots, coming) + terms.first_s


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


_SHARE: Final = share_of_target(Bias())  # before anything was seen
