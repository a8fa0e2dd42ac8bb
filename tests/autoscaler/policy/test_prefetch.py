"""Which versions machines fetch ahead: the most wanted that fits what is free, one at a time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from autoscaler.policy.prefetch import Room, Wanted, prefetches

A, B, C = Wanted("a", 100, 5), Wanted("b", 50, 9), Wanted("c", 10, 9)
NONE: frozenset[str] = frozenset()


def _room(machine: str, free: int, holds: frozenset[str] = NONE, asked: frozenset[str] = NONE) -> Room:
    return Room(machine, holds, asked, free)


def test_the_most_wanted_that_is_lacking_and_fits() -> None:
    versions = [A, B, C]
    assert prefetches([_room("m", 1000)], versions) == (("m", "c"),)
    assert prefetches([_room("m", 1000, frozenset("c"))], versions) == (("m", "b"),)
    assert prefetches([_room("m", 40, frozenset("c"))], versions) == ()
    assert prefetches([_room("m", 1000, asked=frozenset("x"))], versions) == (), "one at a time"
    assert prefetches([_room("n", 1000, frozenset("bc")), _room("m", 60)], [A, B]) == (("m", "b"), ("n", "a"))


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 200), st.frozensets(st.integers(0, 9))), max_size=8),
    st.lists(st.tuples(st.integers(1, 120), st.integers(0, 9)), max_size=10),
)
def test_never_more_than_is_free_nor_twice_and_in_any_order_the_same(
    rows: list[tuple[int, int, frozenset[int]]], wanted: list[tuple[int, int]]
) -> None:
    rooms = [
        _room(f"m{n}", free, frozenset(map(str, holds)), frozenset(str(k) for k in range(asked // 4)))
        for n, (asked, free, holds) in enumerate(rows)
    ]
    versions = [Wanted(str(n), size, starts) for n, (size, starts) in enumerate(wanted)]
    found = prefetches(rooms, versions)
    assert found == prefetches(rooms[::-1], versions[::-1])
    by_id, sizes = {room.machine_id: room for room in rooms}, {v.digest: v.size_bytes for v in versions}
    assert len({machine for machine, _ in found}) == len(found)
    for machine, digest in found:
        room = by_id[machine]
        assert digest not in room.holds and not room.asked and sizes[digest] <= room.free_bytes
