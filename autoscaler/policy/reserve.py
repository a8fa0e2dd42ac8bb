"""On-demand machines that lie stopped to stand in for spot: which to buy, to lay down and to give back. Pure.

When one of them is started is spot.py's question (`n_stopped`, `resume_s`), asked by market.py for a deployment that
has lost its machine. Here is what keeps as many there as the house wants: each holds a place of the reserve, is bought
once, gets the weights that are served, and lies stopped whenever nothing runs on it. Called by poolplan.py, each turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

MAX_FILL_S: Final = 1800.0  # an object store that is away does not keep a machine running for ever


class Where(StrEnum):
    """Where one is on its way: bought and not up; up and fetching weights; standing in, or told to; moved off; down."""

    COMING = "coming"
    FILLING = "filling"
    SERVING = "serving"
    LEAVING = "leaving"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Member:
    """One machine of the reserve. is_filled: its disk has what it would have to serve. for_s: since it came up."""

    id: str
    place: int
    where: Where
    is_filled: bool = False
    n_replicas: int = 0
    for_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ReserveInputs:
    """n: as many as the house wants. Machines at places beyond it are too many."""

    n: int = 0
    members: tuple[Member, ...] = ()


@dataclass(frozen=True, slots=True)
class ReserveOrders:
    """Places to buy a machine for; (machine, why) to stop and to end."""

    buy: tuple[int, ...] = ()
    stop: tuple[tuple[str, str], ...] = ()
    end: tuple[tuple[str, str], ...] = ()


def keep(inputs: ReserveInputs, n_wanted: int) -> ReserveOrders:
    """`n_wanted`: machines with work. None is bought for a pool without; those that are there stay."""
    taken = {m.place for m in inputs.members}
    buy = tuple(place for place in range(inputs.n) if place not in taken) if n_wanted else ()
    stop: list[tuple[str, str]] = []
    end: list[tuple[str, str]] = []
    for each in sorted(inputs.members, key=lambda m: (m.place, m.id)):
        if each.place >= inputs.n:
            if each.where in (Where.COMING, Where.FILLING, Where.STOPPED):
                end.append((each.id, f"reserve: {inputs.n} are wanted"))
        elif each.where not in (Where.FILLING, Where.SERVING) or each.n_replicas:
            continue
        elif each.is_filled:
            told = "the weights are on its disk" if each.where is Where.FILLING else "nothing runs on it"
            stop.append((each.id, f"reserve: {told}"))
        elif each.for_s > MAX_FILL_S:
            stop.append((each.id, f"reserve: weights did not come in {each.for_s:.0f} s"))
    return ReserveOrders(buy, tuple(stop), tuple(end))
