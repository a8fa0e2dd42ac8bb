"""The model-cache bench: its replay keeps what runs, and its optimum is one."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import modelcache
from benchmarks.modelcache import Request, best_hits, fitted, lru, ours, play


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 5), st.integers(0, 4), st.floats(0, 20)), min_size=1, max_size=40),
    st.lists(st.integers(1, 9), min_size=5, max_size=5),
    st.sampled_from([ours, lru]),
)
def test_what_runs_stays_and_nobody_waits_for_ever(rows, gigabytes, policy) -> None:  # type: ignore[no-untyped-def]
    ats = itertools.accumulate(gap for gap, _, _ in rows)
    requests = [Request(at, model, run) for at, (_, model, run) in zip(ats, rows, strict=True)]
    sizes = [gb * 10**9 for gb in gigabytes]
    result = play(requests, sizes, max(sizes) + 3 * 10**9, policy)
    assert result.n_running_evicted == 0
    assert result.n_fetched >= len({r.model for r in requests})


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=14))
def test_the_optimum_is_what_trying_everything_finds(models: list[int]) -> None:
    def least_misses(at: int, there: frozenset[int]) -> int:
        if at == len(models):
            return 0
        if models[at] in there:
            return least_misses(at + 1, there)
        stays = [there] if len(there) < 2 else [there - {m} for m in there]
        return 1 + min(least_misses(at + 1, kept | {models[at]}) for kept in stays)

    requests = [Request(float(n), m, 0.0) for n, m in enumerate(models)]
    before = modelcache.SETTLES
    modelcache.SETTLES = 0  # type: ignore[misc]
    try:
        found = best_hits(requests, [1] * 5, 2)
    finally:
        modelcache.SETTLES = before  # type: ignore[misc]
    assert round((1 - found) * len(models)) == least_misses(0, frozenset())


def test_the_law_has_the_traces_popularity_and_locality() -> None:
    day = fitted(3)
    share = sum(r.model == 0 for r in day) / len(day)
    repeats = sum(a.model == b.model for a, b in itertools.pairwise(day)) / len(day)
    assert abs(share - 0.359) < 0.05
    assert abs(repeats - 0.304) < 0.03
