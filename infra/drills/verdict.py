"""What a drill's streams amount to: each compared with its undisturbed run and with its bill. Pure.

Called by run.py with what load.py collected and with the rows of the drill's tenant. Nothing here knows how the
fault was made. Whatever is wrong is a sentence in `problems`; a drill passes when there is none.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import pairwise
from statistics import median

# In a stream that nobody moved, a pause shorter than this is scheduling, not an interruption.
INTERRUPTION_S = 0.25
MAX_PROBLEMS = 20  # sentences shown; the counts cover the rest
_UNIT = re.compile(r"\s*\S+")


@dataclass(frozen=True, slots=True)
class Event:
    """One SSE event with text: when it arrived (monotonic seconds), the token offset after it, its text."""

    at_s: float
    offset: int
    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """One request from its client's side. Token counts are those the API told; -1: it did not."""

    request: str
    events: tuple[Event, ...] = ()
    finish: str = ""
    n_prompt: int = -1
    n_completion: int = -1
    # HTTP statuses in order, one per connection, and codes of errors told after the headers.
    statuses: tuple[int, ...] = ()
    errors: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def finished(self) -> bool:
        """It came to its end, with a finish reason and the counts."""
        return bool(self.finish) and self.n_completion >= 0

    @property
    def n_seen(self) -> int:
        """Tokens seen so far."""
        return self.events[-1].offset if self.events else 0


@dataclass(frozen=True, slots=True)
class Row:
    """What was booked of one request. `due_nano` is the price of the counts that its client was told."""

    request: str
    n_prompt: int
    n_completion: int
    attempts: int
    cost_nano: int
    due_nano: int


@dataclass(frozen=True, slots=True)
class Books:
    """All rows of the drill's tenant since the run began, and what its counters in Redis held at the end.

    `left` are the counters that should be zero and are not: a sentence each.
    """

    rows: tuple[Row, ...] = ()
    left: tuple[str, ...] = ()
    spent_nano: int | None = None  # as Redis counts it for the run; None where no counter was kept


@dataclass(frozen=True, slots=True)
class Expected:
    """What a drill promises of one stream.

    `attempts`: how many replicas it was handed to, at least and at most. It proves that the fault did hit, and that
    nothing was moved without need. `may_fail`: a retryable error counts as an end (Redis or Postgres lost).
    """

    attempts: tuple[int, int] = (1, 1)
    may_fail: bool = False


@dataclass(slots=True)
class StreamVerdict:
    """One stream against its reference."""

    finished: bool = False
    failed_retryably: bool = False
    equal: bool = False
    n_lost: int = 0
    n_duplicated: int = 0
    # From the fault (or the last token before the longest silence, where that came later: a hand-over) to the token
    # that ended it; 0: not interrupted.
    recovery_s: float = 0.0
    silence_s: float = 0.0  # that silence itself
    went_on: bool = False  # it finished, or got a token well after the fault


@dataclass(slots=True)
class Verdict:
    """A run of one drill. Durations are over the streams that were interrupted and went on; None: there were none."""

    n_streams: int
    n_finished: int = 0
    n_failed: int = 0
    n_failed_retryably: int = 0
    n_equal: int = 0
    n_tokens_lost: int = 0
    n_tokens_duplicated: int = 0
    n_billed_once: int = 0
    n_billed_twice: int = 0
    n_not_billed: int = 0
    n_interrupted: int = 0
    n_went_on: int = 0
    n_401: int = 0
    spent_lag_nano: int = 0  # booked, and missing in the budget's counter
    recovery_median_s: float | None = None
    recovery_worst_s: float | None = None
    silence_worst_s: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems


RETRYABLE = (409, 429, 502, 503, 504)
NO_RETRY = " without a word when to try again"


def is_retryable(answer: Answer) -> bool:
    """Whether a failed answer told its client to try again: by status and Retry-After, or in the stream's last event.

    A connection that just breaks tells nothing, nor does one that the client gave up.
    """
    bad = [status for status in answer.statuses if status != 200]
    silent = [
        e for e in answer.errors if e.startswith(("connection:", "client_limit")) or e.endswith(NO_RETRY)
    ]
    return bool(answer.errors or bad) and all(status in RETRYABLE for status in bad) and not silent


def judge_stream(
    answer: Answer, reference: Answer, struck_at_s: float, *, moved: bool = True
) -> StreamVerdict:
    """Tokens and text against the undisturbed run of the same prompt; the longest silence after `struck_at_s`.

    `moved`: the stream had to change its replica, so its longest silence is an interruption however short.
    """
    found = StreamVerdict(finished=answer.finished, equal=answer.text == reference.text)
    found.went_on = answer.finished or any(e.at_s > struck_at_s + INTERRUPTION_S for e in answer.events)
    found.failed_retryably = not answer.finished and is_retryable(answer)
    if not found.equal:
        found.n_lost, found.n_duplicated = _difference(
            _UNIT.findall(reference.text), _UNIT.findall(answer.text)
        )
    elif answer.finished and answer.n_completion != reference.n_completion:
        missing = reference.n_completion - answer.n_completion
        found.n_lost, found.n_duplicated = max(missing, 0), max(-missing, 0)
    # Text may agree although an offset was told twice: then a client that counts would be wrong.
    found.n_duplicated += sum(1 for a, b in pairwise(answer.events) if b.offset < a.offset)
    shortest_s = 0.0 if moved else INTERRUPTION_S
    for before, after in pairwise(answer.events):
        gap_s = after.at_s - before.at_s
        if after.at_s > struck_at_s and gap_s > max(shortest_s, found.silence_s):
            found.silence_s, found.recovery_s = gap_s, after.at_s - max(before.at_s, struck_at_s)
    return found


def _difference(reference: Sequence[str], text: Sequence[str]) -> tuple[int, int]:
    """(units of the reference that are missing, units too many)."""
    n_lost = n_more = 0
    for kind, a0, a1, b0, b1 in SequenceMatcher(None, reference, text, autojunk=False).get_opcodes():
        if kind != "equal":
            n_lost += a1 - a0
            n_more += b1 - b0
    return n_lost, n_more


def judge(
    answers: Sequence[Answer],
    references: Sequence[Answer],
    expected: Sequence[Expected],
    books: Books,
    struck_at_s: float,
    others: Sequence[Answer] = (),
    forgotten: Collection[str] = (),
) -> Verdict:
    """The whole run. The three sequences are by stream; `others` ran beside them and are billed like them.

    `forgotten`: requests that Redis may have forgotten altogether: booked all the same, but perhaps not counted
    against the budget.
    """
    verdict = Verdict(n_streams=len(answers))
    say = verdict.problems.append
    streams = [
        judge_stream(a, r, struck_at_s, moved=want.attempts[0] > 1)
        for a, r, want in zip(answers, references, expected, strict=True)
    ]
    for n, (stream, answer, reference, want) in enumerate(
        zip(streams, answers, references, expected, strict=True)
    ):
        verdict.n_finished += stream.finished
        verdict.n_equal += stream.finished and stream.equal
        if not reference.finished:
            say(f"stream {n}: the undisturbed run did not finish: {_why(reference)}")
        if 401 in answer.statuses:
            verdict.n_401 += 1
            say(f"stream {n}: its valid key was answered 401")
        if not stream.finished:
            verdict.n_failed += 1
            verdict.n_failed_retryably += stream.failed_retryably
            if not (want.may_fail and stream.failed_retryably):
                say(f"stream {n}: not finished: {_why(answer)}")
            if want.may_fail and not reference.text.startswith(answer.text):
                say(f"stream {n}: what it got before it failed is not the beginning of its text")
            continue
        verdict.n_tokens_lost += stream.n_lost
        verdict.n_tokens_duplicated += stream.n_duplicated
        if stream.n_lost or stream.n_duplicated or not stream.equal:
            say(
                f"stream {n}: text differs from the undisturbed run: "
                f"{stream.n_lost} tokens lost, {stream.n_duplicated} too many"
            )
    interrupted = [s.recovery_s for s in streams if s.recovery_s > 0]
    verdict.n_interrupted = len(interrupted)
    verdict.n_went_on = sum(stream.went_on for stream in streams)
    if interrupted:
        verdict.recovery_median_s = median(interrupted)
        verdict.recovery_worst_s = max(interrupted)
        verdict.silence_worst_s = max(s.silence_s for s in streams)
    _judge_books(verdict, answers, expected, books, others, forgotten)
    if len(verdict.problems) > MAX_PROBLEMS:
        n_more = len(verdict.problems) - MAX_PROBLEMS
        verdict.problems[MAX_PROBLEMS:] = [f"and {n_more} more"]
    return verdict


def _judge_books(
    verdict: Verdict,
    answers: Sequence[Answer],
    expected: Sequence[Expected],
    books: Books,
    others: Sequence[Answer],
    forgotten: Collection[str],
) -> None:
    """Each stream that ran billed once at its counts; nothing else billed; every counter back to zero."""
    say = verdict.problems.append
    rows: dict[str, list[Row]] = {}
    for row in books.rows:
        rows.setdefault(row.request, []).append(row)
    ours = {answer.request for answer in answers}
    for n, (answer, want) in enumerate(zip(answers, expected, strict=True)):
        found = rows.get(answer.request, []) if answer.request else []
        if len(found) > 1:
            verdict.n_billed_twice += 1
            say(f"stream {n}: billed {len(found)} times")
        elif not found:
            verdict.n_not_billed += 1
            if answer.finished:
                say(f"stream {n}: not billed")
        else:
            verdict.n_billed_once += 1
        for row in found[:1]:
            if answer.finished and (row.n_prompt, row.n_completion) != (answer.n_prompt, answer.n_completion):
                say(
                    f"stream {n}: billed {row.n_prompt}+{row.n_completion} tokens, "
                    f"its client was told {answer.n_prompt}+{answer.n_completion}"
                )
            elif row.cost_nano != row.due_nano:
                say(f"stream {n}: billed {row.cost_nano} nano-dollars, due are {row.due_nano}")
            low, high = want.attempts
            if answer.finished and not low <= row.attempts <= high:
                say(f"stream {n}: took {row.attempts} attempts, expected {_range(low, high)}")
    for answer in others:
        n_rows = len(rows.get(answer.request, []))
        if n_rows > 1 or (answer.finished and n_rows == 0):
            say(f"a request beside the streams was billed {n_rows} times")
    ours |= {answer.request for answer in others}
    strangers = sum(len(found) for request, found in rows.items() if request not in ours)
    if strangers:
        say(f"{strangers} requests billed to the tenant that nobody sent")
    booked_nano = sum(row.cost_nano for row in books.rows)
    may_lag_nano = sum(row.cost_nano for request in forgotten for row in rows.get(request, []))
    if books.spent_nano is not None:
        verdict.spent_lag_nano = booked_nano - books.spent_nano
        if not 0 <= verdict.spent_lag_nano <= may_lag_nano:
            say(f"counters say {books.spent_nano} nano-dollars were spent, {booked_nano} are booked")
    verdict.problems += books.left


def _range(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


def _why(answer: Answer) -> str:
    parts = [f"{answer.n_seen} tokens seen"]
    if any(status != 200 for status in answer.statuses) or not answer.statuses:
        parts.append(f"HTTP {', '.join(map(str, answer.statuses)) or 'no answer'}")
    return "; ".join([*parts, *answer.errors])


def over_repeats(verdicts: Sequence[Verdict]) -> Mapping[str, float | None]:
    """Recovery over several runs, in seconds: median of their medians, and the worst stream of all. None: no stream was
    interrupted and went on."""
    medians = [v.recovery_median_s for v in verdicts if v.recovery_median_s is not None]
    worst = [v.recovery_worst_s for v in verdicts if v.recovery_worst_s is not None]
    return {
        "recovery_median_s": median(medians) if medians else None,
        "recovery_worst_s": max(worst) if worst else None,
    }
