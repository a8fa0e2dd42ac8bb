"""Ranking replicas with all that a gateway knows of loads, prompts, work under way, adapters and prices."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.policy.routing import MAX_CANDIDATES, Ask, Board, ReplicaLoad

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


def board(*loads: ReplicaLoad, cache_tokens: int = 100_000) -> Board:
    found = Board(cache_tokens)
    found.see({load.replica: load for load in loads})
    return found


def prompt(n_tokens: int, *prefixes: str) -> Ask:
    return Ask(n_tokens, prefixes, [1_000 * (n + 1) for n in range(len(prefixes))])


def test_a_prompt_goes_where_its_beginning_is() -> None:
    ours = board(replica("a", 0, 8), replica("b", 0, 8))
    ours.started(ours.bound("b", prompt(3_000, "x", "xy"), now_s=0))
    ours.started(ours.bound("a", prompt(3_000, "q", "qr"), now_s=0))
    assert ours.rank(prompt(3_000, "x", "xy"))[0] == "b"
    assert ours.rank(prompt(3_000, "q", "qr", "qrs"))[0] == "a"


def test_affinity_yields_to_requests_that_run_there() -> None:
    ours = board(replica("a", 0, 64), replica("b", 0, 64))
    ours.started(ours.bound("b", prompt(3_000, "x", "xy"), now_s=0))
    choices = []
    for used in range(20):
        ours.loads["b"].used = used
        choices.append(ours.rank(prompt(3_000, "x", "xy"))[0])
    turn = choices.index("a")
    assert 0 < turn < 12
    assert choices == ["b"] * turn + ["a"] * (20 - turn)


def test_prompts_not_computed_yet_count_until_their_first_token() -> None:
    ours = board(replica("a", 0, 8), replica("b", 0, 8), cache_tokens=0)
    first = ours.bound("a", prompt(50_000), now_s=0)
    second = ours.bound("b", prompt(20_000), now_s=0)
    assert ours.rank(prompt(100))[0] == "b"
    ours.started(first)
    assert ours.rank(prompt(100))[0] == "a"
    ours.started(second)
    third = ours.bound("a", prompt(90_000), now_s=0)
    fourth = ours.bound("a", prompt(5_000), now_s=0)
    ours.started(fourth)  # prompts are computed in order: its end waits for the one before
    assert ours.rank(prompt(100))[0] == "b"
    ours.started(third)


def test_recent_work_decides_between_equals_and_is_forgotten() -> None:
    ours = board(replica("a", 0, 8), replica("b", 0, 8))
    ours.started(ours.bound("a", prompt(400_000), now_s=0))
    assert ours.rank(prompt(1_000))[0] == "b"
    ours.loads["b"].used = 1  # dearer but for the work done lately
    assert ours.rank(prompt(20_000))[0] == "b"
    ours.loads["b"].used = 0
    ours.started(ours.bound("b", prompt(10_000), now_s=600))  # ten times recent_s later
    assert ours.rank(prompt(1_000))[0] == "a"
    ours.started(ours.bound("b", prompt(10_000), now_s=60_000))  # further than a float could scale
    assert ours.rank(prompt(1_000))[0] == "a"


def test_a_replica_with_fewer_slots_gets_fewer_requests() -> None:
    loads = [replica("large", 0, 32), replica("small", 0, 8)]
    ours = board(*loads, cache_tokens=0)
    for turn in range(20):
        ours.loads[ours.rank(prompt(100), 1, turn=turn)[0]].used += 1
    assert [load.used for load in loads] == [16, 4]


def test_what_other_gateways_placed_is_known_but_not_counted_as_load() -> None:
    ours = board(replica("a", 0, 8), replica("b", 0, 8))
    ours.heard("b", prompt(3_000, "x", "xy"), now_s=0)
    ours.heard("gone", prompt(3_000, "x", "xy", "xyz"), now_s=0)
    assert ours.rank(prompt(3_000, "x", "xy"))[0] == "b"
    ours.heard("b", prompt(300_000), now_s=0)
    assert ours.rank(prompt(3_000))[0] == "a"
    assert ours.loads["b"].used == 0


def test_gateways_with_the_same_view_do_not_follow_each_other() -> None:
    """Ties rotate by request; on this gateway's side a request given counts at once."""
    names = "abcdefgh"
    ours = board(*(replica(name, 3, 8) for name in names))
    assert {ours.rank(prompt(500), 1, turn=turn)[0] for turn in range(8)} == set(names)
    assert ours.rank(prompt(500), turn=5) == ours.rank(prompt(500), turn=5)


def test_full_replicas_come_last_however_cheap_and_those_without_slots_do_not_come() -> None:
    loads = [replica("full", 1, 1), replica("none", 0, 0), replica("busy", 7, 8), replica("kv", 0, 8)]
    loads[3].kv_used_ratio = 0.97
    ours = board(*loads)
    ours.started(ours.bound("full", prompt(3_000, "x", "xy"), now_s=0))
    assert ours.rank(prompt(3_000, "x", "xy"))[0] == "busy"
    assert set(ours.rank(prompt(3_000, "x", "xy"))[1:]) == {"full", "kv"}
    assert Board(1_000).rank(prompt(10)) == ()


def test_adapters_and_prices_count() -> None:
    there, elsewhere, dear = replica("a", 2, 8), replica("b", 0, 8), replica("c", 0, 8)
    there.adapters, elsewhere.adapters, dear.adapters = {"sql"}, {"law"}, {"sql"}
    dear.price = 3.0
    ours = board(there, elsewhere, dear)
    assert ours.rank(Ask(200, adapter="sql"))[0] == "c"
    dear.used = 1
    assert ours.rank(Ask(200, adapter="sql"))[0] == "a"
    assert ours.rank(Ask(200))[0] == "b"


@pytest.mark.parametrize(("kv_tokens", "first"), [(0, "a"), (2_000, "b")])
def test_what_a_replica_says_its_memory_holds_bounds_what_is_believed_of_its_cache(
    kv_tokens: int, first: str
) -> None:
    """Two prompts of 2,000 tokens went to one replica: with room for one it forgot the older."""
    load = ReplicaLoad("a", "m", 0, 8, kv_tokens=kv_tokens)
    ours = board(load, replica("b", 0, 8))
    for prefix in ("x", "y"):
        ours.started(ours.bound("a", prompt(2_000, prefix, prefix * 2), 0.0))
    assert ours.rank(prompt(2_000, "x", "xx"))[0] == first


@pytest.mark.parametrize("kind", ["gone", "back"])
def test_a_replica_that_left_is_a_stranger_when_it_comes_back(kind: str) -> None:
    a, b = replica("a", 0, 8), replica("b", 0, 8)
    ours = board(a, b)
    ours.started(ours.bound("b", prompt(3_000, "x", "xy"), now_s=0))
    ours.see({"a": a})
    assert ours.rank(prompt(3_000, "x", "xy")) == ("a",)
    if kind == "back":
        ours.see({"a": a, "b": b})
        assert {ours.rank(prompt(3_000, "x", "xy"), 1, turn=n)[0] for n in range(2)} == {"a", "b"}


@given(loads, st.randoms(), st.integers(0, 10**9))
def test_the_board_is_bounded_and_blind_to_the_order_of_its_input_but_for_ties(
    replicas: list[ReplicaLoad], rng: object, turn: int
) -> None:
    for number, load in enumerate(replicas):
        load.price = 1 + number / 1000  # no ties
    shuffled = list(replicas)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    ranked = board(*replicas).rank(prompt(500), turn=turn)
    assert ranked == board(*shuffled).rank(prompt(500))
    assert len(ranked) == min(MAX_CANDIDATES, sum(r.slots > 0 for r in replicas))
    assert board(*replicas).rank(prompt(500), 1, turn=turn) == ranked[:1]
