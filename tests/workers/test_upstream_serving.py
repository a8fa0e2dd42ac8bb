"""A replica whose engine is an endpoint elsewhere: journal, counts, ends and resumption, with the real scripts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workers.endpoints import Call, endpoint
from tests.workers.serving import Cell, serving
from tests.workers.waiting import until
from workers import sealed
from workers.contract import FinishReason


@pytest.fixture
def cell(redis_url: str) -> Iterator[Cell]:
    made = Cell(redis_url)
    yield made
    made.close()


async def well(call: Call) -> None:
    await call.words("badi", " hoga", " dete", " fike", n_prompt=11)


async def begins(call: Call) -> None:
    await call.head()
    await call.text("badi")
    await call.text(" hoga")
    await call.until_gone()


async def test_an_answer_is_journaled_and_metered_as_any_other(cell: Cell, tmp_path: Path) -> None:
    async with endpoint(well) as there, serving(cell, tmp_path, upstream=there.spec()) as front:
        request = cell.admit(max_tokens=20)
        await front.deliver(request)
        assert cell.text(request) == "badi hoga dete fike"
        end = cell.end(request)
        assert (end.reason, end.n_prompt, end.n_completion) == (FinishReason.STOP, 11, 4)
        [usage] = cell.usage()
        assert (usage.n_prompt, usage.n_completion, usage.counted_by) == (11, 4, "upstream")
        assert cell.lease(request)[b"state"] == b"done"
        assert "".join(entry.text for entry in cell.journal(request)) == "badi hoga dete fike"


async def test_a_prompt_is_not_counted_for_an_endpoint_that_only_answers(cell: Cell, tmp_path: Path) -> None:
    async with endpoint(well) as there, serving(cell, tmp_path, upstream=there.spec()) as front:
        request = cell.admit(max_tokens=0)
        await front.deliver(request)
        error = cell.end(request).error
        assert (error.status, error.code) == (501, "count_unavailable")
        assert there.calls == []
        [usage] = cell.usage()
        assert (usage.n_prompt, usage.n_completion, usage.status) == (0, 0, 501)


async def test_what_an_endpoint_says_of_the_prompt_is_bounded(cell: Cell, tmp_path: Path) -> None:
    async def boasts(call: Call) -> None:
        await call.words("badi", n_prompt=1_000_000)

    async with endpoint(boasts) as there, serving(cell, tmp_path, upstream=there.spec()) as front:
        request = cell.admit(payload=(body := b'{"messages":[{"role":"user","content":"hi"}]}'))
        await front.deliver(request)
        assert cell.end(request).n_prompt == len(body)  # a token has a byte at least
        request = cell.admit(money=(1_000, 10), n_prompt_held=9, prompt_rate=1, output_rate=10_000_000)
        await front.deliver(request)
        assert cell.end(request).n_prompt == 9  # a budget is not overdrawn by what somebody else says


async def test_a_failure_in_the_middle_ends_it_visibly_with_what_was_said(cell: Cell, tmp_path: Path) -> None:
    spec = {"between_tokens_s": 0.1, "n_retries": 3}
    async with endpoint(begins) as there, serving(cell, tmp_path, upstream=there.spec(**spec)) as front:
        request = cell.admit()
        await front.deliver(request)
        end = cell.end(request)
        assert (cell.text(request), end.reason, end.n_completion) == ("badi hoga", FinishReason.ERROR, 2)
        assert (end.error.status, end.error.code) == (504, "upstream_timeout")
        [usage] = cell.usage()
        assert (usage.status, usage.n_completion, usage.counted_by) == (504, 2, "estimate")
        assert front.deaths == []


async def test_a_client_that_leaves_ends_the_call_elsewhere(cell: Cell, tmp_path: Path) -> None:
    async with endpoint(begins) as there, serving(cell, tmp_path, upstream=there.spec()) as front:
        request = cell.admit()
        task = front.deliver(request)
        await until(lambda: len(cell.journal(request)) > 0, "its first token")
        cell.cancel(request)
        await task
        assert cell.end(request).reason is FinishReason.ABORT
        await until(there.calls[0].gone.is_set, "the call to be closed")


async def test_nobody_continues_what_an_endpoint_began(cell: Cell, tmp_path: Path) -> None:
    async with endpoint(begins) as there, serving(cell, tmp_path, upstream=there.spec()) as front:
        request = cell.admit()
        task = front.deliver(request)
        await until(lambda: len(cell.journal(request)) > 0, "its first token")
        async with serving(cell, tmp_path, replica="r2", machine="m2") as other:
            cell.withdraw("r1")
            await other.deliver(request, cell.epoch(request))
            error = cell.end(request).error
            assert (error.status, error.code) == (503, "cannot_continue")
        task.cancel()


async def test_an_endpoint_does_not_continue_what_a_replica_began(cell: Cell, tmp_path: Path) -> None:
    from tests.workers.test_serve import SLOW

    async with endpoint(well) as there, serving(cell, tmp_path, profile=SLOW) as front:
        request = cell.admit(max_tokens=200, sampling={"ignore_eos": True})
        front.deliver(request)
        await until(lambda: len(cell.journal(request)) > 0, "its first token")
        async with serving(cell, tmp_path, replica="r2", machine="m2", upstream=there.spec()) as other:
            cell.withdraw("r1")
            await other.deliver(request, cell.epoch(request))
            assert cell.end(request).error.code == "cannot_continue"
            assert there.calls == []


def test_a_secret_is_read_by_its_machine_only() -> None:
    key, other = sealed.new_key(), sealed.new_key()
    box = sealed.seal_for(sealed.public_of(key), b"sk-secret")
    assert sealed.open_box(key, box) == b"sk-secret"
    assert box != sealed.seal_for(sealed.public_of(key), b"sk-secret")
    for private, sent in ((other, box), (key, box[:-4] + "AAA="), ("", box)):
        with pytest.raises(sealed.BoxError):
            sealed.open_box(private, sent)
