"""The rules Corral is compared with do what their own sources say; examples are from there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autoscaler.policy.spot import FleetView, OfferView
from autoscaler.sim.buyers import AnyZoneElseOnDemand, SpotHedge
from autoscaler.sim.hpa import Hpa, HpaSpec
from autoscaler.sim.kpa import Kpa, KpaSpec
from autoscaler.sim.policies import policy

# Kubernetes


@pytest.mark.parametrize(
    ("target", "n_now", "usage", "n"),
    [
        (100, 4, 800, 8),  # 200m where 100m is wanted: doubled
        (100, 4, 200, 2),  # 50m: halved
        (75, 50, 50 * 90, 60),  # ceil(50 x 90 / 75)
        (100, 10, 1100, 10),  # within the tolerance of 10 %, both ways
        (100, 10, 900, 10),
        (100, 10, 1101, 12),  # and just outside
        (100, 10, 899, 9),
        (100, 0, 250, 3),
    ],
)
def test_hpa_s_recommendation(target: float, n_now: int, usage: float, n: int) -> None:
    assert Hpa(HpaSpec(target)).recommendation(n_now, usage) == n


def test_hpa_grows_by_four_pods_or_double_in_a_period() -> None:
    hpa = Hpa(HpaSpec(1))
    assert hpa.replicas(0, 1, 100) == 5
    assert hpa.replicas(7, 5, 100) == 5  # not before its period
    assert hpa.replicas(15, 5, 100) == 10
    assert hpa.replicas(30, 10, 100) == 20


def test_hpa_shrinks_to_the_highest_recommendation_of_five_minutes() -> None:
    hpa = Hpa(HpaSpec(1))
    assert [hpa.replicas(at_s, 10, load) for at_s, load in ((0, 10), (60, 8), (120, 4), (300, 4))] == [10] * 4
    assert hpa.replicas(315, 10, 4) == 8  # what was wanted at 60 s is the highest left
    assert hpa.replicas(375, 8, 4) == 4


# Knative: pkg/autoscaler/scaling/autoscaler_test.go, whose specs have rates of 10 and a threshold of 2

SPEC = KpaSpec(10, max_scale_up_rate=10, max_scale_down_rate=10, n_min=0)


@pytest.mark.parametrize(
    ("spec", "n_ready", "stable", "panic", "n"),
    [
        (replace(SPEC, target=181), 1, 21, 26, 1),
        (SPEC, 1, 50, 49, 5),
        (SPEC, 5, 50, 50, 5),
        (SPEC, 1, 50, 100, 10),  # the panic window takes precedence
        (SPEC, 1, 1000, 1001, 10),  # at most ten times
        (SPEC, 10, 1000, 1001, 100),
        (SPEC, 100, 1, 1, 10),  # at most a tenth
        (replace(SPEC, target=1, max_scale_up_rate=1.1), 2, 3, 3.1, 3),
        (replace(SPEC, max_scale_down_rate=1.1), 100, 1, 1, 90),
        (SPEC, 1, 0, 0, 0),
    ],
)
def test_kpa_s_wish(spec: KpaSpec, n_ready: int, stable: float, panic: float, n: int) -> None:
    assert Kpa(spec).desired(0, n_ready, stable, panic) == n


def test_kpa_only_grows_in_panic_and_shrinks_a_stable_window_later() -> None:
    kpa = Kpa(SPEC)
    assert kpa.desired(0, 10, 100, 1000) == 100
    assert kpa.desired(30, 10, 1, 1) == 100
    assert kpa.desired(61, 10, 1, 1) == 1


def test_kpa_leaves_panic_though_load_rises_slowly() -> None:
    kpa = Kpa(replace(SPEC, target=1))
    assert kpa.desired(0, 10, 11, 25) == 25
    assert kpa.desired(30, 40, 30, 41) == 41
    assert kpa.desired(62, 55, 50, 56) == 50


def test_kpa_delays_shrinking() -> None:
    kpa = Kpa(replace(SPEC, panic_threshold=100, scale_down_delay_s=300))
    wishes = [kpa.desired(at_s, 4, load, load) for at_s, load in ((2, 40), (300, 0), (302, 0))]
    assert wishes == [4, 4, 0]


def test_kpa_s_windows_average_what_they_cover() -> None:
    kpa = Kpa(KpaSpec(10, n_min=0))
    for at_s in range(0, 60, 2):
        assert kpa.replicas(at_s, 4, 40) == 4
    assert kpa.replicas(60, 4, 100) == 5  # 29 x 40 and 100, over 30, is 42
    assert kpa.replicas(62, 4, 100) == 8  # the last six seconds want twice what is ready: panic
    assert kpa.replicas(64, 4, 100) == 10


# SkyServe


def offers(**ready: int) -> tuple[OfferView, ...]:
    return tuple(OfferView(name, 1.0, n_ready=n) for name, n in ready.items())


@pytest.mark.parametrize(
    ("n_ready", "have", "launched", "cancelled", "released"),
    [
        (0, 0, 2, 0, 0),  # min(N_tar, N_tar + N_extra - ready): never for the spare
        (1, 0, 2, 0, 0),
        (2, 0, 1, 0, 0),
        (3, 2, 0, 0, 2),
        (2, 2, 0, 0, 1),
    ],
)
def test_spothedge_s_fallback(n_ready: int, have: int, launched: int, cancelled: int, released: int) -> None:
    view = FleetView(0, 2, offers(a=n_ready), 3.0, 0, have)
    orders = SpotHedge(1).buy(view)
    assert (orders.launch_on_demand, orders.cancel_on_demand, orders.release_on_demand) == (
        launched,
        cancelled,
        released,
    )


def test_spothedge_gives_up_pending_fallback_before_ready_one() -> None:
    orders = SpotHedge(1).buy(FleetView(0, 2, offers(a=2), 3.0, 1, 1))
    assert (orders.cancel_on_demand, orders.release_on_demand) == (1, 0)


def test_spothedge_avoids_zones_that_failed_until_one_other_is_left() -> None:
    hedge = SpotHedge(0)
    a, b, c = offers(a=0, b=0, c=0)
    refused = replace(a, refused_at_s=0.0)
    assert hedge.buy(FleetView(1, 1, (refused, b, c), 3.0)).launch == (("b", 1),)
    assert hedge.buy(FleetView(1, 2, (refused, replace(b, n_ready=1), c), 3.0)).launch == (("c", 1),)
    # b fails too: one active zone would be left, so all are forgiven.
    both = (refused, replace(b, refused_at_s=2.0), c)
    assert hedge.buy(FleetView(3, 1, both, 3.0)).launch == (("a", 1),)


def test_the_three_line_policy_can_buy_more_than_wanted() -> None:
    view = FleetView(0, 2, offers(a=2), 3.0)
    assert AnyZoneElseOnDemand().buy(view).launch == ()
    assert AnyZoneElseOnDemand(n_extra=1).buy(view).launch == (("a", 1),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("best", "'best' is unknown; known: corral"),
        ("hpa:speed=1", "hpa: no knob 'speed'; it has target_ratio"),
        ("kpa:target_ratio=high", "give a number"),
    ],
)
def test_a_policy_s_name_and_knobs_are_checked(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        policy(text)
