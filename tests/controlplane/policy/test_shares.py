"""Shares of a tenant's limits: never more than the whole outstanding, and nothing lost for longer than a lease."""

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.policy.shares import WHOLE_PPM, Lease, divide, outstanding, scaled, wanted_ppm

LIFE_S = 60.0


def _by_cell(leases: tuple[Lease, ...]) -> dict[str, int]:
    return {lease.cell: lease.granted for lease in leases}


def test_demand_decides_above_a_floor() -> None:
    assert wanted_ppm({"a": 9.0, "b": 1.0}, {}) == {"a": 50_000 + 810_000, "b": 50_000 + 90_000}
    assert wanted_ppm({"a": 0.0, "b": 0.0}, {}) == {"a": 500_000, "b": 500_000}
    assert wanted_ppm({}, {}) == {}


def test_a_small_difference_moves_nothing() -> None:
    held = {"a": 500_000, "b": 500_000}
    assert wanted_ppm({"a": 101.0, "b": 100.0}, held) == held
    assert wanted_ppm({"a": 200.0, "b": 100.0}, held) != held


def test_a_limit_of_one_request_is_held_by_one_cell() -> None:
    assert wanted_ppm({"a": 2.0, "b": 3.0}, {}, units=1) == {"a": 0, "b": WHOLE_PPM}
    parts = wanted_ppm({"a": 2.0, "b": 3.0}, {}, units=3)
    assert sum(scaled(3, ppm) for ppm in parts.values()) <= 3
    assert sorted(parts.values()) == [333_333, 666_666]


def test_what_shrinks_is_granted_elsewhere_only_when_the_old_lease_has_run_out() -> None:
    leases = divide(WHOLE_PPM, (), {"a": 900_000, "b": 100_000}, 0.0, LIFE_S)
    assert _by_cell(leases) == {"a": 900_000, "b": 100_000}
    leases = divide(WHOLE_PPM, leases, {"a": 100_000, "b": 900_000}, 10.0, LIFE_S)
    assert _by_cell(leases) == {"a": 100_000, "b": 100_000}, "a gateway of cell a may not have heard of it"
    leases = divide(WHOLE_PPM, leases, {"a": 100_000, "b": 900_000}, 59.9, LIFE_S)
    assert _by_cell(leases) == {"a": 100_000, "b": 100_000}
    leases = divide(WHOLE_PPM, leases, {"a": 100_000, "b": 900_000}, 60.0, LIFE_S)
    assert _by_cell(leases) == {"a": 100_000, "b": 900_000}


def test_the_share_of_a_dead_cell_comes_back_after_its_lease() -> None:
    leases = divide(WHOLE_PPM, (), {"a": 500_000, "b": 500_000}, 0.0, LIFE_S)
    leases = divide(WHOLE_PPM, leases, {"b": WHOLE_PPM}, 59.0, LIFE_S)
    assert _by_cell(leases)["b"] == 500_000
    leases = divide(WHOLE_PPM, leases, {"b": WHOLE_PPM}, 60.0, LIFE_S)
    assert _by_cell(leases)["b"] == WHOLE_PPM


def test_money_that_a_cell_has_spent_is_nobody_elses_even_when_it_is_gone() -> None:
    leases = divide(1_000, (), {"a": 500, "b": 500}, 0.0, LIFE_S)
    leases = divide(1_000, leases, {"b": 1_000}, 100.0, LIFE_S, used={"a": 300, "b": 10})
    assert _by_cell(leases)["b"] == 700


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_outstanding_never_exceeds_the_whole(data: st.DataObject) -> None:
    """Over minutes of changing demand with cells that come, stall, die and come back."""
    cells = ["a", "b", "c"]
    leases: tuple[Lease, ...] = ()
    now_s = 0.0
    seen: list[Lease] = []  # every lease a gateway may still hold
    for _ in range(data.draw(st.integers(1, 12))):
        now_s += data.draw(st.sampled_from([1.0, 5.0, 20.0, 61.0]))
        alive = data.draw(st.sets(st.sampled_from(cells), min_size=1))
        demand = {c: float(data.draw(st.integers(0, 50))) for c in alive}
        units = data.draw(st.sampled_from([1, 2, 5, WHOLE_PPM]))
        wanted = wanted_ppm(demand, _by_cell(leases), units=units)
        assert sum(wanted.values()) <= WHOLE_PPM
        leases = divide(WHOLE_PPM, leases, wanted, now_s, LIFE_S)
        seen += leases
        assert outstanding(leases, now_s) <= WHOLE_PPM
        worst = {
            c: max((x.granted for x in seen if x.cell == c and x.until_s > now_s), default=0) for c in cells
        }
        assert sum(worst.values()) <= WHOLE_PPM, "whichever of its leases each gateway has heard of"
        assert divide(WHOLE_PPM, leases, wanted, now_s, LIFE_S) == leases, "stable on repeat"


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_money_leased_and_spent_never_exceeds_the_budget(data: st.DataObject) -> None:
    cells = ["a", "b"]
    budget = data.draw(st.integers(0, 10_000))
    leases: tuple[Lease, ...] = ()
    used = dict.fromkeys(cells, 0)
    now_s = 0.0
    for _ in range(data.draw(st.integers(1, 12))):
        now_s += data.draw(st.sampled_from([1.0, 10.0, 61.0]))
        alive = data.draw(st.sets(st.sampled_from(cells), min_size=1))
        left = budget - sum(used.values())
        share = wanted_ppm({c: float(data.draw(st.integers(0, 9))) for c in alive}, {})
        wanted = {c: used[c] + scaled(left, share[c]) for c in alive}
        leases = divide(budget, leases, wanted, now_s, LIFE_S, used=used)
        for lease in leases:
            most = lease.outstanding(now_s)
            if most > used[lease.cell]:
                used[lease.cell] = data.draw(st.integers(used[lease.cell], most))
        assert sum(used.values()) <= budget
