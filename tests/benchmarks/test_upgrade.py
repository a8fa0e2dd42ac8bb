"""What the rolling-upgrade drill takes for a right bill."""

from __future__ import annotations

import uuid

import pytest

from benchmarks.upgrade import bill_of, step_ms_for
from infra.drills.scene import DrillError

REQUEST = uuid.UUID(int=7)
RATES = (2_000_000, 500_000, 6_000_000)  # nano-dollars per million tokens


def test_a_bill_is_compared_with_what_its_counts_cost_at_the_price_of_its_admission() -> None:
    # 60 tokens of prompt at 2, 40 cached ones at 0.5, 10 of answer at 6.
    right = bill_of((REQUEST, 100, 40, 10, 1, 200, *RATES))
    assert (right.cost_nano, right.due_nano) == (200, 120 + 20 + 60)
    wrong = bill_of((REQUEST, 100, 40, 10, 1, 240, *RATES))
    assert (wrong.cost_nano, wrong.due_nano) == (240, 200), "cached tokens billed as others"
    with pytest.raises(DrillError, match="cost nothing"):
        bill_of((REQUEST, 100, 40, 10, 1, 0, 0, 0, 0))


def test_streams_outlast_the_upgrade_of_a_slow_computer() -> None:
    assert step_ms_for(8.0, 2400) == 20.0
    assert step_ms_for(40.0, 2400) == 83.3
    assert step_ms_for(400.0, 2400) == 110.0, "bounded, as the drill's own patience is"
