"""Machines' passwords on a clock: replaced at half their life, never taken from who may have the new one."""

import pytest

from autoscaler.policy.passwords import (
    LINGER_S,
    MAX_OFFERS,
    Password,
    Step,
    Told,
    box_life_s,
    ends_at_s,
    offer_s,
    step,
)

H = 3600.0
LIFE = 6 * H


@pytest.mark.parametrize(
    ("password", "now_s", "expected"),
    [
        (Password(0, LIFE), 3 * H - 1, Step.KEEP),
        (Password(0, LIFE), 3 * H, Step.OFFER),
        (Password(0, LIFE, is_leaving=True, ends_at_s=5 * H), 3 * H, Step.OFFER),
        (Password(0, LIFE, 1, 3 * H, Told.PRESENT), 3 * H + 299, Step.KEEP),
        (Password(0, LIFE, 1, 3 * H, Told.PRESENT), 3 * H + 300, Step.WITHDRAW),
        (Password(0, LIFE, 1, 3 * H, Told.NEXT), 3 * H + 1, Step.FINISH),
        (Password(0, LIFE, 1, 3 * H, Told.NEXT), 9 * H, Step.FINISH),
        # A machine that says nothing may have taken it: both stay, as long as the password is valid at all.
        (Password(0, LIFE, 1, 3 * H, Told.NOTHING), 6 * H - 1, Step.KEEP),
        (Password(0, LIFE, 1, 3 * H, Told.NOTHING), 6 * H, Step.LEAVE),
        (Password(0, LIFE, 1, 3 * H, Told.NOTHING, is_leaving=True, ends_at_s=7 * H), 7 * H - 1, Step.KEEP),
        (Password(0, LIFE, 1, 3 * H, Told.NOTHING, is_leaving=True, ends_at_s=7 * H), 7 * H, Step.END),
        # Bounded: then it is replaced, long before its password is over.
        (Password(0, LIFE, MAX_OFFERS), 3 * H + 900, Step.LEAVE),
        (Password(0, LIFE, MAX_OFFERS, is_leaving=True, ends_at_s=6 * H), 6 * H - 1, Step.KEEP),
        (Password(0, LIFE, MAX_OFFERS, is_leaving=True, ends_at_s=6 * H), 6 * H, Step.END),
        # One that should have been given back, for whatever reason, has no business here.
        (Password(0, LIFE, is_leaving=True, ends_at_s=100), 100 + LINGER_S - 1, Step.KEEP),
        (Password(0, LIFE, is_leaving=True, ends_at_s=100), 100 + LINGER_S, Step.END),
        (Password(0, LIFE, can_take=False), 3 * H, Step.LEAVE),
        # Control was away for a day: the machine is offered one before anything else.
        (Password(0, LIFE), 24 * H, Step.OFFER),
        (Password(0, LIFE, is_leaving=True), 24 * H, Step.END),
    ],
)
def test_steps(password: Password, now_s: float, expected: Step) -> None:
    assert step(password, now_s) is expected


@pytest.mark.parametrize("valid_s", [60.0, 600.0, LIFE])
def test_a_machine_that_never_takes_one_is_dead_by_its_stated_end_and_had_time_to_move(
    valid_s: float,
) -> None:
    """Walks the clock as control does. Short lives are stretched by what offers and moving take."""
    password, offers, leaves_at_s, now_s = Password(0, valid_s, told=Told.PRESENT), 0, None, 0.0
    while True:
        match step(password, now_s):
            case Step.OFFER:
                offers += 1
                password = Password(
                    0, valid_s, offers, now_s, Told.PRESENT, True, password.is_leaving, leaves_at_s
                )
            case Step.WITHDRAW:
                password = Password(
                    0, valid_s, offers, None, Told.PRESENT, True, password.is_leaving, leaves_at_s
                )
            case Step.LEAVE:
                leaves_at_s = ends_at_s(password, now_s)
                assert leaves_at_s - now_s >= 60
                password = Password(0, valid_s, offers, None, Told.PRESENT, True, True, leaves_at_s)
            case Step.END:
                break
        now_s += 5.0
    assert offers == MAX_OFFERS
    assert now_s <= max(valid_s, valid_s / 2 + MAX_OFFERS * (offer_s(valid_s) + 10) + 60) + 5


def test_a_beat_read_when_an_offer_ends_was_sent_after_nobody_could_take_it_any_more() -> None:
    for valid_s in (60.0, 600.0, LIFE):
        assert offer_s(valid_s) - box_life_s(valid_s) >= 10  # ServeTuning.heartbeat_life_ms
