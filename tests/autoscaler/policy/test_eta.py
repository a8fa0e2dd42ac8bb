"""What waiting clients are told about the time left."""

from autoscaler.policy.eta import Timings, average, eta_ms
from autoscaler.types import StageName

FULL = Timings(launching_machine=10_000, starting_replica=400, loading_model=600)


def test_eta_adds_what_is_left_of_this_stage_and_all_later_ones() -> None:
    assert eta_ms(StageName.LAUNCHING_MACHINE, 4.0, FULL) == 7000
    assert eta_ms(StageName.STARTING_REPLICA, 0.1, FULL) == 900
    assert eta_ms(StageName.LOADING_MODEL, 0.2, FULL) == 400
    assert eta_ms(StageName.READY, 0.0, FULL) == 0


def test_a_stage_that_takes_longer_than_ever_is_about_to_end() -> None:
    assert eta_ms(StageName.STARTING_REPLICA, 60.0, FULL) == 600


def test_waking_counts_from_the_replica() -> None:
    assert eta_ms(StageName.WAKING, 0.0, FULL) == 1000


def test_nothing_is_promised_before_it_was_measured() -> None:
    assert eta_ms(StageName.LAUNCHING_MACHINE, 0.0, Timings(loading_model=600)) is None
    assert eta_ms(StageName.FAILED, 0.0, FULL) is None


def test_average_follows_the_newest() -> None:
    value = average(None, 100)
    for _ in range(10):
        value = average(value, 200)
    assert 195 < value < 200
