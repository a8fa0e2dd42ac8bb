"""Beginnings of prompts, and what a replica remembers of them."""

from hypothesis import given
from hypothesis import strategies as st

from controlplane.policy import prefix
from controlplane.policy.prefix import PrefixIndex


def test_short_prompts_have_none_and_long_ones_few() -> None:
    assert prefix.hashes("o1", b"x" * 255) == ()
    assert len(prefix.hashes("o1", b"x" * 256)) == 1
    assert len(prefix.hashes("o1", b"x" * 50_000)) == 8
    assert len(prefix.hashes("o1", b"x" * 10_000_000)) == 10
    assert {len(found) for found in prefix.hashes("o1", b"x" * 50_000)} == {8}


@given(st.binary(min_size=1, max_size=3_000), st.binary(max_size=600), st.binary(max_size=600))
def test_prompts_share_exactly_the_hashes_of_what_they_share(common: bytes, one: bytes, other: bytes) -> None:
    a, b = prefix.hashes("o1", common + b"1" + one), prefix.hashes("o1", common + b"2" + other)
    n_shared = len(prefix.hashes("o1", common))
    assert a[:n_shared] == b[:n_shared]
    assert not set(a[n_shared:]) & set(b[n_shared:])


def test_tenants_share_none() -> None:
    assert not set(prefix.hashes("o1", b"x" * 4_000)) & set(prefix.hashes("o2", b"x" * 4_000))


def test_the_index_knows_the_longest_and_forgets_the_least_recently_used() -> None:
    index = PrefixIndex()
    index.note(("a", "b"), 1)
    assert index.longest(("a", "b", "c")) == 2
    assert index.longest(("x",)) == 0
    for n in range(prefix.MAX_PER_REPLICA - 1):
        index.note((f"n{n}",), 2 + n)
    assert index.longest(("a",)) == 0, "of two used at once the first by name goes"
    assert index.longest(("b",)) == 1
    assert len(index.items()) == prefix.MAX_PER_REPLICA


def test_cached_tokens_double_with_each_prefix_and_never_exceed_the_prompt() -> None:
    assert [prefix.cached_tokens(n, 10_000) for n in range(5)] == [0, 64, 128, 256, 512]
    assert prefix.cached_tokens(5, 700) == 700


def test_fine_hashes_hold_the_coarse_ones_and_end_where_the_rungs_say() -> None:
    text = bytes(range(256)) * 600
    for length in (0, 255, 256, 511, 512, 768, 5_000, 131_072, len(text)):
        fine = prefix.fine_hashes("org", text[:length])
        assert prefix.coarse(fine) == prefix.hashes("org", text[:length])
        assert len(fine) == min(len(prefix.rungs(length // prefix.FIRST_BYTES)), 18)
    at = prefix.rungs(40).index(12)
    fine = prefix.fine_hashes("org", text)
    other = bytearray(text)
    other[12 * 256] ^= 1  # the first byte behind the rung
    assert prefix.fine_hashes("org", bytes(other))[: at + 2] == (
        *fine[: at + 1],
        prefix.fine_hashes("org", bytes(other))[at + 1],
    )
    assert prefix.fine_hashes("org", bytes(other))[at + 1] != fine[at + 1]
    assert prefix.fine_hashes("other", text)[0] != fine[0]


def test_rungs_grow_by_half_at_most() -> None:
    assert prefix.rungs(0) == ()
    assert prefix.rungs(40) == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
