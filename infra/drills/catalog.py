"""The drills by name: what each does to the stack, to what load, and what it promises.

A drill's `strike` runs in a thread of its own while the streams run. It finds the process that serves them, hurts
it, calls `Strike.done`, and may go on to watch or to mend. `manage.py drill` lists this table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from infra.drills import machine
from infra.drills.scene import Scene, Strike
from infra.drills.verdict import Expected

ONCE = Expected(attempts=(1, 1))
MOVED = Expected(attempts=(2, 2))


@dataclass(frozen=True, slots=True)
class Drill:
    """One drill. Token counts and engine pace are chosen so that every stream is in its middle when it is struck.

    n_tokens: of each stream, by engine; `--tokens` changes it. n_short_tokens: every fourth stream is so short
    instead (0: none). recovery_limit_s: median silence that passes, with the toy engine; 0: not judged.
    reconnects: clients come back with their idempotency key. limit_s: of the clients' patience, from the first byte.
    """

    help: str
    strike: Callable[[Scene, Strike], None]
    expected: Expected = MOVED
    expected_short: Expected = ONCE
    n_tokens: int = 400
    n_tokens_vllm: int = 64
    n_short_tokens: int = 0
    recovery_limit_s: float = 0.0
    reconnects: bool = False
    limit_s: float = 120.0


DRILLS: dict[str, Drill] = {
    "kill-worker": Drill(
        "SIGKILL to the replica front that serves the streams: they resume on a new replica from their journals",
        machine.kill_worker,
        recovery_limit_s=5.0,
    ),
    "kill-engine": Drill(
        "kills the engine core under its front (the toy engine fails likewise): they resume on a new replica",
        machine.kill_engine,
        recovery_limit_s=5.0,
    ),
    "hang-engine": Drill(
        "stops the engine core without ending it: the watchdog must notice within max(5 s, 4 x the predicted step)",
        machine.hang_engine,
        recovery_limit_s=9.0,
    ),
    "duplicate": Drill(
        "delivers every message twice, then cuts the worker off until it is withdrawn and lets it go on: "
        "it must be refused",
        machine.duplicate,
        recovery_limit_s=5.0,
    ),
    "kill-agent": Drill(
        "SIGKILL to the machine's agent: streams go on, its successor adopts the replicas",
        machine.kill_agent,
        ONCE,
        n_tokens=800,
    ),
}
