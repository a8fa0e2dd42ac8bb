"""What to do about the difference between the replicas that should run and those we know. Pure.

Level-triggered: called on every change and once a second, with everything there is to know each time. A
replica id is started once only; trying again under a new id is control's decision.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from workers.contract import ReplicaSpec


class Life(enum.Enum):
    """Where a replica is, as this machine's agent sees it."""

    STARTING = "starting"  # fetching the model, waiting for the zygote, forking
    RUNNING = "running"
    ASLEEP = "asleep"  # its process lives, and has said that it sleeps
    STOPPING = "stopping"  # told to drain
    ENDED = "ended"


class Step(enum.Enum):
    START = "start"
    STOP = "stop"  # drain, then end
    SLEEP = "sleep"  # tell it again: it sleeps when it is done, and says so
    WAKE = "wake"
    FORGET = "forget"  # ended, and control no longer wants to know


@dataclass(frozen=True, slots=True)
class Action:
    step: Step
    replica: str


def plan(desired: Mapping[str, ReplicaSpec] | None, known: Mapping[str, Life]) -> list[Action]:
    """Actions that bring `known` nearer to `desired`, by replica id. None: what is desired is not known
    (Redis has lost it), so nothing is done.
    """
    if desired is None:
        return []
    actions = []
    for replica in sorted(desired.keys() | known.keys()):
        spec, life = desired.get(replica), known.get(replica)
        wanted = spec is not None and not spec.drain
        if life is None:
            if wanted:
                actions.append(Action(Step.START, replica))
        elif life is Life.ENDED:
            if spec is None:
                actions.append(Action(Step.FORGET, replica))
        elif life is not Life.STOPPING and not wanted:
            actions.append(Action(Step.STOP, replica))
        elif spec is not None and spec.sleep and life is Life.RUNNING:
            actions.append(Action(Step.SLEEP, replica))
        elif spec is not None and not spec.sleep and life is Life.ASLEEP:
            actions.append(Action(Step.WAKE, replica))
    return actions
