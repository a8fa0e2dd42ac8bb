"""One run of one drill: the undisturbed reference, the same prompts again, the fault in their middle, the verdict.

Called by `manage.py drill` with a tenant and a deployment that serve already. Knows no Django: who is billed what
comes through `read_books`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from infra.drills.catalog import Drill
from infra.drills.load import Ask, StreamLog, Target, run_streams
from infra.drills.probe import Probes, ProbeVerdict, judge_probes
from infra.drills.scene import DrillError, Scene, Strike
from infra.drills.verdict import Answer, Books, Verdict, judge

# A stream is in its middle when it has seen this share of its tokens; the fault comes when all have.
_MIDDLE = 0.15
_MIDDLE_WITHIN_S = 60.0
_STRIKE_WITHIN_S = 240.0
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Result:
    """What one run saw. `strike` says what was done, to whom, and what it noted."""

    verdict: Verdict
    strike: Strike
    reference_s: float
    run_s: float
    tokens_per_s: float  # one undisturbed stream, median
    probes: ProbeVerdict | None = None  # of the drills that take a server away


def asks_of(drill: Drill, *, n_streams: int, n_tokens: int) -> list[Ask]:
    """Unique prompts, the same for reference and run; every fourth stream is short where the drill wants that."""
    nonce = secrets.token_hex(6)
    asks = []
    for n in range(n_streams):
        is_short = drill.short_share > 0 and n % 4 == 3
        wanted = max(1, round(n_tokens * drill.short_share)) if is_short else n_tokens
        asks.append(Ask(f"drill {nonce} stream {n}: go on", wanted, is_short=is_short))
    return asks


def run(
    drill: Drill,
    scene: Scene,
    target: Target,
    asks: Sequence[Ask],
    read_books: Callable[[Sequence[Answer], bool], Books],
) -> Result:
    """Blocks. `read_books(answers, waits)` reads rows and counters, waiting (bounded) until they agree if asked.

    Raises DrillError when the drill could not be carried out.
    """
    scene.say(f"undisturbed run: {len(asks)} streams")
    started_s = time.monotonic()
    plain = replace(target, reconnects=False)
    reference_logs = [StreamLog() for _ in asks]
    asyncio.run(run_streams(plain, asks, reference_logs, limit_s=drill.limit_s))
    reference = [log.answer() for log in reference_logs]
    reference_s = time.monotonic() - started_s
    failed = [answer for answer in reference if not answer.finished]
    if failed:
        why = ", ".join(failed[0].errors) or f"HTTP {failed[0].statuses}"
        raise DrillError(f"the undisturbed run failed already: {len(failed)} of {len(asks)} streams ({why})")
    read_books(reference, False)
    scene.n_served_before = sum(answer.n_completion for answer in reference)
    rate = median(_rate(answer) for answer in reference)
    scene.say(f"undisturbed run: {reference_s:.1f} s, {rate:.0f} tokens/s each; the same prompts again")

    started_s = time.monotonic()
    strike = Strike()
    logs = [StreamLog() for _ in asks]
    probes = asyncio.run(_disturbed(drill, scene, target, asks, logs, strike))
    run_s = time.monotonic() - started_s
    answers = [log.answer() for log in logs]
    scene.say(f"all streams ended after {run_s:.1f} s; waiting for their bills")
    others = [probe.answer for probe in probes.answered] if probes else []
    books = read_books([*answers, *others], True)
    expected = [drill.expected_short if ask.is_short else drill.expected for ask in asks]
    struck_at_s = strike.at_s or time.monotonic()
    forgotten = {
        probe.answer.request
        for probe in (probes.answered if probes else ())
        if drill.loses_s > 0 and struck_at_s - drill.loses_s <= probe.ended_at_s <= struck_at_s
    }
    verdict = judge(answers, reference, expected, books, struck_at_s, others, forgotten)
    verdict.problems += strike.problems
    beside = judge_probes(probes.answered, struck_at_s) if probes else None
    verdict.problems += beside.problems if beside else []
    return Result(verdict, strike, reference_s, run_s, rate, beside)


async def _disturbed(
    drill: Drill,
    scene: Scene,
    target: Target,
    asks: Sequence[Ask],
    logs: Sequence[StreamLog],
    strike: Strike,
) -> Probes | None:
    """The run with the fault. The drill's thread may outlast the streams; both are bounded."""
    streams = asyncio.create_task(run_streams(target, asks, logs, limit_s=drill.limit_s))
    probes = Probes(replace(target, reconnects=False)) if drill.probes else None
    try:
        await _until_in_the_middle(asks, logs)
        if probes:
            probes.start()
        n_over = sum(log.over for log in logs)
        try:
            async with asyncio.timeout(_STRIKE_WITHIN_S):
                await asyncio.to_thread(_strike, drill, scene, strike)
        except TimeoutError:
            strike.problems.append(f"the drill itself did not end within {_STRIKE_WITHIN_S:g} s")
        strike.notes["n_streams_running"] = len(logs) - n_over
        if n_over:
            strike.problems.append(f"{n_over} streams had ended before the fault: give more --tokens")
        await streams
        if probes:
            await probes.settle()
        return probes
    finally:
        if probes:
            await probes.stop()
        streams.cancel()
        await asyncio.gather(streams, return_exceptions=True)


def _strike(drill: Drill, scene: Scene, strike: Strike) -> None:
    try:
        drill.strike(scene, strike)
    except DrillError as error:
        strike.problems.append(str(error))
    if strike.at_s is None:
        strike.problems.append("the fault was never made")


async def _until_in_the_middle(asks: Sequence[Ask], logs: Sequence[StreamLog]) -> None:
    deadline_s = time.monotonic() + _MIDDLE_WITHIN_S
    while not all(
        log.over or log.n_seen >= max(2, _MIDDLE * ask.n_tokens) for ask, log in zip(asks, logs, strict=True)
    ):
        if time.monotonic() > deadline_s:
            n = sum(1 for log in logs if log.n_seen < 2)
            raise DrillError(f"within {_MIDDLE_WITHIN_S:g} s {n} streams had no token: nothing to disturb")
        await asyncio.sleep(_POLL_S)


def _rate(answer: Answer) -> float:
    """Tokens per second of one stream after its first event."""
    first, last = answer.events[0], answer.events[-1]
    return (last.offset - first.offset) / max(last.at_s - first.at_s, 1e-6)
