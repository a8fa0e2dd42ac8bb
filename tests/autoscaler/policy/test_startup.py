"""Startup-time placement: the paper's kind of examples, queues, siblings, moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.policy.startup import (
    Host,
    Link,
    Running,
    Start,
    Tier,
    Yard,
    measured,
    place,
    place_all,
    starts,
)

GB = 10**9
SIZES = {"small": 16 * GB, "large": 64 * GB}


def _host(name: str, n_free: int = 1, **overrides: object) -> Host:
    """PCIe 20 GB/s, NVMe 4 GB/s, network 1 GB/s, engine 2 s."""
    host = Host(name, n_free, 2.0, Link(20 * GB), Link(4 * GB), Link(1 * GB))
    return replace(host, **overrides)  # type: ignore[arg-type]


def _yard(*hosts: Host, **overrides: object) -> Yard:
    return replace(Yard({h.id: h for h in hosts}, Link(5 * GB), SIZES), **overrides)  # type: ignore[arg-type]


def test_each_tier_takes_what_its_link_takes() -> None:
    near = _host("a", in_ram=frozenset({"small"}), on_disk=frozenset({"small"}))
    yard = _yard(near, _host("b", on_disk=frozenset({"small"})))
    by_tier = {s.tier: s.seconds for s in starts(yard, "small", near)}
    assert by_tier == {Tier.RAM: 0.8 + 2, Tier.DISK: 4 + 2, Tier.SIBLING: 16 + 2, Tier.STORE: 16 + 2}
    assert [s.tier for s in starts(yard, "small", near)] == list(Tier), "of equals the nearer one"


def test_locality_wins_while_its_queue_is_short_and_no_longer() -> None:
    """Weights in memory beat weights on disk, until what is loading there already takes longer than the disk."""
    warm, cold = _host("warm", in_ram=frozenset({"small"})), _host("cold", on_disk=frozenset({"small"}))
    assert place(_yard(warm, cold), "small") == Start("warm", Tier.RAM, 2.8)
    busy = replace(warm, ram=Link(20 * GB, queued_bytes=80 * GB))
    assert place(_yard(busy, cold), "small") == Start("cold", Tier.DISK, 6.0)


def test_loads_at_once_spread_over_links() -> None:
    hosts = [_host(n, 4, on_disk=frozenset({"large"})) for n in ("a", "b")]
    placed, yard = place_all(_yard(*hosts), ["large"] * 4)
    assert [(s.host, s.seconds) for s in placed if s] == [("a", 18), ("b", 18), ("a", 34), ("b", 34)]
    assert [h.n_free for h in yard.hosts.values()] == [2, 2]


def test_the_object_store_is_shared_by_all_who_ask_it() -> None:
    hosts = [_host(n, nic=Link(10 * GB)) for n in "abc"]
    placed, _ = place_all(_yard(*hosts), ["large"] * 2)
    assert [(s.tier, s.host) for s in placed if s] == [(Tier.STORE, "a"), (Tier.STORE, "b")]
    assert [s.seconds for s in placed if s] == pytest.approx([64 / 5 + 2, 2 * 64 / 5 + 2])


def test_a_sibling_serves_what_the_store_serves_slower() -> None:
    holder = _host("a", 0, in_ram=frozenset({"large"}), nic=Link(10 * GB))
    yard = _yard(holder, _host("b", nic=Link(10 * GB)))
    found = place(yard, "large")
    assert found == Start("b", Tier.SIBLING, 64 / 10 + 2, sibling="a")


def test_a_full_machine_gives_up_a_replica_where_that_is_quicker() -> None:
    """As in the paper: A's weights are where B runs, B's are in the memory of a free machine; B moves there."""
    full = _host("s2", 0, in_ram=frozenset({"large"}), running=(Running("rB", "small", 1000),))
    free = _host("s1", 1, in_ram=frozenset({"small"}))
    slow = replace(free, nic=Link(GB // 2))
    found = place(_yard(slow, full), "large")
    assert found is not None
    assert (found.host, found.move, found.move_to) == ("s2", "rB", "s1")
    assert found.seconds == pytest.approx((0.8 + 2) + 0.1 + (3.2 + 2))
    placed, yard = place_all(_yard(slow, full), ["large"])
    assert placed == (found,)
    assert (yard.hosts["s1"].n_free, yard.hosts["s2"].n_free, yard.hosts["s2"].running) == (0, 0, ())
    dear = replace(full, running=(Running("rB", "small", 2_000_000),))
    assert place(_yard(slow, dear), "large") == starts(_yard(slow, dear), "large", slow)[0]


def test_nowhere_is_a_result() -> None:
    assert place(_yard(_host("a", 0)), "small") is None
    assert place_all(_yard(), ["small"])[0] == (None,)


def test_bandwidth_follows_what_was_measured() -> None:
    link = Link(4 * GB)
    for _ in range(30):
        link = measured(link, 10 * GB, 10.0)
    assert link.bytes_per_s == pytest.approx(GB, rel=0.01)
    assert measured(link, 0, 1) == link
    with pytest.raises(ValueError, match="link"):
        Link(0)


@pytest.mark.parametrize(
    ("small_s", "large_s"), [(4.507, 20.008), (0.674, 3.234)], ids=["safetensors", "sllm"]
)
def test_one_model_s_load_foretells_another_s(small_s: float, large_s: float) -> None:
    """Median loads from disk of Llama-3.1-8B (16.06 GB) and Qwen3-32B (65.5 GB) on an H100 machine of 2025, as measured
    by ServerlessLLM (benchmarks/results of its repository, Apache-2.0)."""
    disk = Link(16.06 * GB / small_s)
    host = _host("h100", disk=disk, init_s=0.0, on_disk=frozenset({"large"}), ram=Link(1e15))
    (found,) = [
        s
        for s in starts(_yard(host, sizes={"large": round(65.5 * GB)}), "large", host)
        if s.tier is Tier.DISK
    ]
    assert found.seconds == pytest.approx(large_s, rel=0.16)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.booleans(), st.booleans(), st.floats(0, 100)), min_size=1, max_size=5
    )
)
def test_no_machine_with_room_would_start_sooner(drawn: list[tuple[int, bool, bool, float]]) -> None:
    hosts = [
        _host(
            f"h{i}",
            n_free,
            in_ram=frozenset({"small"} if ram else ()),
            on_disk=frozenset({"small"} if disk else ()),
            disk=Link(4 * GB, queued * GB),
        )
        for i, (n_free, ram, disk, queued) in enumerate(drawn)
    ]
    yard = _yard(*hosts)
    found = place(yard, "small")
    with_room = [h for h in hosts if h.n_free]
    assert (found is None) == (not with_room)
    if found is not None:
        assert yard.hosts[found.host].n_free
        assert found.seconds == min(s.seconds for h in with_room for s in starts(yard, "small", h))
