"""The agent's decision: a table."""

import pytest

from tests.workers.agents import spec
from workers.agent.plan import Action, Life, Step, plan
from workers.contract import ReplicaSpec

RUN, DRAIN = spec("r1"), spec("r1", drain=True)
START, STOP, FORGET = (Action(step, "r1") for step in (Step.START, Step.STOP, Step.FORGET))


@pytest.mark.parametrize(
    ("desired", "life", "actions"),
    [
        (RUN, None, [START]),
        (RUN, Life.STARTING, []),
        (RUN, Life.RUNNING, []),
        (RUN, Life.STOPPING, []),
        (RUN, Life.ENDED, []),  # never started twice
        (DRAIN, None, []),
        (DRAIN, Life.STARTING, [STOP]),
        (DRAIN, Life.RUNNING, [STOP]),
        (DRAIN, Life.STOPPING, []),
        (DRAIN, Life.ENDED, []),
        (None, None, []),
        (None, Life.STARTING, [STOP]),
        (None, Life.RUNNING, [STOP]),
        (None, Life.STOPPING, []),
        (None, Life.ENDED, [FORGET]),
    ],
)
def test_every_pair(desired: ReplicaSpec | None, life: Life | None, actions: list[Action]) -> None:
    assert plan({"r1": desired} if desired else {}, {"r1": life} if life else {}) == actions


def test_unknown_desire_changes_nothing() -> None:
    assert plan(None, {"r1": Life.RUNNING, "r2": Life.ENDED}) == []


def test_actions_come_in_order_of_ids() -> None:
    desired = {name: spec(name) for name in ("c", "a", "b")}
    assert [action.replica for action in plan(desired, {})] == ["a", "b", "c"]
