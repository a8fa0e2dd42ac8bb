"""Hears and scans the cell's Redis: routes to replicas that are ready, withdraws those that died, wakes those at zero.

Runs as a thread of the control worker; a lock in Redis makes one of several active, and everything it does may be
done twice. It never asks Postgres (the recorder does) and never stops: with Redis away it waits and comes back.
"""

from __future__ import annotations

import math
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable

import redis
import structlog
from redis.client import PubSub

from autoscaler.cell import Cell, ReplicaReading, parse_status
from autoscaler.cell.giving_up import ABANDONED
from autoscaler.models import MachineState, ReplicaPhase
from autoscaler.types import StageName
from autoscaler.watch.liveness import Liveness
from autoscaler.watch.memory import MemoryKeeper
from autoscaler.watch.orphans import Orphans
from autoscaler.watch.recorder import (
    CellEmptied,
    Lost,
    MachineAnswers,
    MachineLeaves,
    MachineSilent,
    Recorder,
    Reported,
    WatchBegins,
)
from autoscaler.watch.slots import SlotKeeper
from autoscaler.watch.sweeper import Sweeper
from autoscaler.watch.table import KnownReplica
from workers.contract import ReplicaPhase as Phase
from workers.contract import ReplicaStatus, Stage, UpstreamRole

log = structlog.get_logger("corral.autoscaler")

SCAN_EVERY_S = 0.25
SLOW_SCAN_EVERY_S = 1.0
LOCK_LIFE_MS = 4000
ABANDONED_SCAN_EVERY_S = 60.0
AGENT_STALE_S = 6.0
NOTICE_NEARER_S = 2.0  # a notice that comes nearer by less is the same one
# Replicas whose requests are compared with what they say they serve; the rest take turns.
AUDITED_PER_SCAN = 64
MAX_MESSAGES = 1000  # taken in one turn, before the next scan
MAX_UNMATCHED = 1000
UNMATCHED_FOR_S = 10.0
MAX_KV_TOKENS = 1_000_000_000  # of one replica; a machine that says more is not believed
UNMATCHED_RETRY_S = 0.02
# A restarted Redis serves again within a second, and machines wait for what we restore.
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 0.5
_ID = re.compile(rb"[0-9a-f]{32}\Z")
_CHANGED_DEPLOYMENT = re.compile(rb"dep:([0-9a-f]{32})\Z")
_OVER = (Phase.FAILED, Phase.STOPPED)
_COMING_UP = (MachineState.PENDING, MachineState.ENROLLED, MachineState.RESUMING)
_NOT_YET = (MachineState.PENDING, MachineState.RESUMING)  # nobody beats there yet
_TAKE_NOTHING = (ReplicaPhase.DRAINING, ReplicaPhase.SLEEPING)
_HAVE_SERVED = (ReplicaPhase.READY, ReplicaPhase.SLEEPING, ReplicaPhase.WAKING, ReplicaPhase.DRAINING)


class Watcher:
    """One cell's watcher. `step` is one turn of at most SCAN_EVERY_S (tests call it with a clock of theirs)."""

    def __init__(
        self,
        cell: Cell,
        recorder: Recorder,
        *,
        stale_after_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cell = cell
        self.recorder = recorder
        self.owner = f"{socket.gethostname()[:20]}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.is_active = False
        self._clock = clock
        self._beats = Liveness(stale_after_s)
        self._memory = MemoryKeeper(cell)
        self._agents = Liveness(AGENT_STALE_S)
        self._ends_at_s: dict[str, float] = {}  # machines under notice: when they end, as last passed on
        self._orphans = Orphans()
        self._audited_last = ""
        self._slots = SlotKeeper(cell)
        self._sweeper = Sweeper(cell)
        self._queued: dict[str, int] = {}  # requests waiting by deployment, at the last slow scan
        self._pubsub: PubSub | None = None
        self._run_id = ""
        self._next_scan_s = 0.0
        self._next_slow_scan_s = 0.0
        self._next_abandoned_scan_s = 0.0
        self._abandoned: set[str] = set()
        self._told: dict[str, tuple[str, str]] = {}  # replica -> (phase, code) as last passed on
        self._adapters: dict[str, tuple[str, ...]] = {}  # replica -> those in its memory, as last noted
        self._over: set[str] = set()  # replicas withdrawn, until the table forgets them
        self._unmatched: dict[str, tuple[float, str, ReplicaStatus]] = {}
        self._matched_version = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # -- life

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="corral-watcher", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        n_failures = 0
        while not self._stop.is_set():
            try:
                self.step()
                n_failures = 0
            except Exception as error:  # a watcher that stopped would leave dead replicas in the routes
                n_failures += 1
                if n_failures == 1 or not isinstance(error, redis.RedisError):
                    log.warning("watcher.failed", error=f"{type(error).__name__}: {error}")
                self._disconnected()
                self._stop.wait(min(BACKOFF_FIRST_S * 2 ** min(n_failures - 1, 10), BACKOFF_MAX_S))
        try:
            self.cell.leave_watch(self.owner)
        except redis.RedisError as error:
            log.info("watcher.lock_left_behind", error=type(error).__name__)

    def step(self, timeout_s: float = SCAN_EVERY_S) -> None:
        """Hear what was published, scan when it is due. Raises redis.RedisError."""
        if not self._hold_lock():
            self._stop.wait(timeout_s)
            return
        if self._unmatched:  # the table that they wait for is a few milliseconds away
            timeout_s = min(timeout_s, UNMATCHED_RETRY_S)
        self._hear(max(0.0, min(timeout_s, self._next_scan_s - self._clock())))
        now_s = self._clock()
        if self._unmatched and self.recorder.table.version != self._matched_version:
            self._matched_version = self.recorder.table.version
            self._match(now_s)
        if now_s >= self._next_scan_s:
            self._next_scan_s = now_s + SCAN_EVERY_S
            self._scan(now_s)

    def _hold_lock(self) -> bool:
        now_active = self.cell.hold_watch(self.owner, LOCK_LIFE_MS)
        if now_active and not self.is_active:
            self._become_active()
        elif self.is_active and not now_active:
            log.warning("watcher.superseded")
            self._disconnected()
        self.is_active = now_active
        return now_active

    def _become_active(self) -> None:
        """First turn, or first after Redis was away: whatever was published meanwhile is lost, so all is read."""
        run_id = self.cell.run_id()
        self.cell.load_machine_scripts()
        self._pubsub = self.cell.pubsub()
        now_s = self._clock()
        self._beats.forgive(now_s)
        self._agents.forgive(now_s)
        self._told.clear()
        self._adapters.clear()
        self._next_scan_s = self._next_slow_scan_s = now_s
        if run_id != self._run_id:
            self._restore_users()
            self.recorder.note(CellEmptied() if self._run_id else WatchBegins())
            self._run_id = run_id
        log.info("watcher.active", owner=self.owner)

    def _restore_users(self) -> None:
        """An empty Redis knows no machine: they must be able to come back although Postgres may be away, too."""
        for mid, digests in self.recorder.table.digests.items():
            if not self.cell.has_user(mid):
                self.cell.set_user(mid, *digests)
                log.warning("machine.user_restored", machine=mid)

    def _disconnected(self) -> None:
        self.is_active = False
        pubsub, self._pubsub = self._pubsub, None
        if pubsub is not None:
            try:
                pubsub.close()
            except redis.RedisError as error:
                log.info("watcher.close_failed", error=type(error).__name__)

    # -- hearing

    def _hear(self, timeout_s: float) -> None:
        assert self._pubsub is not None
        wakes: dict[str, None] = {}
        message = self._pubsub.get_message(timeout=timeout_s)
        for _ in range(MAX_MESSAGES):
            if message is None:
                break
            if message["type"] == "pmessage":
                self._heard(self.cell.keys.machine_of_channel(message["channel"]), message["data"])
            elif message["channel"] == self.cell.keys.wake_channel.encode():
                if _ID.match(message["data"]):
                    wakes[message["data"].decode()] = None
            elif (changed := _CHANGED_DEPLOYMENT.match(message["data"])) is not None:
                self.recorder.want_tick(changed[1].decode())
            message = self._pubsub.get_message(timeout=0)
        for did in wakes:
            self._woken(did)

    def _woken(self, did: str) -> None:
        """A request waits and nothing serves it: the tick comes first, the word to the client beside it."""
        self.recorder.want_tick(did)
        if self.cell.last_stage(did)[0] in ("", StageName.READY):
            waking = Stage(deployment=did, stage=StageName.WAKING, at_ms=time.time_ns() // 1_000_000)
            self.cell.publish_stage(waking)

    def _heard(self, mid: str, payload: bytes) -> None:
        status = parse_status(payload)
        if status is not None and not status.replica:  # of the agent itself: what is new is in its beat
            self._next_scan_s = self._next_slow_scan_s = self._clock()
            return
        if status is None or not _ID.match(status.replica.encode()):
            return
        known = self.recorder.table.replicas.get(status.replica)
        if known is None:  # ordered a moment ago by somebody else, or over: the next table knows
            if len(self._unmatched) < MAX_UNMATCHED:
                self._unmatched[status.replica] = (self._clock() + UNMATCHED_FOR_S, mid, status)
            self.recorder.want_table()
        elif known.machine == mid:
            self._reported(known, status)
        else:
            log.warning("watcher.foreign_report", machine=mid, replica=status.replica)

    def _reported(self, known: KnownReplica, status: ReplicaStatus) -> None:
        """Routes first, rows later: a request must not wait for Postgres."""
        is_news = self._told.get(known.id) != (status.phase, status.code)
        # One that is told to wake before it slept has nothing new to say.
        woke = known.phase is ReplicaPhase.WAKING and status.phase is Phase.READY
        if known.id in self._over or not (is_news or woke):
            return
        if status.phase is Phase.READY and known.phase not in _TAKE_NOTHING:
            self._enrol(known, status.slots, status.kv_tokens)
        elif status.phase is Phase.DRAINING:
            self.cell.drain(known.id)
        elif status.phase in _OVER:
            self._withdraw(known)
        self._told[known.id] = (status.phase, status.code)
        self.recorder.note(Reported(known.machine, status))

    # -- scanning

    def _scan(self, now_s: float) -> None:
        table = self.recorder.table
        known = table.replicas
        self._over &= known.keys()
        self._told = {rid: told for rid, told in self._told.items() if rid in known}
        self._adapters = {rid: held for rid, held in self._adapters.items() if rid in known}
        self._beats.forget_all_but(set(known))
        self._agents.forget_all_but(set(table.machines))
        readings = self.cell.read_replicas([(r.id, r.machine, r.serves) for r in known.values()])
        for replica in known.values():
            reading = readings[replica.id]
            if replica.id not in self._over:
                self._judge(replica, reading, now_s)
                if replica.share is not None and reading.beat is not None and reading.beat.handed_back:
                    # What a canary could not begin is served elsewhere: nothing that ran goes to a canary again.
                    self.cell.bind_again(replica.id, replica.machine, reading.beat.handed_back)
            elif reading.used > 0 or reading.is_routed:  # Redis came back without its end
                self._withdraw(replica)
        if now_s >= self._next_slow_scan_s:
            self._next_slow_scan_s = now_s + SLOW_SCAN_EVERY_S
            self._scan_reports(known)
            self._scan_agents(table.machines, now_s)
            self._scan_queues(table.deployments, known, readings)
            self.cell.finish_failed()
            self._sweeper.step(table.deployments)
            self._scan_abandoned(now_s)
            self._memory.look()
            self._audit([r for r in known.values() if readings[r.id].used > 0], now_s)
        for did in {r.deployment for r in known.values() if _is_overflow(r)}:
            self.cell.spill(did)
        serving = {rid: readings[rid] for rid in known if rid not in self._over}
        self._slots.adapt(known, serving, self._queued, table.deployments, now_s)

    def _judge(self, replica: KnownReplica, reading: ReplicaReading, now_s: float) -> None:
        """Dead when it should serve and its beat stands still; routed to when it serves and is not yet."""
        beat = reading.beat
        stale = self._beats.look(replica.id, None if beat is None else beat.seq, now_s)
        serves = replica.phase in _HAVE_SERVED or reading.state == "ready"
        if stale and serves:
            self._withdraw(replica)
            message = f"no heartbeat for {self._beats.stale_after_s:g} s"
            self.recorder.note(Lost(replica.id, "heartbeat_lost", message))
            # Its agent should have said so: perhaps there is none any more. Its own silence would tell 4 s later.
            self.recorder.note(MachineSilent(replica.machine))
            log.warning("replica.lost", replica=replica.id, machine=replica.machine)
        elif (
            beat is not None
            and not stale
            and beat.phase is Phase.READY
            and reading.state == ""
            and replica.phase not in _TAKE_NOTHING
        ):
            self._enrol(replica, beat.slots, beat.kv_tokens)  # its event was lost, or the cell was
        held = None if beat is None else beat.adapters
        if held is not None and reading.state and held != self._adapters.get(replica.id):
            self._adapters[replica.id] = held
            self.cell.note_adapters(replica.id, held)

    def _scan_reports(self, known: dict[str, KnownReplica]) -> None:
        """Events are heard at most once; the hashes say the same again."""
        reports = self.cell.read_actual([(r.id, r.machine) for r in known.values()])
        for rid, status in reports.items():
            self._reported(known[rid], status)

    def _scan_agents(self, machines: dict[str, MachineState], now_s: float) -> None:
        """A beat of a machine that the table calls pending: it has enrolled since the table was read."""
        for gone in self._ends_at_s.keys() - machines.keys():
            del self._ends_at_s[gone]
        stale: list[str] = []
        for mid, beat in self.cell.read_agents(list(machines)).items():
            coming_up = machines[mid] in _COMING_UP
            if coming_up and beat is not None and beat.phase is Phase.READY:
                self.recorder.note(MachineAnswers(mid))
            if beat is not None and beat.ends_in_ms is not None:
                ends_at_s = now_s + beat.ends_in_ms / 1000
                told_at_s = self._ends_at_s.get(mid, math.inf)
                if machines[mid] is not MachineState.DRAINING or ends_at_s < told_at_s - NOTICE_NEARER_S:
                    self._ends_at_s[mid] = ends_at_s
                    self.recorder.note(MachineLeaves(mid, beat.ends_in_ms))
            if machines[mid] not in _NOT_YET and self._agents.look(
                mid, None if beat is None else beat.seq, now_s
            ):
                stale.append(mid)
        if stale:
            enrolled = [mid for mid, state in machines.items() if state not in _NOT_YET]
            silences = {mid: self._agents.silent_s(mid, now_s) for mid in enrolled}
            n_silent = sum(1 for silent_s in silences.values() if silent_s > AGENT_STALE_S)
            for mid in stale:
                self.recorder.note(MachineSilent(mid, silences[mid], n_silent, len(enrolled)))
                self._agents.told(mid, now_s)

    def _scan_queues(
        self,
        deployments: tuple[str, ...],
        known: dict[str, KnownReplica],
        readings: dict[str, ReplicaReading],
    ) -> None:
        """Requests that wait although a slot is free are handed out; those without any replica wake it."""
        loads = self.cell.read_deployments(deployments)
        self._queued = {did: load.n_queued for did, load in loads.items() if load.n_queued}
        for did, load in loads.items():
            if load.n_queued == 0:
                continue
            if load.n_routed == 0:
                self.recorder.want_tick(did)
                continue
            for replica in known.values():
                reading = readings[replica.id]
                if replica.elsewhere is not None and replica.elsewhere.role is not UpstreamRole.REPLICA:
                    continue
                if replica.deployment == did and reading.state == "ready" and reading.used < reading.slots:
                    self._enrol(replica, reading.slots)
                    break

    def _scan_abandoned(self, now_s: float) -> None:
        """Requests that wait for a gateway that died: ended once their client may not come back any more.

        Looked at twice, because a gateway may be reconnecting just now.
        """
        if now_s < self._next_abandoned_scan_s:
            return
        self._next_abandoned_scan_s = now_s + ABANDONED_SCAN_EVERY_S
        before, self._abandoned = self._abandoned, set()
        for did in self._queued:
            self._abandoned |= self.cell.abandoned(did, time.time_ns() // 1_000_000)
        if found := sorted(before & self._abandoned):
            self.cell.give_up(found, ABANDONED)
            log.warning("queue.abandoned", n=len(found), first=found[0])

    def _audit(self, busy: list[KnownReplica], now_s: float) -> None:
        """What is bound to a replica and neither in its hands nor in its queue was lost on the way."""
        self._orphans.forget_all_but({r.id for r in busy})
        ids = sorted(r.id for r in busy)
        ids = [i for i in ids if i > self._audited_last] + [i for i in ids if i <= self._audited_last]
        turn = ids[:AUDITED_PER_SCAN]
        self._audited_last = turn[-1] if turn else ""
        machine_of = {r.id: r.machine for r in busy}
        for rid, (bound, report) in self.cell.read_serving([(i, machine_of[i]) for i in turn]).items():
            lost = self._orphans.look(rid, bound, report, now_s)
            if lost and (n := self.cell.bind_again(rid, machine_of[rid], lost)):
                log.warning("replica.requests_lost", replica=rid, n_requeued=n)

    def _match(self, now_s: float) -> None:
        """Reports that came before the table knew their replica."""
        for rid, (until_s, mid, status) in list(self._unmatched.items()):
            known = self.recorder.table.replicas.get(rid)
            if known is not None and known.machine == mid:
                self._reported(known, status)
            if known is not None or now_s > until_s:
                del self._unmatched[rid]

    # -- acting

    def _enrol(self, replica: KnownReplica, slots: int, kv_tokens: int = 0) -> None:
        """A machine may offer fewer slots than were asked for, never more. `kv_tokens` 0: as told before."""
        if replica.id in self._over:
            return
        elsewhere = replica.elsewhere
        stands_for = None
        if elsewhere is not None:
            if not replica.serves:
                return
            role = UpstreamRole.OVERFLOW if _is_overflow(replica) else UpstreamRole.REPLICA
            stands_for = (role.value, elsewhere.after_ms, elsewhere.price)
        wanted = self._slots.slots_for(replica, slots)
        n_given = self.cell.enrol(
            replica=replica.id,
            machine=replica.machine,
            deployment=replica.serves,
            slots=wanted,
            kv_tokens=min(max(kv_tokens, 0), MAX_KV_TOKENS),
            elsewhere=stands_for,
            share=replica.share,
            pace=replica.pace,
        )
        log.info("replica.enrolled", replica=replica.id, slots=wanted, n_given=n_given)

    def _withdraw(self, replica: KnownReplica) -> None:
        n_requeued = self.cell.withdraw_dead(replica.id)
        self.cell.drop_desired(replica.machine, replica.id)  # a hung one is killed by its agent
        self._over.add(replica.id)
        if n_requeued:
            log.warning("replica.requests_requeued", replica=replica.id, n=n_requeued)


def _is_overflow(replica: KnownReplica) -> bool:
    return replica.elsewhere is not None and replica.elsewhere.role is UpstreamRole.OVERFLOW
