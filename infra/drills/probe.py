"""Short requests at a steady pace beside a drill's streams: who is refused while something is away, and since when not.

Started by run.py inside its event loop for the drills that take a server away. Each request has a connection of its
own, so that it meets whatever process listens. Bounded in number and in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from infra.drills.load import Ask, StreamLog, Target, run_streams
from infra.drills.verdict import Answer, is_retryable

EVERY_S: Final = 0.1
N_TOKENS: Final = 4
LIMIT_S: Final = 60.0  # of one request; and from the end of the streams until all is served again
STEADY: Final = 20  # requests in a row that are served: the service is back
_MAX_OPEN: Final = 512


@dataclass(frozen=True, slots=True)
class Probe:
    """One request; instants are monotonic seconds."""

    sent_at_s: float
    ended_at_s: float
    answer: Answer


@dataclass(slots=True)
class ProbeVerdict:
    """What the requests beside the streams met. `back_s`: from the fault to the first answer after the last refusal."""

    n: int = 0
    n_refused: int = 0
    n_401: int = 0
    back_s: float = 0.0
    slowest_s: float = 0.0
    problems: list[str] = field(default_factory=list)


class Probes:
    """`start` it, `settle` once the fault is over; `answered` are those that have ended."""

    def __init__(self, target: Target) -> None:
        self.answered: list[Probe] = []
        self._target = target
        self._open: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def settle(self) -> None:
        """Go on until the last `STEADY` were served, or `LIMIT_S`; then wait for what is open."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LIMIT_S):
                n_before = len(self.answered)
                while len(self.answered) < n_before + STEADY or not self._steady():  # noqa: ASYNC110 - bounded
                    await asyncio.sleep(EVERY_S)
        await self.stop()

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.gather(*self._open, return_exceptions=True)

    def _steady(self) -> bool:
        latest = sorted(self.answered, key=lambda probe: probe.sent_at_s)[-STEADY:]
        return len(latest) == STEADY and all(probe.answer.finished for probe in latest)

    async def _run(self) -> None:
        n = 0
        while True:
            n += 1
            if len(self._open) < _MAX_OPEN:
                task = asyncio.create_task(self._one(n))
                self._open.add(task)
                task.add_done_callback(self._open.discard)
            await asyncio.sleep(EVERY_S)

    async def _one(self, n: int) -> None:
        log, sent_at_s = StreamLog(), time.monotonic()
        ask = Ask(f"probe {sent_at_s:.3f} number {n}", N_TOKENS)
        await run_streams(self._target, [ask], [log], limit_s=LIMIT_S)
        self.answered.append(Probe(sent_at_s, time.monotonic(), log.answer()))


def judge_probes(probes: Sequence[Probe], struck_at_s: float) -> ProbeVerdict:
    """Pure. Every refusal must be one that a client may repeat, none a 401, and the last requests must be served."""
    verdict = ProbeVerdict(n=len(probes))
    probes = sorted(probes, key=lambda probe: probe.sent_at_s)
    refused = [probe for probe in probes if not probe.answer.finished]
    verdict.n_refused = len(refused)
    verdict.n_401 = sum(401 in probe.answer.statuses for probe in probes)
    wrong = [probe.answer for probe in refused if not is_retryable(probe.answer)]
    if verdict.n_401:
        verdict.problems.append(f"{verdict.n_401} requests beside the streams got a 401 for a valid key")
    elif wrong:
        why = ", ".join(wrong[0].errors) or f"HTTP {wrong[0].statuses}"
        verdict.problems.append(
            f"{len(wrong)} requests beside the streams failed with no word to try again: {why}"
        )
    served = [probe for probe in probes if probe.answer.finished]
    verdict.slowest_s = max((probe.ended_at_s - probe.sent_at_s for probe in served), default=0.0)
    if not served or (refused and refused[-1].sent_at_s > served[-1].sent_at_s):
        verdict.problems.append("requests beside the streams were still refused at the end")
    elif refused and refused[-1].ended_at_s > struck_at_s:
        since_s = max(struck_at_s, refused[-1].sent_at_s)
        verdict.back_s = min(p.ended_at_s for p in served if p.sent_at_s > since_s) - struck_at_s
    else:
        after = [p.ended_at_s for p in served if p.sent_at_s >= struck_at_s]
        verdict.back_s = min(after) - struck_at_s if after else 0.0
    return verdict
