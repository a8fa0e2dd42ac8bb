"""A client that comes back: scripts that find, move and continue its request, and the replica's side of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.workers.serving import Cell, now_ms, serving
from tests.workers.waiting import until
from workers import scripts
from workers.contract import FinishReason, encode
from workers.engine.base import EngineProfile
from workers.leases import Claim, Leases

SLOW = EngineProfile(engine="toy", toy_step_ms=5, max_model_len=512)
NOTE = "cs:ab12"
ADMISSION_MS = 5_000


@pytest.fixture
def cell(redis_url: str) -> Iterator[Cell]:
    made = Cell(redis_url)
    yield made
    made.close()


def attach(
    cell: Cell,
    request: str,
    *,
    gateway: str = "g2",
    stream: int = 99,
    project: str = "p1",
    digest: str = "ab12",
) -> list[Any]:
    return list(
        cell.run(
            scripts.ATTACH,
            cell.keys.prefix,
            now_ms(),
            request,
            project,
            digest,
            gateway,
            stream,
            ADMISSION_MS,
        )
    )


def continue_(cell: Cell, first: str, last: str, new: str, *, journal: str = "", rest: bytes = b"") -> bytes:
    args = (first, last, new, journal, 1 if journal else 0, rest, 60_000, ADMISSION_MS)
    return bytes(cell.run(scripts.CONTINUE, cell.keys.prefix, now_ms(), *args))


def texts(cell: Cell, stream: int) -> str:
    cell.listen()
    return "".join(entry.text for entry in cell.frames if entry.stream == stream)


def settle(cell: Cell, request: str) -> None:
    cell.run(scripts.SETTLE, cell.keys.prefix, now_ms(), request, 0, 0, 0, 60_000)


# -- attach


def test_stranger_and_unknown_look_the_same(cell: Cell) -> None:
    request = cell.admit(note=NOTE)
    assert attach(cell, request, project="p2") == [b"unknown"]
    assert attach(cell, "f" * 32) == [b"unknown"]
    assert cell.r.hget(cell.keys.request(request), "gw") == b"g1", "and nothing was moved"


def test_another_body_is_told_apart_and_none_is_not_asked_for(cell: Cell) -> None:
    request = cell.admit(note=NOTE)
    assert attach(cell, request, digest="ab13") == [b"differs"]
    assert attach(cell, request, digest="")[0] == b"queued"


def test_waiting_request_is_bound_for_whoever_attached_last(cell: Cell) -> None:
    request = cell.admit(note=NOTE)
    assert attach(cell, request)[8:10] == [b"g1", b"1"], "who had it before"
    assert attach(cell, request, gateway="g3", stream=7)[8:10] == [b"g2", b"99"]
    cell.enrol("r1")
    lease = cell.lease(request)
    assert (lease[b"gw"], lease[b"stream"]) == (b"g3", b"7")


def test_late_cancel_of_the_gateway_before_changes_nothing(cell: Cell) -> None:
    cell.enrol("r1")
    request = cell.admit(note=NOTE)
    attach(cell, request)
    cancel = (scripts.CANCEL, cell.keys.prefix, now_ms(), request)
    assert cell.run(*cancel, "g1", 1) == b"moved"
    assert b"cancel" not in cell.lease(request)
    assert cell.run(*cancel, "g2", 98) == b"moved"
    assert cell.run(*cancel, "g2", 99) == b"bound"
    assert cell.lease(request)[b"cancel"] == b"1"
    assert attach(cell, request)[0] == b"ending"


def test_cancelled_in_the_queue_is_ending_until_it_is_settled(cell: Cell) -> None:
    request = cell.admit(note=NOTE)
    assert cell.run(scripts.CANCEL, cell.keys.prefix, now_ms(), request, "g1", 1) == b"queued"
    assert attach(cell, request)[0] == b"ending"
    settle(cell, request)
    answer = attach(cell, request)
    assert (answer[0], answer[4]) == (b"done", b""), "it was never on a machine"


# -- idempotency keys


def take(cell: Cell, request: str, at_ms: int = 0, project: str = "p1") -> list[Any]:
    args = (project, "d1g2e3", request, 60_000, ADMISSION_MS)
    return list(cell.run(scripts.IDEM, cell.keys.prefix, at_ms or now_ms(), *args))


def test_key_is_taken_once_and_a_crash_before_admission_heals(cell: Cell) -> None:
    at_ms = now_ms()
    assert take(cell, "a", at_ms) == [b"taken"]
    assert take(cell, "b", at_ms + 1_000) == [b"busy", ADMISSION_MS - 1_000]
    assert take(cell, "b", at_ms, project="p2") == [b"taken"], "another project's keys are its own"
    assert take(cell, "b", at_ms + ADMISSION_MS) == [b"taken"]
    cell.admit(note=NOTE, request="b")
    assert take(cell, "c", at_ms + 10 * ADMISSION_MS) == [b"known", b"b"]


def test_refused_admission_frees_its_own_key_only(cell: Cell) -> None:
    take(cell, "a")
    cell.run(scripts.RETRACT, cell.keys.prefix, "b", "p1", "d1g2e3", "")
    assert take(cell, "b")[0] == b"busy"
    cell.run(scripts.RETRACT, cell.keys.prefix, "a", "p1", "d1g2e3", "")
    assert take(cell, "b") == [b"taken"]


# -- continuing


def test_one_continuation_wins_and_one_that_never_was_admitted_does_not_count(cell: Cell) -> None:
    first = cell.admit(note=NOTE)
    cell.run(scripts.CANCEL, cell.keys.prefix, now_ms(), first)
    settle(cell, first)
    assert continue_(cell, first, first, "n1") == b"ok"
    assert continue_(cell, first, first, "n2") == b"busy"
    assert attach(cell, first) == [b"busy"]
    cell.r.hset(cell.keys.request(first), "next_ms", now_ms() - ADMISSION_MS)
    assert attach(cell, first)[:2] == [b"done", first.encode()], (
        "its gateway died: the one before counts again"
    )
    assert continue_(cell, first, first, "n3") == b"ok"
    cell.admit(note=NOTE, request="n3")
    assert attach(cell, first)[:2] == [b"queued", b"n3"]
    cell.r.hset(cell.keys.request(first), "next_ms", 0)
    assert continue_(cell, first, first, "n4") == b"busy"


def test_retracting_leads_back_to_the_one_before(cell: Cell) -> None:
    first = cell.admit(note=NOTE)
    settle(cell, first)
    for last, new in ((first, "n1"), ("n1", "n2")):
        assert continue_(cell, first, last, new) == b"ok"
        if new == "n1":
            cell.admit(note=NOTE, request=new)
            settle(cell, new)
    cell.run(scripts.RETRACT, cell.keys.prefix, "n2", "p1", "", first)
    assert attach(cell, first)[:2] == [b"done", b"n1"]
    assert continue_(cell, first, "n1", "n3") == b"ok"
    cell.run(scripts.RETRACT, cell.keys.prefix, "n2", "p1", "", first)
    assert attach(cell, first) == [b"busy"], "a late retraction of another changes nothing"


def test_journal_that_is_carried_lives_as_long_as_its_request(cell: Cell) -> None:
    """A copy for an admission that never comes leaves nothing; an admitted one must not expire under its writer."""
    first = cell.admit(note=NOTE)
    source = cell.keys.machine("m9").journal(first)
    cell.r.rpush(source, b"entry", b"entry and end")
    assert continue_(cell, first, first, "n1", journal=source, rest=b"entry without end") == b"ok"
    assert cell.r.lrange(cell.keys.journal("n1"), 0, -1) == [b"entry", b"entry without end"]
    assert 0 < cell.r.pttl(cell.keys.journal("n1")) <= 10 * ADMISSION_MS
    cell.admit(note=NOTE, request="n1", n_carried=2)
    assert cell.r.pttl(cell.keys.journal("n1")) > 60 * 60 * 1000
    cell.enrol("r1")
    assert cell.r.pttl(cell.keys.machine("m1").journal("n1")) > 60 * 60 * 1000
    cell.r.rpush(cell.keys.journal("n2"), b"entry")
    cell.r.pexpire(cell.keys.journal("n2"), 1_000)
    cell.admit(note=NOTE, request="n2", n_carried=1)
    assert cell.r.pttl(cell.keys.machine("m1").journal("n2")) == -1
    with pytest.raises(AssertionError, match="gone"):
        cell.admit(note=NOTE, request="n3", n_carried=1)
    assert not cell.r.exists(cell.keys.body("n3"))


# -- the replica


@pytest.mark.parametrize("told_by", ["channel", "flush"])
async def test_moved_stream_goes_on_at_the_other_gateway_without_a_gap(
    cell: Cell, tmp_path: Path, told_by: str
) -> None:
    async with serving(cell, tmp_path, profile=SLOW) as front:
        request = cell.admit(note=NOTE, max_tokens=120, sampling={"ignore_eos": True})
        task = front.deliver(request)
        await until(lambda: cell.stream(request), "the first token")
        if told_by == "channel":
            assert attach(cell, request)[0] == b"running"
        else:
            lease = cell.keys.machine("m1").lease(request)
            cell.r.hset(lease, mapping={"gw": "g2", "stream": 99, "moved": 1, "open": ""})
        await task
        undisturbed = cell.admit(max_tokens=120, sampling={"ignore_eos": True})
        await front.deliver(undisturbed)
        cell.listen()
        ours = sorted((e for e in cell.frames if e.stream in (1, 99)), key=lambda e: e.offset)
        assert "".join(e.text for e in ours) == cell.text(undisturbed)
        assert {e.stream for e in ours} == {1, 99}
        assert ours[-1].stream == 99
        assert ours[-1].end
        assert b"moved" not in cell.lease(request)
        assert (front.server.n_running, len(cell.usage())) == (0, 2)


async def test_plain_answer_that_is_flushed_only_at_its_end_goes_to_who_waits_then(
    cell: Cell, tmp_path: Path
) -> None:
    async with serving(cell, tmp_path, profile=SLOW) as front:
        request = cell.admit(note="cpk:ab12", max_tokens=40, stream=False, sampling={"ignore_eos": True})
        task = front.deliver(request)
        await until(lambda: front.server.n_running, "the claim")
        await until(lambda: cell.lease(request)[b"state"] == b"claimed", "the claim")
        assert attach(cell, request)[0] == b"running"
        await task
        assert len(cell.journal(request)) == 1
        assert texts(cell, 99)
        assert not texts(cell, 1)


async def test_word_that_comes_before_the_claim_is_answered_is_kept(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(cell, tmp_path, profile=SLOW) as front:
        request = cell.admit(note="cpk:ab12", max_tokens=20, stream=False)
        claim = Leases.claim

        async def slow_answer(self: Leases, request_id: str, epoch: int) -> Claim:
            claimed = await claim(self, request_id, epoch)
            attach(cell, request)
            front.server.moved(request)
            cell.r.hdel(cell.keys.machine("m1").lease(request), "moved")
            return claimed

        monkeypatch.setattr(Leases, "claim", slow_answer)
        await front.deliver(request)
        assert texts(cell, 99)
        assert not texts(cell, 1)


async def test_cancel_outlives_the_replica_that_was_told(cell: Cell, tmp_path: Path) -> None:
    """Its replica dies before it has ended: whoever gets it next ends it, and serves it to nobody."""
    async with serving(cell, tmp_path, profile=SLOW) as first:
        request = cell.admit(note=NOTE, max_tokens=200, sampling={"ignore_eos": True})
        first.deliver(request)
        await until(lambda: cell.stream(request), "the first token")
        cell.r.hset(
            cell.keys.request(request), "cancel", 1
        )  # as cancel.lua does; the lease dies with the replica
        cell.withdraw("r1")
    n = int(cell.r.hget(cell.keys.request(request), "n") or 0)
    assert attach(cell, request)[0] == b"ending"
    async with serving(cell, tmp_path, replica="r2", machine="m2") as second:
        await second.deliver(request, 2)
        end = cell.journal(request, "m2")[-1].end
        assert end
        assert (end.reason, end.n_completion) == (FinishReason.ABORT, n)


def seed(cell: Cell, request: str, of: str) -> tuple[int, str]:
    """The journal of a request as continue.lua leaves it: the first half of an ended one (tokens, text)."""
    journal = cell.journal(of)
    entries = journal[: max(1, len(journal) // 2)]
    for entry in entries:
        cell.r.rpush(f"{cell.keys.prefix}jrn:{request}", encode(entry))
    return sum(len(e.token_ids) for e in entries), "".join(e.text for e in entries)


@pytest.mark.parametrize("waits", [False, True])
async def test_continuation_ends_the_same_text_and_bills_only_what_is_new(
    cell: Cell, tmp_path: Path, waits: bool
) -> None:
    async with serving(cell, tmp_path, profile=SLOW, enrol=False) as front:
        cell.enrol("r1", slots=1 if waits else 2)
        whole = cell.admit(max_tokens=60, sampling={"ignore_eos": True})
        await front.deliver(whole)
        continued = "c" * 32
        n, text = seed(cell, continued, whole)
        n_prompt = cell.end(whole).n_prompt
        cell.admit(
            request=continued, max_tokens=60, hold=60 - n, n_carried=n, n_carried_prompt=n_prompt,
            sampling={"ignore_eos": True}, continues=whole,
        )  # fmt: skip
        if waits:
            assert cell.epoch(continued) == 0
            settle(cell, whole)
        await front.deliver(continued)
        entries = cell.journal(continued)
        assert "".join(e.text for e in entries) == cell.text(whole)
        assert 0 < n < 60
        assert text and "".join(e.text for e in entries).startswith(text)
        end = entries[-1].end
        assert end
        assert (end.reason, end.n_prompt, end.n_completion) == (FinishReason.LENGTH, n_prompt, 60)
        usage = {event.request_id: event for event in cell.usage()}[continued]
        assert (usage.n_prompt, usage.n_cached, usage.n_completion) == (0, 0, 60 - n)


async def test_what_cannot_be_continued_exactly_is_refused_and_free(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path) as front:
        whole = cell.admit(max_tokens=60, sampling={"ignore_eos": True})
        await front.deliver(whole)
        continued = "c" * 32
        n, _ = seed(cell, continued, whole)
        cell.admit(
            request=continued, max_tokens=60, hold=60 - n, n_carried=n, n_carried_prompt=cell.end(whole).n_prompt,
            sampling={"presence_penalty": 0.5, "repetition_penalty": 1.2},
        )  # fmt: skip
        await front.deliver(continued)
        end = cell.journal(continued)[-1].end
        assert end
        assert end.error
        assert (end.error.status, end.error.code) == (409, "cannot_continue")
        assert "presence_penalty" in end.error.message
        usage = {event.request_id: event for event in cell.usage()}[continued]
        assert (usage.n_prompt, usage.n_completion) == (0, 0)
