"""On which rung a pool without work rests: a machine kept warm, a stopped one, or nothing. Pure.

The schedule is the ladder's (ladder.py), over the idle gaps that this pool has had: it descends when keeping a machine
costs more than the next request is worth, and climbs again, before anybody asks, where the gaps say when. Called by
poolplan.py in every turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from autoscaler.policy.ladder import Gaps, Rest, Rung, Stakes, rest

WARM: Final = "warm machine"
STOPPED: Final = "stopped machine"
NOTHING: Final = "nothing"


@dataclass(frozen=True, slots=True)
class RestMemory:
    """Gaps between two times with work, and since when there is none. `rung`: where it rests now; '' while it works."""

    gaps: Gaps = field(default_factory=Gaps)
    idle_since_s: float | None = None
    rung: str = ""


@dataclass(frozen=True, slots=True)
class RestInputs:
    """emptied_at_s: when the last replica ended, if that is known. Rungs dearest first or not, as ladder.py takes
    them; none: the pool's machines cost nothing, or the ladder is switched off."""

    n_live: int = 0
    emptied_at_s: float | None = None
    rungs: tuple[Rung, ...] = ()
    stakes: Stakes = field(default_factory=lambda: Stakes(2.0, 0.02, 0.002, 0.0))
    climbs: bool = True  # whether it may wake before anybody asks


def next_rest(inputs: RestInputs, now_s: float, memory: RestMemory) -> tuple[RestMemory, Rest | None]:
    """The rung for now, and the schedule that it is from (None: none applies)."""
    if inputs.n_live:
        if memory.idle_since_s is not None:
            memory = replace(memory, gaps=memory.gaps.seen(max(now_s - memory.idle_since_s, 0.0)))
        return replace(memory, idle_since_s=None, rung=""), None
    since_s = memory.idle_since_s
    if since_s is None:
        since_s = now_s if inputs.emptied_at_s is None else min(inputs.emptied_at_s, now_s)
    if not inputs.rungs:
        return replace(memory, idle_since_s=since_s, rung=""), None
    schedule = rest(inputs.rungs, inputs.stakes, memory.gaps, climbs=inputs.climbs)
    return replace(memory, idle_since_s=since_s, rung=schedule.at(now_s - since_s).name), schedule
