"""The drills by name: what each does to the stack, to what load, and what it promises.

A drill's `strike` runs in a thread of its own while the streams run. It finds the process that serves them, hurts
it, calls `Strike.done`, and may go on to watch or to mend. `manage.py drill` lists this table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from infra.drills import machine, servers
from infra.drills.scene import Scene, Strike
from infra.drills.verdict import Expected

ONCE = Expected(attempts=(1, 1))
MOVED = Expected(attempts=(2, 2))
# A server was away: streams go on, or end with a word to try again.
RETRY = Expected(attempts=(1, 2), may_fail=True)


@dataclass(frozen=True, slots=True)
class Drill:
    """One drill. Token counts and engine pace are chosen so that every stream is in its middle when it is struck.

    n_tokens: of each stream, by engine; `--tokens` changes it. short_share: every fourth stream wants that
    part of them only (0: none). recovery_limit_s: median silence that passes, with the toy engine; 0: not judged.
    reconnects: clients come back with their idempotency key. limit_s: of the clients' patience, from the first byte.
    loses_s: so much of what ended before the fault may be missing in the counters of budgets (never in the ledger).
    beside: requests that the strike itself sends, while all streams run.
    probes: short requests at a steady pace beside the streams tell who is refused, and since when no more.
    """

    help: str
    strike: Callable[[Scene, Strike], None]
    expected: Expected = MOVED
    expected_short: Expected = ONCE
    n_tokens: int = 400
    n_tokens_vllm: int = 64
    short_share: float = 0.0
    recovery_limit_s: float = 0.0
    reconnects: bool = False
    probes: bool = False
    beside: int = 0
    loses_s: float = 0.0
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
        "stops the engine core without ending it: the watchdog must notice within max(4 s, 4 x the predicted step)",
        machine.hang_engine,
        recovery_limit_s=5.0,
    ),
    "kill-machine": Drill(
        "SIGKILL to everything on the machine at once, so that nobody reports it: heartbeats stand still, the machine "
        "is started again or replaced",
        machine.kill_machine,
        recovery_limit_s=10.0,
        limit_s=300.0,
    ),
    "spot-notice": Drill(
        f"gives the machine {machine.NOTICE_S:g} s notice: a replacement serves before the drain, short requests "
        "finish (every fourth), the rest is handed over",
        machine.spot_notice,
        n_tokens=1600,
        n_tokens_vllm=1500,
        short_share=0.375,
        limit_s=300.0,
    ),
    "spot-event": Drill(
        "the same notice, told only by EventBridge and SQS, not to the machine (with --region)",
        machine.spot_event,
        n_tokens=1600,
        n_tokens_vllm=1500,
        short_share=0.375,
        limit_s=300.0,
    ),
    "quarantine": Drill(
        "`manage.py quarantine` of the machine: a replacement serves before the drain, short requests finish (every "
        "fourth), the rest is handed over, the machine ends",
        machine.quarantine,
        n_tokens=3000,
        n_tokens_vllm=1500,
        short_share=0.2,
        limit_s=300.0,
    ),
    "duplicate": Drill(
        "delivers every message twice, then cuts the worker off until it is withdrawn and lets it go on: "
        "it must be refused",
        machine.duplicate,
        recovery_limit_s=5.0,
    ),
    "poison": Drill(
        "a request ends the engine that begins it, twice: it is given up and told, those beside it finish",
        machine.poison,
        Expected(attempts=(3, 3)),
        n_tokens=600,
        beside=1,
    ),
    "kill-agent": Drill(
        "SIGKILL to the machine's agent: streams go on, its successor adopts the replicas",
        machine.kill_agent,
        ONCE,
        n_tokens=800,
    ),
    "rotate-secrets": Drill(
        "replaces pepper, secret key, logins of the database and Redis's password; gateways, web and control worker "
        "start again one by one, twice: clients come back and miss nothing",
        servers.rotate_secrets,
        ONCE,
        n_tokens=3000,
        n_tokens_vllm=1500,
        reconnects=True,
        probes=True,
        limit_s=400.0,
    ),
    "rolling-upgrade": Drill(
        "a private stack of an earlier commit goes over to this one by `manage.py upgrade`: database, gateways, "
        "control and machines, one by one (--from REV)",
        servers.upgrade,
        MOVED,
        n_tokens=2400,
        n_tokens_vllm=1500,
        reconnects=True,
        probes=True,
        limit_s=400.0,
    ),
    "kill-control": Drill(
        "SIGKILL to the control worker: streams go on, its successor adopts machines and replicas and buys nothing",
        servers.kill_control,
        ONCE,
        n_tokens=800,
        probes=True,
    ),
    "kill-gateway": Drill(
        "SIGKILL to one gateway: its requests run on, its clients come back to the other and get the rest",
        servers.kill_gateway,
        ONCE,
        n_tokens=600,
        reconnects=True,
    ),
    "kill-redis": Drill(
        "SIGKILL to Redis, which comes back with its log: streams go on, or are told to try again",
        servers.kill_redis,
        RETRY,
        n_tokens=600,
        probes=True,
    ),
    "trim-redis": Drill(
        "SIGKILL to Redis, and the last second of its log cut off: nothing is billed twice, nothing stays taken",
        servers.trim_redis,
        RETRY,
        n_tokens=600,
        probes=True,
        loses_s=servers.LOST_LOG_S + 0.5,
    ),
    "promote-redis": Drill(
        "SIGKILL to Redis, whose replica takes its place: what was replicated goes on, machine users are made again",
        servers.promote_redis,
        RETRY,
        n_tokens=600,
        probes=True,
        loses_s=0.5,
    ),
    "lose-redis": Drill(
        "SIGKILL to Redis, and its log and users deleted: streams are told to try again, replicas are kept",
        servers.lose_redis,
        RETRY,
        n_tokens=600,
        probes=True,
    ),
    "kill-postgres": Drill(
        "SIGKILL to Postgres, which stays away for 10 s: streams and known keys go on, bills are caught up with",
        servers.kill_postgres,
        ONCE,
        n_tokens=900,
        probes=True,
    ),
}
