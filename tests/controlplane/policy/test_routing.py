"""Ranking replicas: least loaded first, stable, independent of the order of its input."""

from hypothesis import given
from hypothesis import strategies as st

from controlplane.policy.routing import MAX_CANDIDATES, ReplicaLoad, rank

loads = st.lists(
    st.builds(
        ReplicaLoad,
        st.text("abc", min_size=1, max_size=3),
        st.just("m"),
        st.integers(0, 9),
        st.integers(0, 8),
    ),
    unique_by=lambda load: load.replica,
    max_size=20,
)


def replica(name: str, used: int, slots: int) -> ReplicaLoad:
    return ReplicaLoad(name, "m", used, slots)


def test_least_loaded_by_share_of_its_slots_goes_first() -> None:
    assert rank([replica("a", 2, 4), replica("b", 3, 16), replica("c", 0, 1)]) == ("c", "b", "a")


def test_ties_go_by_id() -> None:
    assert rank([replica("b", 1, 4), replica("a", 2, 8)]) == ("a", "b")


def test_full_replica_is_last_and_one_without_slots_is_none() -> None:
    assert rank([replica("full", 4, 4), replica("none", 0, 0), replica("free", 3, 4)]) == ("free", "full")


@given(loads, st.randoms())
def test_order_of_the_input_is_irrelevant_and_the_result_bounded(
    replicas: list[ReplicaLoad], rng: object
) -> None:
    shuffled = list(replicas)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    ranked = rank(replicas)
    assert ranked == rank(shuffled)
    assert len(ranked) == min(MAX_CANDIDATES, sum(r.slots > 0 for r in replicas))
