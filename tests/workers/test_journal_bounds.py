"""What bounds a journal: tokens by the hold, bytes by the tokens, life by the end of the request or its settlement."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from tests.records import changed
from tests.workers.test_scripts import KEYS, Cell
from workers import scripts
from workers.contract import FrameEntry, JournalEntry, encode
from workers.engine import toy_text
from workers.keys import RETENTION_MS

MACHINE = KEYS.machine("m1")
N_TOKENS = 2_000


@pytest.fixture
def cell(redis_url: str) -> Iterator[Cell]:
    with redis.Redis.from_url(redis_url) as client:
        made = Cell(client)
        made.enrol("r1")
        yield made


def journaled(cell: Cell, request: str, n_per_entry: int) -> int:
    """Bytes in Redis of a journal of N_TOKENS tokens of some four characters, so many an entry."""
    cell.admit(request, candidates=("r1",), n_out=N_TOKENS, money=4_000)
    cell.claim(request, 1)
    for at in range(0, N_TOKENS, n_per_entry):
        ids = toy_text.tokens_at(7, at, at + n_per_entry)
        text = "".join(toy_text.PIECES[token] for token in ids)
        frame = encode(FrameEntry(7, 0, at, len(ids), text))
        entry = encode(JournalEntry(0, at, ids, text))
        args = (request, 1, at, at + len(ids), frame, entry, b"")
        assert cell.run(scripts.FLUSH, MACHINE.prefix, "g1", RETENTION_MS, 1000, *args) == b"a"
    return int(cell.r.memory_usage(MACHINE.journal(request), samples=0))


def test_a_streamed_token_costs_some_bytes_and_a_gathered_one_fewer(cell: Cell) -> None:
    assert journaled(cell, "q1", 1) <= 24 * N_TOKENS
    assert journaled(cell, "q2", 50) <= 12 * N_TOKENS


def test_no_token_beyond_the_hold_is_journaled(cell: Cell) -> None:
    cell.admit("q1", candidates=("r1",), n_out=20)
    cell.claim("q1", 1)
    assert cell.flush(("q1", 1, 0, 20, False)) == b"a"
    assert cell.flush(("q1", 1, 20, 1, False)) == b"b"
    assert cell.r.llen(MACHINE.journal("q1")) == 1


def test_a_journal_has_an_end_of_life_from_its_first_entry_on(cell: Cell) -> None:
    cell.admit("q1", candidates=("r1",))
    cell.claim("q1", 1)
    cell.flush(("q1", 1, 0, 1, False))
    assert cell.r.pttl(MACHINE.journal("q1")) > 0
    cell.flush(("q1", 1, 1, 1, True))
    assert 0 < cell.r.pttl(MACHINE.journal("q1")) <= RETENTION_MS


@pytest.mark.parametrize(("note", "life_ms"), [("cp:", 30_000), ("cs:0123456789abcdef", RETENTION_MS)])
def test_an_answer_that_nothing_leads_back_to_is_kept_for_seconds(
    cell: Cell, note: str, life_ms: int
) -> None:
    cell.admit("q1", candidates=("r1",))
    cell.r.hset(KEYS.request("q1"), "adm", changed(cell.r.hgetall(KEYS.request("q1")), note=note))
    cell.claim("q1", 1)
    cell.flush(("q1", 1, 0, 1, True))
    cell.settle("q1")
    assert life_ms - 5_000 < cell.r.pttl(MACHINE.journal("q1")) <= life_ms
