"""What a gateway remembers of the replicas' caches: matches, forgetting in the engine's order, bounds."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from controlplane.policy.affinity import PrefixMap


def note(known: PrefixMap, replica: str, text: str, step: int = 100) -> None:
    known.note(replica, chain(text), ends(text, step))


def chain(text: str) -> list[str]:
    """Prefixes are equal only where all before them is."""
    return [text[: n + 1] for n in range(len(text))]


def ends(prefixes: Sequence[object], step: int = 100) -> list[int]:
    return [step * (n + 1) for n in range(len(prefixes))]


def test_the_longest_beginning_of_each_replica_is_found() -> None:
    known = PrefixMap(10_000)
    note(known, "a", "xyz")
    note(known, "b", "xy")
    note(known, "c", "q")
    assert known.matches(chain("xyzw")) == {"a": 3, "b": 2}
    assert (known.held("a", chain("xyq")), known.held("c", chain("xyq")), known.held("d", chain("x"))) == (
        2,
        0,
        0,
    )
    assert known.matches(chain("")) == known.matches(chain("w")) == {}


def test_the_least_recently_used_is_forgotten_first_and_its_end_before_its_beginning() -> None:
    known = PrefixMap(400)
    note(known, "a", "ab")
    note(known, "a", "cd")
    note(known, "a", "ab")  # used again
    note(known, "a", "e")
    assert [known.held("a", chain(p)) for p in ("ab", "cd", "e")] == [2, 1, 1]
    note(known, "a", "f")
    assert [known.held("a", chain(p)) for p in ("ab", "cd", "e", "f")] == [2, 0, 1, 1]


def test_a_replica_that_says_what_its_cache_holds_is_believed_from_then_on() -> None:
    known = PrefixMap(10_000)
    known.note("a", chain("abc"), ends("abc"), 300)
    known.note("b", chain("abc"), ends("abc"))
    for name in ("a", "b"):
        note(known, name, "x")
    assert [known.held(name, chain("abc")) for name in ("a", "b")] == [2, 3]
    known.note("a", chain("y"), ends("y"), 100)  # resized: started again with less
    assert known.held("a", chain("abc")) == 0


def test_a_growing_prompt_is_counted_once() -> None:
    """Ladders: each prefix stands for what it adds to the one before."""
    known = PrefixMap(800)
    known.note("a", chain("ab"), [100, 200])
    known.note("a", chain("abc"), [100, 200, 800])
    assert known.held("a", chain("abc")) == 3
    known.note("a", "z", [1])
    assert known.held("a", chain("abc")) == 2


def test_a_replica_that_is_gone_leaves_nothing_behind() -> None:
    known = PrefixMap(10_000)
    note(known, "a", "xy")
    note(known, "b", "x")
    known.forget("a")
    known.forget("never seen")
    assert known.matches(chain("xy")) == {"b": 1}
    note(known, "c", "xy")  # takes the bit that a had
    assert known.matches(chain("xy")) == {"c": 2, "b": 1}


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.text("xyz", min_size=1, max_size=6), st.booleans()), max_size=40
    )
)
def test_both_indexes_agree_and_keep_their_bounds(history: list[tuple[str, str, bool]]) -> None:
    known = PrefixMap(500, max_keys=4)
    for replica, text, is_gone in history:
        prefixes = chain(text)
        if is_gone:
            known.forget(replica)
        else:
            known.note(replica, prefixes, ends(prefixes))
            assert known.held(replica, prefixes) >= min(len(prefixes), 4)
        found = known.matches(prefixes)
        assert found == {r: n for r in "abc" if (n := known.held(r, prefixes))}
