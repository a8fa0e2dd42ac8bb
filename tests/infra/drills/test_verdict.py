"""The judge of a drill: an undisturbed run passes, and every single thing that may go wrong fails it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from infra.drills.verdict import (
    Answer,
    Books,
    Event,
    Expected,
    Row,
    Verdict,
    judge,
    judge_stream,
    over_repeats,
)

WORDS = [" bada", " badi", " bafa", " gezo", " kimo", " lena", " mavi", " nobo"]
STRUCK_AT_S = 103.5
MOVED = Expected(attempts=(2, 2))


def an_answer(request: str = "r0", words: list[str] | None = None, begun_at_s: float = 100.0) -> Answer:
    """One word a second."""
    words = WORDS if words is None else words
    return Answer(
        request=request,
        events=tuple(Event(begun_at_s + n, n + 1, word) for n, word in enumerate(words)),
        finish="length",
        n_prompt=7,
        n_completion=len(words),
        statuses=(200,),
    )


def a_row(request: str = "r0") -> Row:
    return Row(request, n_prompt=7, n_completion=len(WORDS), attempts=2, cost_nano=70, due_nano=70)


def judged(
    answer: Answer | None = None,
    rows: tuple[Row, ...] | None = None,
    expected: Expected = MOVED,
    reference: Answer | None = None,
    **books: object,
) -> Verdict:
    found = Books(rows=(a_row(),) if rows is None else rows, **books)  # type: ignore[arg-type]
    return judge([answer or an_answer()], [reference or an_answer("q0")], [expected], found, STRUCK_AT_S)


def test_a_run_that_lost_nothing_passes() -> None:
    verdict = judged()
    assert verdict.passed, verdict.problems
    assert (verdict.n_finished, verdict.n_equal, verdict.n_billed_once) == (1, 1, 1)
    assert (verdict.n_tokens_lost, verdict.n_tokens_duplicated) == (0, 0)


@pytest.mark.parametrize("at", range(len(WORDS)))
def test_a_lost_token_fails_wherever_it_is(at: int) -> None:
    verdict = judged(an_answer(words=WORDS[:at] + WORDS[at + 1 :]))
    assert not verdict.passed
    assert (verdict.n_tokens_lost, verdict.n_tokens_duplicated) == (1, 0)


@pytest.mark.parametrize("at", range(len(WORDS)))
def test_a_duplicated_token_fails_wherever_it_is(at: int) -> None:
    verdict = judged(an_answer(words=WORDS[: at + 1] + WORDS[at:]))
    assert not verdict.passed
    assert (verdict.n_tokens_lost, verdict.n_tokens_duplicated) == (0, 1)


def test_a_different_text_of_the_same_length_fails() -> None:
    verdict = judged(an_answer(words=[*WORDS[:3], " xxxx", *WORDS[4:]]))
    assert not verdict.passed
    assert verdict.n_equal == 0


def test_whitespace_is_text_too() -> None:
    assert not judged(an_answer(words=[*WORDS[:3], WORDS[3].strip(), *WORDS[4:]])).passed


def test_equal_text_with_another_token_count_fails() -> None:
    answer = replace(an_answer(), n_completion=len(WORDS) - 1)
    assert judged(answer, rows=(replace(a_row(), n_completion=len(WORDS) - 1),)).n_tokens_lost == 1


def test_offsets_that_go_back_are_a_duplicate() -> None:
    events = an_answer().events
    answer = replace(an_answer(), events=(*events[:4], replace(events[4], offset=2), *events[5:]))
    assert judged(answer).n_tokens_duplicated == 1


def test_a_stream_without_an_end_fails() -> None:
    verdict = judged(replace(an_answer(), finish="", n_completion=-1, errors=("connection: OSError",)))
    assert verdict.n_failed == 1
    assert "connection: OSError" in verdict.problems[0]


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ((a_row(), a_row()), "billed 2 times"),
        ((), "not billed"),
        ((replace(a_row(), n_completion=9, cost_nano=79, due_nano=79),), "its client was told"),
        ((replace(a_row(), cost_nano=140),), "due are 70"),
        ((a_row(), a_row("somebody")), "nobody sent"),
        ((replace(a_row(), attempts=1),), "took 1 attempts, expected 2"),
    ],
)
def test_a_wrong_bill_fails(rows: tuple[Row, ...], why: str) -> None:
    verdict = judged(rows=rows)
    assert any(why in problem for problem in verdict.problems), verdict.problems


def test_counters_that_do_not_return_fail() -> None:
    assert not judged(left=("key: 1 requests in flight after the end",)).passed
    assert judged(spent_nano=70).passed
    assert not judged(spent_nano=140).passed, "settled twice in Redis, booked once"


def test_a_valid_key_answered_401_fails_even_if_all_else_is_well() -> None:
    assert not judged(replace(an_answer(), statuses=(401, 200))).passed


def test_retryable_failures_pass_only_where_the_drill_allows_them() -> None:
    refused = replace(
        an_answer(words=WORDS[:3]), finish="", n_completion=-1, statuses=(503,), errors=("cell_unavailable",)
    )
    assert not judged(refused, rows=()).passed
    allowed = replace(MOVED, may_fail=True)
    verdict = judged(refused, rows=(), expected=allowed)
    assert verdict.passed, verdict.problems
    assert (verdict.n_failed, verdict.n_failed_retryably) == (1, 1)
    assert not judged(replace(refused, statuses=(500,)), rows=(), expected=allowed).passed
    assert not judged(replace(refused, statuses=(200,), errors=()), rows=(), expected=allowed).passed
    garbled = replace(refused, events=(Event(100.0, 1, " xxxx"),))
    assert not judged(garbled, rows=(), expected=allowed).passed


def test_recovery_is_the_end_of_the_longest_silence_after_the_fault() -> None:
    events = [Event(100.0 + n / 10, n + 1, word) for n, word in enumerate(WORDS)]
    paused = [*events[:4], *(replace(e, at_s=e.at_s + 2.0) for e in events[4:])]
    found = judge_stream(replace(an_answer(), events=tuple(paused)), an_answer(), struck_at_s=100.35)
    assert found.recovery_s == pytest.approx(2.05)
    assert found.silence_s == pytest.approx(2.1)
    handed_over_late = judge_stream(replace(an_answer(), events=tuple(paused)), an_answer(), 100.05)
    assert handed_over_late.recovery_s == pytest.approx(2.1)
    before = judge_stream(replace(an_answer(), events=tuple(paused)), an_answer(), 105.0)
    assert before.recovery_s == 0, "a silence before the fault is none of its own"


def test_a_stream_that_nobody_moved_is_not_interrupted_by_a_hiccup() -> None:
    quick = replace(an_answer(), events=tuple(Event(100 + n / 10, n + 1, w) for n, w in enumerate(WORDS)))
    assert judge_stream(quick, an_answer(), 100.3, moved=False).recovery_s == 0
    assert judge_stream(quick, an_answer(), 100.35, moved=True).recovery_s > 0


def test_the_median_over_runs_is_of_their_medians() -> None:
    runs = [Verdict(1, n_interrupted=1, recovery_median_s=s, recovery_worst_s=2 * s) for s in (1.0, 9.0, 2.0)]
    assert over_repeats([*runs, Verdict(1)]) == {"recovery_median_s": 2.0, "recovery_worst_s": 18.0}


def test_a_stream_that_ended_at_the_fault_did_not_go_on() -> None:
    """Its last token came before the fault, or was under way in that instant: no recovery is told of it."""
    for n_seen in (4, 5):  # the fifth comes half a second after the fault
        cut = replace(an_answer(words=WORDS[:n_seen]), finish="", n_completion=-1, errors=("request_lost",))
        verdict = judged(cut, rows=(), expected=Expected(attempts=(1, 2), may_fail=True))
        assert verdict.n_went_on == (n_seen == 5)
        if n_seen == 4:
            assert verdict.recovery_median_s is verdict.recovery_worst_s is None
    assert judged().n_went_on == 1
    assert over_repeats([Verdict(1)]) == {"recovery_median_s": None, "recovery_worst_s": None}
