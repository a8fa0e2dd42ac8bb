"""Which machines are given up for lost."""

import pytest

from autoscaler.policy.machines import Silence, lost


@pytest.mark.parametrize(
    ("silence", "is_lost"),
    [
        (Silence(59.9), False),
        (Silence(60.0), True),
        (Silence(60.0, n_silent=1, n_machines=2), True),
        (Silence(60.0, n_silent=2, n_machines=4), True),
        (Silence(60.0, n_silent=3, n_machines=4), False),  # more likely ours than theirs
        (Silence(599.0, n_silent=2, n_machines=2), False),
        (Silence(600.0, n_silent=2, n_machines=2), True),
    ],
)
def test_a_silent_machine_is_waited_for_and_most_of_a_pool_for_longer(
    silence: Silence, is_lost: bool
) -> None:
    assert bool(lost(silence, 60.0)) is is_lost
