"""Replicas that only take what would wait too long: when they do, whom they take, and what they are never given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from controlplane.policy.flows import ANY_MS
from tests.workers.serving import GATEWAY, NO_LIMIT, Cell, now_ms
from workers import scripts
from workers.contract import decode_error

AFTER_MS = 500


@pytest.fixture
def cell(redis_url: str) -> Iterator[Cell]:
    made = Cell(redis_url)
    made.add_machine("m1")
    yield made
    made.close()


def enrol(cell: Cell, replica: str, slots: int, role: str = "", after_ms: int = AFTER_MS) -> int:
    extra = (0, role, after_ms, 1) if role else ()
    return int(cell.run(scripts.ENROL, "t0:", now_ms(), replica, "m1", "d1", slots, *extra))


def admit(
    cell: Cell, n: int, *, at_ms: int = 0, bound: int = 100, most_ahead_ms: int = ANY_MS, org: str = "o1",
    candidates: tuple[str, ...] = (), n_carried: int = 0,
) -> Any:  # fmt: skip
    request = f"{n:032x}"
    cell.r.set(cell.keys.body(request), b"body")
    if n_carried:
        cell.r.rpush(cell.keys.journal(request), b"entry")
    scopes: list[Any] = []
    for scope in ("k" + org, "p" + org, org):
        scopes += [scope, *[NO_LIMIT] * 5, 100]
    at_ms = at_ms or now_ms()
    return cell.run(
        scripts.ADMIT, "t0:", at_ms, request, "d1", GATEWAY, n, "pv1", 10, 10, 0, at_ms, bound, 0, 0, "cs:",
        n_carried, *scopes, 0, 10, "", 0, 60_000, 0, 1_000, most_ahead_ms, 0, *candidates,
    )  # fmt: skip


def where(cell: Cell, n: int) -> str:
    return (cell.r.hget(cell.keys.request(f"{n:032x}"), "rid") or b"").decode()


def spill(cell: Cell, at_ms: int = 0) -> int:
    return int(cell.run(scripts.SPILL, "t0:", at_ms or now_ms(), "d1"))


def settle(cell: Cell, n: int) -> None:
    cell.run(scripts.SETTLE, "t0:", now_ms(), f"{n:032x}", 5, 5, 0, 60_000, 0)


def test_nothing_overflows_while_the_others_are_in_time(cell: Cell) -> None:
    enrol(cell, "r1", 1)
    enrol(cell, "u1", 4, "overflow")
    start_ms = now_ms()
    assert admit(cell, 1, candidates=("r1",))[0] == b"bound"
    assert [admit(cell, n, at_ms=start_ms)[0] for n in (2, 3)] == [b"queued"] * 2
    assert spill(cell, start_ms + AFTER_MS - 1) == 0
    settle(cell, 1)
    assert (where(cell, 2), where(cell, 3)) == ("r1", "")
    assert spill(cell, start_ms + AFTER_MS) == 1
    assert where(cell, 3) == "u1"


def test_what_would_be_refused_overflows_instead(cell: Cell) -> None:
    enrol(cell, "r1", 1)
    admit(cell, 1, candidates=("r1",))
    admit(cell, 2)
    assert admit(cell, 3, most_ahead_ms=10)[0] == b"late"
    assert admit(cell, 4, bound=1)[0] == b"full"
    enrol(cell, "u1", 2, "overflow")
    late, full = admit(cell, 5, most_ahead_ms=10), admit(cell, 6, bound=1)
    assert (late[0], late[2], full[0], full[2]) == (b"bound", b"u1", b"bound", b"u1")
    assert admit(cell, 7, most_ahead_ms=10)[0] == b"late"  # it is full, too
    assert cell.r.scard(cell.keys.replica_live("u1")) == 2


def test_what_is_hopeless_goes_nowhere_else(cell: Cell) -> None:
    """Slots are free, and what waits for its first token behind them makes it late (gateway/forecasts.py)."""
    enrol(cell, "r1", 4)
    assert admit(cell, 1, most_ahead_ms=-2, candidates=("r1",))[0] == b"late"
    assert admit(cell, 2, most_ahead_ms=-2, bound=0)[0] == b"late"
    assert cell.r.exists(cell.keys.body(f"{1:032x}"), cell.keys.request(f"{1:032x}")) == 0
    enrol(cell, "u1", 1, "overflow")
    taken = admit(cell, 3, most_ahead_ms=-2, candidates=("r1",))
    assert (taken[0], taken[2]) == (b"bound", b"u1")
    assert admit(cell, 4, most_ahead_ms=-2, candidates=("r1",))[0] == b"late"  # it is full, too
    # A free slot is given all the same.
    assert admit(cell, 5, most_ahead_ms=-1, candidates=("r1",))[2] == b"r1"


def test_where_nobody_else_is_it_takes_all_and_still_wakes_the_others(cell: Cell) -> None:
    heard = cell.r.pubsub(ignore_subscribe_messages=True)
    heard.subscribe(cell.keys.wake_channel)
    heard.get_message(timeout=1)
    enrol(cell, "u1", 1, "overflow", after_ms=60_000)
    assert [admit(cell, n)[0] for n in (1, 2)] == [b"bound", b"queued"]
    assert [m["data"] for _ in range(9) if (m := heard.get_message(timeout=0.01))] == [b"d1", b"d1"]
    settle(cell, 1)
    assert where(cell, 2) == "u1"
    heard.close()


def test_who_overflows_is_decided_by_the_fair_order(cell: Cell) -> None:
    enrol(cell, "r1", 1)
    admit(cell, 1, candidates=("r1",))
    start_ms = now_ms()
    for n in range(10, 16):
        admit(cell, n, at_ms=start_ms, org="greedy")
    admit(cell, 20, at_ms=start_ms + 400, org="modest")
    enrol(cell, "u1", 2, "overflow")
    assert spill(cell, start_ms + AFTER_MS) == 2
    assert where(cell, 20) == "u1"  # it has not waited so long itself, but it is its turn
    assert sum(where(cell, n) == "u1" for n in range(10, 16)) == 1


@pytest.mark.parametrize("role", ["overflow", "replica"])
def test_it_continues_nothing(cell: Cell, role: str) -> None:
    """What was begun on a replica waits for one; what it began itself ends with a word."""
    enrol(cell, "r1", 1)
    admit(cell, 1, candidates=("r1",))
    lease = cell.keys.machine("m1").lease(f"{1:032x}")
    cell.r.hset(lease, mapping={"state": "claimed", "n": 3})
    enrol(cell, "u1", 4, role)
    cell.withdraw("r1")
    assert where(cell, 1) == ""
    admit(cell, 2, candidates=("u1",))
    spill(cell)
    assert (where(cell, 1), where(cell, 2)) == ("", "u1")
    cell.r.hset(cell.keys.machine("m1").lease(f"{2:032x}"), mapping={"state": "claimed", "n": 2})
    assert cell.withdraw("u1")[2] == 1
    error = decode_error(cell.r.hget(cell.keys.request(f"{2:032x}"), "error"))
    assert (error.status, error.code) == (503, "cannot_continue")
    enrol(cell, "r2", 1)
    assert where(cell, 1) == "r2"


def test_a_continued_request_is_not_given_to_it(cell: Cell) -> None:
    enrol(cell, "u1", 4, "overflow")
    assert admit(cell, 1, n_carried=3)[0] == b"queued"


def test_one_that_fails_is_given_nothing(cell: Cell) -> None:
    enrol(cell, "u1", 4, "overflow")
    cell.run(scripts.RESIZE, "t0:", now_ms(), "u1", 4, 0, "open upstream_timeout")
    assert admit(cell, 1)[0] == b"queued"
    cell.run(scripts.RESIZE, "t0:", now_ms(), "u1", 0, 1, "half_open upstream_timeout")
    assert (spill(cell), where(cell, 1)) == (1, "u1")
    cell.withdraw("u1", "drain")
    assert cell.r.exists(cell.keys.overflow("d1")) == 0
