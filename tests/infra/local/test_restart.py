"""When to restart: walked through time."""

from infra.local.restart import NEVER, RestartPolicy

POLICY = RestartPolicy(n_deaths=5, window_s=60, first_delay_s=0.25, longest_delay_s=8)


def test_delay_doubles_and_the_fifth_death_within_a_minute_is_the_last() -> None:
    deaths: list[float] = []
    delays = []
    for now_s in (0.0, 1.0, 2.0, 3.0, 4.0):
        deaths.append(now_s)
        delays.append(POLICY.delay_s(deaths, now_s))
    assert delays == [0.25, 0.5, 1.0, 2.0, None]


def test_old_deaths_are_forgotten() -> None:
    assert POLICY.delay_s([0.0, 1.0, 2.0, 3.0, 70.0], 70.0) == 0.25


def test_delay_is_bounded() -> None:
    patient = RestartPolicy(n_deaths=100, window_s=1000, first_delay_s=0.25, longest_delay_s=8)
    assert patient.delay_s([float(second) for second in range(50)], 50.0) == 8


def test_never_means_never() -> None:
    assert NEVER.delay_s([0.0], 0.0) is None
