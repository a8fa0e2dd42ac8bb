"""What leaves a full cache: the least missed per byte, and never what runs."""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.workers.modelcache.test_remote import _manifest
from workers.modelcache.eviction import HALF_LIFE_S, Held, Use, faded, victims, worth_per_byte
from workers.modelcache.store import ModelStore, ModelStoreError
from workers.modelcache.uses import Claim

NOW_S = 1e6


def _held(
    digest: str, size: int, score: float, *, age_s: float = 0.0, in_use: bool = False, fetch_s: float = 0
) -> Held:
    return Held(digest, size, Use(score, NOW_S - age_s, fetch_s), in_use)


def test_the_least_wanted_per_byte_goes_first() -> None:
    held = [_held("often", 100, 9), _held("once", 100, 1), _held("large", 10_000, 3)]
    assert victims(held, 100, NOW_S) == ("large",)
    assert victims(held[:2], 100, NOW_S) == ("once",)


def test_what_takes_long_to_fetch_stays() -> None:
    assert victims([_held("far", 100, 1, fetch_s=60), _held("near", 100, 1, fetch_s=2)], 50, NOW_S) == (
        "near",
    )


def test_popularity_fades() -> None:
    old = _held("old", 100, 4, age_s=3 * HALF_LIFE_S)
    assert faded(old.use, NOW_S) == pytest.approx(0.5)
    assert victims([old, _held("new", 100, 1)], 50, NOW_S) == ("old",)


def test_nothing_is_taken_when_it_would_not_suffice() -> None:
    assert victims([_held("a", 100, 1), _held("runs", 10_000, 0, in_use=True)], 200, NOW_S) is None


@given(
    st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 50), st.booleans()), max_size=12),
    st.integers(0, 3000),
)
def test_enough_is_freed_no_more_than_needed_and_never_what_runs(
    rows: list[tuple[int, float, bool]], n_bytes: int
) -> None:
    held = [_held(f"{n:02}", size, score, in_use=used) for n, (size, score, used) in enumerate(rows)]
    sizes = {h.digest: h.size_bytes for h in held}
    chosen = victims(held, n_bytes, NOW_S)
    if chosen is None:
        assert sum(h.size_bytes for h in held if not h.in_use) < n_bytes
        return
    freed = sum(sizes[d] for d in chosen)
    assert freed >= n_bytes
    assert not {h.digest for h in held if h.in_use} & set(chosen)
    assert all(freed - sizes[d] < n_bytes for d in chosen), "one of them need not have gone"


def test_a_use_counts_and_fades() -> None:
    use = Use().seen(0.0).seen(HALF_LIFE_S)
    assert use.score == pytest.approx(1.5)
    assert worth_per_byte(Held("a", 0, use), HALF_LIFE_S, 1e6) > 0


# -- the store


def _version(store: ModelStore, fill: int, n_bytes: int = 1000) -> str:
    files = {"model.safetensors": bytes([fill]) * n_bytes}
    manifest = _manifest(files)
    with store.incoming("x") as staging:
        for name, data in files.items():
            (staging / name).write_bytes(data)
        store.adopt(staging, manifest)
    return manifest.digest


def _claim_and_wait(root: Path, digest: str, pipe: object) -> None:
    ModelStore(root).claim(digest)
    pipe.send("claimed")  # type: ignore[attr-defined]
    time.sleep(60)


def test_a_full_cache_makes_room_but_not_of_what_another_process_runs(tmp_path: Path) -> None:
    origin, store = ModelStore(tmp_path / "origin"), ModelStore(tmp_path / "cache", budget_bytes=2500)
    a, b, c = (_version(origin, n) for n in (1, 2, 3))
    source = origin.root.as_uri()
    _, claim = store.acquire(a, source)
    claim.close()
    _, claim = store.acquire(a, source)  # wanted twice
    claim.close()
    store.acquire(b, source)[1].close()
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    other = multiprocessing.get_context("fork").Process(target=_claim_and_wait, args=(store.root, b, theirs))
    other.start()
    assert ours.recv() == "claimed"
    store.acquire(c, source)[1].close()
    assert set(store.digests()) == {b, c}, "b is wanted less than a, but it runs"
    assert not store.evict(b)
    other.kill()
    other.join(10)
    assert store.evict(b)
    assert store.digests() == [c]


def test_a_cache_full_of_what_runs_says_so(tmp_path: Path) -> None:
    origin, store = ModelStore(tmp_path / "origin"), ModelStore(tmp_path / "cache", budget_bytes=1500)
    a, b = _version(origin, 1), _version(origin, 2)
    _, claim = store.acquire(a, origin.root.as_uri())
    with pytest.raises(ModelStoreError, match="in use") as caught:
        store.ensure(b, origin.root.as_uri())
    assert caught.value.code == "disk_full"
    claim.close()
    store.ensure(b, origin.root.as_uri())
    assert store.digests() == [b]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["use", "end", "evict"]), st.integers(0, 5)), min_size=16, max_size=24
    )
)
def test_whatever_happens_what_runs_stays_whole(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    """Six versions of different sizes, room for about three, used and ended and evicted in any order."""
    root = tmp_path_factory.mktemp("cache")
    origin, store = ModelStore(root / "origin"), ModelStore(root / "cache", budget_bytes=3600)
    sizes = [400, 900, 1300, 1000, 1900, 700]
    digests = [_version(origin, n, size) for n, size in enumerate(sizes)]
    running: dict[int, list[Claim]] = {}
    for step, n in steps:
        if step == "use":
            try:
                claim = store.acquire(digests[n], origin.root.as_uri())[1]
            except ModelStoreError as error:
                assert error.code == "disk_full"
                lacking = sum(sizes[m] for m in running) + sizes[n] - 3600
                assert n not in running and lacking > 0, "there was room among what does not run"
            else:
                running.setdefault(n, []).append(claim)
        elif step == "end" and n in running:
            running[n].pop().close()
            if not running[n]:
                del running[n]
        elif step == "evict":
            was_there = store.has(digests[n])
            assert store.evict(digests[n]) == (n not in running)
            assert not was_there or store.has(digests[n]) == (n in running)
        for m in running:
            store.verify(digests[m])
        assert sum(h.size_bytes for h in store.held()) <= 3600
    for claims in running.values():
        for claim in claims:
            claim.close()


def test_users_of_many_threads_never_lose_what_they_use(tmp_path: Path) -> None:
    origin, store = ModelStore(tmp_path / "origin"), ModelStore(tmp_path / "cache", budget_bytes=3500)
    digests = [_version(origin, n) for n in range(6)]
    wrong: list[str] = []

    def use(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(25):
            digest = dice.choice(digests)
            try:
                path, claim = store.acquire(digest, origin.root.as_uri())
            except ModelStoreError as error:
                if error.code != "disk_full":  # all of it runs just now
                    wrong.append(str(error))
                continue
            except Exception as error:
                wrong.append(repr(error))
                continue
            if not store.has(digest) or len((path / "model.safetensors").read_bytes()) != 1000:
                wrong.append(digest)
            claim.close()

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
