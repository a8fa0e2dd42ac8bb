"""The replicas of this machine: start, stop, notice their ends, and remember both across restarts of the
agent.

One instance per agent, on its loop. Every start leaves a record on disk before the fork and an end leaves
one after it, so that an agent that comes back knows what it has started, and starts nothing twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from workers.agent import gpus
from workers.agent.fetching import fetch, loadable
from workers.agent.known import Known, Limits, judge, ms_since
from workers.agent.plan import Life, Step, plan
from workers.agent.records import Record, Records
from workers.agent.zygote_client import Zygote, ZygoteGone, ZygoteRefused
from workers.agent.zygote_protocol import ChildExit, ForkSpec
from workers.beat import read_beat
from workers.config import AgentConfig, FrontConfig, ServeTuning
from workers.contract import MACHINE_STOPPED, ReplicaPhase, ReplicaSpec, ReplicaStatus
from workers.control import SLEEP, WAKE
from workers.failure import ReplicaFailure, read_outcome
from workers.modelcache.store import ModelStore, ModelStoreError

log = logging.getLogger(__name__)

FRONT_ENTRY: Final = "workers.front:run"
MAX_REPLICAS: Final = 64
_HAND_BACK_S: Final = 5.0  # from "stop now" to the kill: time to journal and release


def without_urls(spec: ReplicaSpec) -> ReplicaSpec:
    """For disk and process: signed URLs are secrets, and of no use once the files are here."""
    return msgspec.structs.replace(spec, model_urls={}, model_siblings=[])


class Replicas:
    """See the module. `report` publishes a status; it must not block."""

    def __init__(
        self,
        config: AgentConfig,
        cell: str,
        redis_url: str,
        zygote: Callable[[], asyncio.Future[Zygote]],
        report: Callable[[ReplicaStatus], None],
        *,
        limits: Limits,
        tuning: ServeTuning,
        box_key: str = "",
        order: Callable[[str, str], None] = lambda *_: None,
    ) -> None:
        """order: tells a replica's front (replica, SLEEP or WAKE); it must not block."""
        self._order = order
        self._config = config
        self._dirs = config.dirs
        self._cell = cell
        self._redis_url = redis_url
        self._zygote = zygote
        self._report = report
        self._limits = limits
        self._tuning = tuning
        self._box_key = box_key
        self._records = Records(self._dirs)
        self._store = ModelStore(config.model_cache, budget_bytes=config.model_cache_bytes)
        self._known: dict[str, Known] = {}
        self._machine_ends = False
        self._devices = gpus.devices()
        self._tasks: set[asyncio.Task[None]] = set()
        for record in self._records.read_all():
            # What had ended has ended; the rest is presumed to run until adoption tells.
            life = Life.RUNNING if record.end is None else Life.ENDED
            self._known[record.spec.replica] = Known(record.spec, life, end=record.end, gpus=record.gpus)

    # -- seen from outside

    @property
    def alive(self) -> set[str]:
        """Replicas that may have a process."""
        return {replica for replica, known in self._known.items() if known.life is not Life.ENDED}

    @property
    def is_fetching(self) -> bool:
        """Whether a replica waits for its model."""
        return any(known.arriving or known.life is Life.STARTING for known in self._known.values())

    def ended(self) -> list[ReplicaStatus]:
        """How those ended that control still wants to know of."""
        return [known.end for known in self._known.values() if known.end is not None]

    def reconcile(self, desired: Mapping[str, ReplicaSpec] | None) -> list[str]:
        """Begin what `plan` says; returns at once. Answers the replicas to be deleted from `actual`."""
        forgotten = []
        lives = {replica: self._life(known) for replica, known in self._known.items()}
        for action in plan(desired, lives):
            if action.step is Step.START:
                assert desired is not None
                self._start(desired[action.replica])
            elif action.step is Step.STOP:
                spec = desired.get(action.replica) if desired else None
                self._stop(action.replica, spec.grace_s if spec else None)
            elif action.step in (Step.SLEEP, Step.WAKE):
                self._order(action.replica, SLEEP if action.step is Step.SLEEP else WAKE)
            else:
                self._forget(action.replica)
                forgotten.append(action.replica)
        return forgotten

    def _life(self, known: Known) -> Life:
        """As far as the agent knows; whether what runs is asleep, its own beat says."""
        if known.life is Life.RUNNING:
            beat = read_beat(self._dirs.beat(known.spec.replica))
            if beat is not None and beat.asleep:
                return Life.ASLEEP
        return known.life

    async def stop_all(self, grace_s: float) -> None:
        """The machine ends: everybody drains for `grace_s`, hands back what is left, and is gone."""
        self._machine_ends = True
        for replica in self.alive:
            self._stop(replica, grace_s)
        tasks = [known.task for known in self._known.values() if known.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=grace_s + _HAND_BACK_S + 1.0)

    def adopt(self, zygote: Zygote) -> None:
        """A zygote is there (again): what runs in it is ours; what we thought ran and does not, ended
        unseen.
        """
        running = {child.tag: child for child in zygote.adopted}
        for replica, child in running.items():
            known = self._known.get(replica)
            if known is None or known.life is Life.ENDED:
                log.error("killing a replica without a record", extra={"replica": replica, "pid": child.pid})
                self._tasks.add(task := asyncio.create_task(self._kill_stranger(zygote, child.pid)))
                task.add_done_callback(self._tasks.discard)
            elif known.life is Life.RUNNING:
                known.pid = child.pid
                known.started_at_s = time.monotonic() - max(0.0, time.time() - child.started_at_s)
                log.info("replica adopted", extra={"replica": replica, "pid": child.pid})
        for replica, known in self._known.items():
            if known.life is Life.RUNNING and known.pid == 0 and replica not in running:
                # Its end may be among those the zygote remembers; `on_exit` then says how it ended.
                asyncio.get_running_loop().call_later(1.0, self._lost, replica)

    def on_exit(self, ended: ChildExit) -> None:
        """A front has ended, by itself or not."""
        known = self._known.get(ended.tag)
        if known is None or known.life is Life.ENDED or known.pid not in (0, ended.pid):
            return
        outcome = read_outcome(self._dirs.outcome(ended.tag))
        if known.failure is not None:
            self._end(ended.tag, ReplicaPhase.FAILED, known.failure.code, known.failure.message)
        elif outcome is not None:
            self._end(ended.tag, ReplicaPhase.FAILED, outcome.code, outcome.message)
        elif ended.code == 0 or known.life is Life.STOPPING:
            self._end(ended.tag, ReplicaPhase.STOPPED)
        elif ended.signum is not None:
            hint = (
                "; often this means that the machine ran out of memory"
                if ended.signum == signal.SIGKILL
                else ""
            )
            self._end(ended.tag, ReplicaPhase.FAILED, "killed", f"the replica was {ended.describe()}{hint}")
        else:
            self._end(ended.tag, ReplicaPhase.FAILED, "crashed", f"the replica {ended.describe()}")

    def on_zygote_gone(self) -> None:
        """All fronts died with it."""
        for replica in self.alive:
            known = self._known[replica]
            if known.pid and known.life is Life.STOPPING:
                self._end(replica, ReplicaPhase.STOPPED)
            elif known.pid:
                self._end(replica, ReplicaPhase.FAILED, "zygote_gone", "the machine's fork server ended")

    async def check(self) -> None:
        """Once a second: kill what takes too long to start or shows no sign of life."""
        now_s = time.monotonic()
        for replica, known in list(self._known.items()):
            if known.life is Life.RUNNING and known.pid and known.failure is None:
                if known.arriving:
                    continue  # the fetch has limits of its own
                beat = read_beat(self._dirs.beat(replica))
                known.failure = judge(
                    known, beat.at_s if beat else None, bool(beat and beat.ready), now_s, self._limits
                )
                if known.failure is not None:
                    log.error("killed: %s", known.failure.message, extra={"replica": replica})
                    await self._signal(known, signal.SIGKILL, group=True)

    # -- starting

    def _start(self, spec: ReplicaSpec) -> None:
        taken = [known.gpus for known in self._known.values() if known.life is not Life.ENDED]
        known = self._known[spec.replica] = Known(spec, Life.STARTING, started_at_s=time.monotonic())
        known.gpus = gpus.assign(self._devices, taken, gpus.needed(spec.profile))
        if len(self.alive) > MAX_REPLICAS:
            self._end(
                spec.replica, ReplicaPhase.FAILED, "no_room", f"this machine runs {MAX_REPLICAS} replicas"
            )
            return
        self._records.write(Record(without_urls(spec), gpus=known.gpus))
        self._report(
            ReplicaStatus(replica=spec.replica, phase=ReplicaPhase.STARTING, deployment=spec.deployment)
        )
        log.info("starting", extra={"replica": spec.replica, "deployment": spec.deployment})
        known.task = asyncio.create_task(self._bring_up(known), name=f"start:{spec.replica}")

    async def _bring_up(self, known: Known) -> None:
        replica = known.spec.replica
        fetching = asyncio.create_task(fetch(self._store, known, opened := asyncio.Event()))
        try:
            model_dir = await loadable(self._store, fetching, opened, known)
            async with asyncio.timeout(self._limits.start_s):
                zygote = await asyncio.shield(self._zygote())
            if fetching.done() or not zygote.loads_arriving:
                model_dir = await fetching
            if known.life is not Life.STARTING:
                self._end(replica, ReplicaPhase.STOPPED)
                return
            known.arriving = not fetching.done()
            known.pid = await zygote.fork(self._fork_spec(known, model_dir))
        except ModelStoreError as error:
            self._end(replica, ReplicaPhase.FAILED, error.code, str(error))
        except (ZygoteGone, ZygoteRefused) as error:
            self._end(replica, ReplicaPhase.FAILED, "fork_failed", str(error)[:500])
        except TimeoutError:
            self._end(
                replica, ReplicaPhase.FAILED, "start_timeout", "the machine's fork server did not come up"
            )
        except OSError as error:
            self._end(replica, ReplicaPhase.FAILED, "fetch_failed", f"{type(error).__name__}: {error}")
        else:
            if known.life is Life.STARTING:  # else it was told to stop meanwhile
                known.life = Life.RUNNING
            log.info("forked", extra={"replica": replica, "pid": known.pid})
        finally:
            if known.arriving or not fetching.done():
                self._tasks.add(rest := asyncio.create_task(self._await_rest(known, fetching)))
                rest.add_done_callback(self._tasks.discard)

    async def _await_rest(self, known: Known, fetching: asyncio.Task[Path | None]) -> None:
        """The front loads meanwhile. If what comes is not the model, it ends before it serves."""
        try:
            await fetching
        except ModelStoreError as error:
            known.failure = known.failure or ReplicaFailure(error.code, str(error))
        except OSError as error:
            known.failure = known.failure or ReplicaFailure(
                "fetch_failed", f"{type(error).__name__}: {error}"
            )
        known.arriving = False
        known.started_at_s = time.monotonic()  # from here on it has no excuse to wait
        if known.life is Life.ENDED and known.claim is not None:
            known.claim.close()
        elif known.failure is not None and known.life is not Life.ENDED:
            log.error("killed: %s", known.failure.message, extra={"replica": known.spec.replica})
            await self._signal(known, signal.SIGKILL, group=True)

    def _fork_spec(self, known: Known, model_dir: Path | None) -> ForkSpec:
        known.stages_ms["agent"] = ms_since(known.started_at_s)
        front = FrontConfig(
            cell=self._cell,
            machine=self._config.machine,
            redis_url=self._redis_url,
            var_dir=str(self._dirs.root),
            spec=without_urls(known.spec),
            model_dir=str(model_dir) if model_dir else "",
            model_cache=str(self._config.model_cache),
            model_cache_bytes=self._config.model_cache_bytes,
            arriving=known.arriving,
            stages_ms=known.stages_ms,
            tuning=self._tuning,
            box_key=self._box_key,
        )
        argument: dict[str, Any] = msgspec.to_builtins(front)
        return ForkSpec(
            entry=FRONT_ENTRY,
            tag=known.spec.replica,
            argument=argument,
            log=str(self._dirs.log(known.spec.replica)),
            env={gpus.VARIABLE: ",".join(known.gpus)} if known.gpus else {},
        )

    # -- stopping

    def _stop(self, replica: str, grace_s: float | None) -> None:
        known = self._known[replica]
        if known.life in (Life.STOPPING, Life.ENDED):
            return
        known.life = Life.STOPPING
        log.info("stopping", extra={"replica": replica})
        grace_s = known.spec.grace_s if grace_s is None else grace_s
        before = known.task
        known.task = asyncio.create_task(self._bring_down(known, before, grace_s), name=f"stop:{replica}")

    async def _bring_down(self, known: Known, start: asyncio.Task[None] | None, grace_s: float) -> None:
        """Drain for `grace_s`, hand back what still runs, kill."""
        if start is not None:
            await asyncio.wait({start})
        for signum, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGQUIT, _HAND_BACK_S)):
            if known.life is Life.ENDED or not await self._signal(known, signum):
                break
            if await self._await_end(known, wait_s):
                return
        if known.life is not Life.ENDED:
            await self._signal(known, signal.SIGKILL, group=True)
            await self._await_end(known, 2.0)

    @staticmethod
    async def _await_end(known: Known, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await known.gone.wait()
        except TimeoutError:
            return False
        return True

    async def _signal(self, known: Known, signum: int, *, group: bool = False) -> bool:
        """False when there is nobody to signal."""
        if not known.pid:
            return False
        try:
            zygote = await asyncio.shield(self._zygote())
            await zygote.kill(known.pid, signum, group=group)
        except (ZygoteGone, ZygoteRefused, TimeoutError):
            return False
        return True

    @staticmethod
    async def _kill_stranger(zygote: Zygote, pid: int) -> None:
        with contextlib.suppress(ZygoteGone, ZygoteRefused, TimeoutError):
            await zygote.kill(pid, signal.SIGKILL, group=True)

    # -- ends and records

    def _end(self, replica: str, phase: ReplicaPhase, code: str = "", message: str = "") -> None:
        known = self._known[replica]
        if known.life is Life.ENDED:
            return
        known.life = Life.ENDED
        known.gone.set()
        if known.claim is not None:
            known.claim.close()
        if phase is ReplicaPhase.STOPPED and self._machine_ends:
            code, message = MACHINE_STOPPED, "its machine was stopped"
        known.end = ReplicaStatus(
            replica=replica,
            phase=phase,
            deployment=known.spec.deployment,
            code=code,
            message=message[:500],
            pid=known.pid,
            stages_ms=known.stages_ms,
        )
        self._records.write(Record(without_urls(known.spec), known.end))
        log.info("ended: %s", message or phase.value, extra={"replica": replica, "code": code})
        self._report(known.end)

    def _lost(self, replica: str) -> None:
        known = self._known.get(replica)
        if known is not None and known.life is Life.RUNNING and known.pid == 0:
            outcome = read_outcome(self._dirs.outcome(replica))
            code, message = (
                (outcome.code, outcome.message) if outcome else ("lost", "it ended while no agent ran")
            )
            self._end(replica, ReplicaPhase.FAILED, code, message)

    def _forget(self, replica: str) -> None:
        del self._known[replica]
        self._records.forget(replica)
