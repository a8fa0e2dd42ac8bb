"""What the requests beside a drill's streams amount to."""

from __future__ import annotations

from infra.drills.probe import Probe, judge_probes
from infra.drills.verdict import NO_RETRY, Answer, Books, Expected, Row, judge

SERVED = Answer("r", finish="length", n_prompt=1, n_completion=4, statuses=(200,))
REFUSED = Answer("", statuses=(503,), errors=("HTTP 503 cell_unavailable",))


def probes(*answers: Answer, every_s: float = 1.0, takes_s: float = 0.25) -> list[Probe]:
    return [Probe(n * every_s, n * every_s + takes_s, answer) for n, answer in enumerate(answers)]


def test_the_service_is_back_at_the_first_answer_after_the_last_refusal() -> None:
    verdict = judge_probes(probes(SERVED, SERVED, REFUSED, SERVED, REFUSED, SERVED, SERVED), 1.5)
    assert (verdict.n, verdict.n_refused, verdict.n_401, verdict.problems) == (7, 2, 0, [])
    assert verdict.back_s == 5.25 - 1.5


def test_nobody_refused_means_back_at_once() -> None:
    verdict = judge_probes(probes(SERVED, SERVED, SERVED), 0.5)
    assert (verdict.n_refused, verdict.back_s, verdict.slowest_s) == (0, 0.75, 0.25)


def test_a_401_for_a_valid_key_fails_the_drill() -> None:
    wrong = Answer("", statuses=(401,), errors=("HTTP 401 invalid_api_key",))
    verdict = judge_probes(probes(SERVED, wrong, SERVED), 0.5)
    assert verdict.n_401 == 1
    assert verdict.problems == ["1 requests beside the streams got a 401 for a valid key"]


def test_a_refusal_without_a_word_to_try_again_fails_the_drill() -> None:
    for answer in (
        Answer("", statuses=(503,), errors=("HTTP 503 cell_unavailable" + NO_RETRY,)),
        Answer("", errors=("connection: ConnectionResetError",)),
        Answer("", statuses=(200,), errors=("client_limit",)),
        Answer("", statuses=(500,), errors=("HTTP 500 internal_error",)),
    ):
        assert judge_probes(probes(SERVED, answer, SERVED), 0.5).problems, answer


def test_a_service_that_does_not_come_back_fails_the_drill() -> None:
    assert judge_probes(probes(SERVED, REFUSED), 0.5).problems
    assert judge_probes(probes(REFUSED), 0.5).problems


def test_requests_beside_the_streams_are_billed_once_if_served_and_never_twice() -> None:
    expected = [Expected()]
    stream = Answer("s", finish="length", n_prompt=1, n_completion=4, statuses=(200,))
    row = Row("r", 1, 4, 1, 10, 10)

    def problems(*rows: Row) -> list[str]:
        books = Books(rows=(Row("s", 1, 4, 1, 10, 10), *rows))
        return judge([stream], [stream], expected, books, 0.0, [SERVED]).problems

    assert problems(row) == []
    assert problems() == ["a request beside the streams was billed 0 times"]
    assert problems(row, row) == ["a request beside the streams was billed 2 times"]


def test_only_what_redis_may_have_forgotten_may_be_missing_in_the_budgets_counter() -> None:
    stream = Answer("s", finish="length", n_prompt=1, n_completion=4, statuses=(200,))
    rows = (Row("s", 1, 4, 1, 10, 10), Row("r", 1, 4, 1, 7, 7))

    def passes(spent_nano: int, *forgotten: str) -> bool:
        books = Books(rows=rows, spent_nano=spent_nano)
        return judge([stream], [stream], [Expected()], books, 0.0, [SERVED], forgotten).passed

    assert passes(17)
    assert not passes(10), "nothing was lost"
    assert passes(10, "r")
    assert not passes(9, "r")
    assert not passes(18, "r"), "and never is anything counted twice"
