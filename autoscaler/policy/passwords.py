"""When a machine's Redis password is replaced, and when a machine that takes no new one has to go.

A password is valid for a stated time. Half of it over, a new one is offered beside it; only when the machine says that
it connects with the new one does the old one end. Offers that are not taken are bounded: then the machine is replaced
like one under notice, and when its time is over its password is dead, whoever has it. Pure; renewal.py calls it.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

MAX_OFFERS: Final = 3
_OFFER_SHARE: Final = (
    1 / 24
)  # of the life: three offers and what is left for leaving fit into its second half
# The box that holds an offer lies there for half of it: a beat that is read at its end was sent after that.
_OFFER_MIN_S: Final = 20.0
_OFFER_MAX_S: Final = 300.0
LEAVE_MIN_S: Final = 60.0  # enough for a successor to start, and for streams to move to it


# What runs on a machine that leaves has moved by its end; it is given two minutes to stop (ScalerSpec.drain_timeout_s),
# and then the machine has no business in Redis, whether or not its provider has ended it.
LINGER_S: Final = 180.0


class Told(StrEnum):
    """Which password the machine's agent says its processes connect with."""

    PRESENT = "present"
    NEXT = "next"
    NOTHING = "nothing"  # silent, or of a version that does not say


class Step(StrEnum):
    """What to do about one machine's password now."""

    KEEP = "keep"
    OFFER = "offer"  # make a new one, valid beside the present one
    WITHDRAW = "withdraw"  # the offered one was not taken, and ends
    FINISH = "finish"  # the offered one was taken: the old one ends
    LEAVE = "leave"  # the machine is replaced, as if its provider took it away at `ends_at_s`
    END = "end"  # no password is valid any more


@dataclass(frozen=True, slots=True)
class Password:
    """Of one machine. since_s: when the present one became the only one. n_offers: since then. offered_at_s: of the
    offer that stands. ends_at_s: when the machine leaves, if it does. can_take: its agent can open an offer."""

    since_s: float
    valid_s: float
    n_offers: int = 0
    offered_at_s: float | None = None
    told: Told = Told.NOTHING
    can_take: bool = True
    is_leaving: bool = False
    ends_at_s: float | None = None


def offer_s(valid_s: float) -> float:
    """How long an offer stands."""
    return min(max(valid_s * _OFFER_SHARE, _OFFER_MIN_S), _OFFER_MAX_S)


def box_life_s(valid_s: float) -> float:
    """How long the agent may take an offer; then nobody can, and its beats (10 s old at most) say whether it did."""
    return offer_s(valid_s) / 2


def ends_at_s(password: Password, now_s: float) -> float:
    """When the password of a machine that has to leave is over: at its stated end, and never without time to move."""
    return max(password.since_s + password.valid_s, now_s + LEAVE_MIN_S)


def step(password: Password, now_s: float) -> Step:
    """One step; asked again every few seconds.

    Nothing is withdrawn from a machine that says nothing: it may have taken what it was offered, and would be locked
    out. Time that passed while nobody asked (control was away) ends no machine: it is offered a new one first.
    """
    age_s = now_s - password.since_s
    if password.is_leaving and password.ends_at_s is not None and now_s >= password.ends_at_s + LINGER_S:
        return Step.END
    if password.offered_at_s is not None:
        if password.told is Told.NEXT:
            return Step.FINISH
        if now_s - password.offered_at_s < offer_s(password.valid_s):
            return Step.KEEP
        if password.told is Told.PRESENT:
            return Step.WITHDRAW
        if age_s < password.valid_s:
            return Step.KEEP
    elif age_s < password.valid_s / 2:
        return Step.KEEP
    elif password.can_take and password.n_offers < MAX_OFFERS and not _is_over(password, now_s):
        return Step.OFFER
    if not password.is_leaving:
        return Step.LEAVE
    return Step.END if _is_over(password, now_s) else Step.KEEP


def _is_over(password: Password, now_s: float) -> bool:
    """A machine that leaves, whyever, at its end; where that is not known, at the end of the password."""
    if not password.is_leaving:
        return False
    ends = password.ends_at_s
    return now_s >= (password.since_s + password.valid_s if ends is None else ends)
