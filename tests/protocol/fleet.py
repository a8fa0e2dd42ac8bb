"""The machines' side on virtual time: replicas that are the product's own code, and what starts and feeds them.

The product's: Replica, Server, Publisher, Leases, Spool, Accounting, Reporter, ControlChannel, ToyEngine, DeadSpools,
judge. Thin, and what they stand for:

- `Consumer`: workers/transport.py (`POP`, restore on close), strategy.py and pool.py (one job per delivery, ack after);
- the watchdog loop: workers/watchdog.py `_run`;
- `Agent`: workers/agent/replicas.py `_bring_down` (drain, hand back, kill) and agent.py `_reconcile` and `_watch`.
"""

from __future__ import annotations

import asyncio
import json
import os
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import workers.accounting
import workers.engine.toy
import workers.replica
from tests.protocol.clock import Process, VirtualLoop, VirtualTime, current_process
from workers.agent.spools import DeadSpools
from workers.config import FrontConfig, ServeTuning
from workers.contract import ReplicaSpec
from workers.engine.base import EngineProfile
from workers.engine.toy import ToyEngine
from workers.redis_client import Client, RedisError
from workers.replica import Replica
from workers.scripts import POP
from workers.spool import Spool
from workers.watchdog import judge

if TYPE_CHECKING:
    from tests.protocol.world import World

GRACE_S = 1.0
TUNING = ServeTuning(republish_after_s=3.0, republish_max_s=6.0, hang_s=3.0)


class Front:
    """One replica's process."""

    def __init__(self, world: World, replica: str, machine: str, slots: int) -> None:
        self.world = world
        self.id = replica
        self.machine = machine
        self.process = Process(world.loop, f"front:{replica[-4:]}", machine, world.skew_s.get(machine, 0.0))
        self.profile = world.profile
        self.spec = ReplicaSpec(
            replica=replica, deployment=world.deployment, model_digest="", model_source="",
            profile=self.profile.to_json(), slots=slots, grace_s=GRACE_S,
        )  # fmt: skip
        self.config = FrontConfig(
            cell=world.keys.cell, machine=machine, redis_url=world.machine_url(machine),
            var_dir=str(world.var / machine), spec=self.spec, tuning=TUNING,
        )  # fmt: skip
        self.config.dirs.create()
        self.engine = ToyEngine(self.profile)
        self.replica: Replica | None = None
        self.consumer: Consumer | None = None
        self.process.on_death.append(self._release_files)
        self._main = self.process.spawn(self._run())

    async def _run(self) -> None:
        self.replica = Replica(self.config, self.engine, self.world.time.monotonic())
        self.replica.consumer_ready()
        await self.replica.start()
        if self.replica.failed is not None:
            return
        self.consumer = Consumer(self)
        self.process.spawn(self._watch())
        await self.consumer.run()

    async def _watch(self) -> None:
        assert self.replica is not None
        while True:
            await asyncio.sleep(0.5)
            failure = judge(self.replica.glance(), self.config.tuning.hang_s)
            if failure is not None:
                self.replica.fail(failure)
                return

    async def drain(self, grace_s: float = GRACE_S) -> None:
        """SIGTERM: say so, finish what is quick, hand the rest back, leave (front.py `_serve` after `run_worker`)."""
        replica, consumer = self.replica, self.consumer
        if replica is None or consumer is None or not consumer.consuming:
            return
        replica.drain()
        await consumer.stop(grace_s)
        await replica.stop()
        self.process.kill()

    def hang(self) -> None:
        """The engine stops stepping; the loop goes on."""
        self.engine._hung = True

    def die(self) -> None:
        """The engine core is killed; the front notices."""
        self.engine._die("killed")

    def _release_files(self) -> None:
        """What the kernel does for the dead: descriptors and locks go."""
        if self.replica is not None and hasattr(self.replica, "spool"):
            _close_fd(self.replica.spool)
        if self.replica is not None and hasattr(self.replica, "beat"):
            _close_fd(self.replica.beat)


def _close_fd(owner: Any) -> None:
    if owner._fd >= 0:
        os.close(owner._fd)
        owner._fd = -1


class Consumer:
    """The Celery consumer of one replica."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self.consuming = True
        self.wake = asyncio.Event()
        self.wake.set()
        keys = front.config.keys
        self.queue = keys.prefix + keys.queue_name(front.id)
        self._records = keys.unacked(front.id)
        self._jobs: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._unacked: dict[str, bytes] = {}
        assert front.replica is not None
        self._client: Client = front.replica.client

    async def run(self) -> None:
        world = self.front.world
        while self.consuming:
            with suppress(TimeoutError):
                async with asyncio.timeout(2.0):  # BLMOVE's
                    await self.wake.wait()
            self.wake.clear()
            while self.consuming:
                try:
                    args = (64, world.time.time())
                    popped = await self._client.evalsha(POP, (*self._records, self.queue), args)
                except RedisError:
                    await asyncio.sleep(0.2)
                    continue
                messages = popped[2::2]
                if not messages:
                    break
                for raw in messages:
                    self._take(raw)

    def _take(self, raw: bytes) -> None:
        message = json.loads(raw)
        request, epoch = json.loads(message["body"])[0]
        tag = message["properties"]["delivery_tag"]
        chance = self.front.world.chance
        if chance("message_lost"):
            self.front.process.spawn(self._ack(tag))
            return
        self._unacked[tag] = raw
        if (request, epoch) in self._jobs:
            return  # pool.py joins it to the job that runs
        late_s = chance.delay("message_late", 3.0)
        self._jobs[request, epoch] = self.front.process.spawn(self._job(request, epoch, tag, late_s))
        if chance("message_twice"):
            self.front.process.spawn(self._again(request, epoch, chance.rng.uniform(0.0, 4.0)))

    async def _job(self, request: str, epoch: int, tag: str, late_s: float) -> None:
        try:
            await asyncio.sleep(late_s)
            assert self.front.replica is not None
            await self.front.replica.serve(request, epoch)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # pool.py counts it and acknowledges; the lease decides what happens next
            self.front.world.note(f"job {request[-4:]}.{epoch} ended with {type(error).__name__}")
        finally:
            self._jobs.pop((request, epoch), None)
        self._unacked.pop(tag, None)
        await self._ack(tag)

    async def _again(self, request: str, epoch: int, after_s: float) -> None:
        """A second delivery of the same message."""
        await asyncio.sleep(after_s)
        assert self.front.replica is not None
        await self.front.replica.serve(request, epoch)

    async def _ack(self, tag: str) -> None:
        """acks.py: what a connection took down with it waits for the next one."""
        while True:
            with suppress(RedisError):
                await self._client.call("HDEL", self._records[0], tag)
                await self._client.call("ZREM", self._records[1], tag)
                return
            await asyncio.sleep(0.2)

    async def stop(self, grace_s: float) -> None:
        """Take nothing more, wait, cancel the rest, put their messages back."""
        self.consuming = False
        self.wake.set()
        if self._jobs:
            await asyncio.wait(list(self._jobs.values()), timeout=grace_s)
        jobs = list(self._jobs.values())
        for job in jobs:
            job.cancel("stopping")
        if jobs:
            await asyncio.wait(jobs, timeout=3.0)
        for tag, raw in self._unacked.items():
            with suppress(RedisError):
                await self._client.call("RPUSH", self.queue, raw)
                await self._client.call("HDEL", self._records[0], tag)
                await self._client.call("ZREM", self._records[1], tag)


class Agent:
    """What keeps a machine's replicas as desired, and owns the spools of the dead."""

    def __init__(self, world: World, machine: str) -> None:
        self.world = world
        self.machine = machine
        self.process = Process(world.loop, f"agent:{machine[-4:]}", machine, world.skew_s.get(machine, 0.0))
        self.process.spawn(self._run())
        self.process.on_death.append(self._release_files)
        self._spools: DeadSpools | None = None
        self._draining: set[str] = set()
        self._forgotten: set[str] = set()

    async def _run(self) -> None:
        keys = self.world.keys.machine(self.machine)
        client = Client(self.world.machine_url(self.machine), name="agent", may_load_scripts=False)
        client.start()
        dirs = _dirs(self.world, self.machine)
        self._spools = DeadSpools(dirs, client, keys, TUNING)
        while True:
            await asyncio.sleep(1.0)
            with suppress(RedisError):
                flat = await client.call("HGETALL", keys.desired)
                desired = {flat[i].decode(): flat[i + 1] for i in range(0, len(flat), 2)}
                if "generation" in desired:  # else the hash was lost and means nothing
                    self._follow(desired, client)
                await self._spools.tick(self._alive())

    def _alive(self) -> set[str]:
        return {f.id for f in self.world.fronts.values() if f.machine == self.machine and f.process.alive}

    def _follow(self, desired: dict[str, bytes], client: Client) -> None:
        for front in self.world.fronts.values():
            if front.machine != self.machine or front.id in self._forgotten:
                continue
            if not front.process.alive:
                if front.id not in desired:
                    self._forgotten.add(front.id)
                    self._forget(front, client)
            elif front.id not in self._draining and (
                front.id not in desired or b'"drain":true' in desired[front.id]
            ):
                self._draining.add(front.id)
                self.process.spawn(self._bring_down(front))

    async def _bring_down(self, front: Front) -> None:
        front.process.spawn(front.drain())
        await asyncio.sleep(GRACE_S + 5.0)  # _HAND_BACK_S
        if front.process.alive:
            self.world.note(f"agent kills {front.process.name}")
            front.process.kill()

    def _forget(self, front: Front, client: Client) -> None:
        keys = front.config.keys
        client.fire("HDEL", keys.actual, front.id)
        client.fire("DEL", *keys.unacked(front.id), keys.prefix + keys.queue_name(front.id))

    def _release_files(self) -> None:
        if self._spools is not None:
            for spool, _ in self._spools._open.values():
                _close_fd(spool)


def _dirs(world: World, machine: str) -> Any:
    from workers.config import MachineDirs

    dirs = MachineDirs(Path(world.var) / machine)
    dirs.create()
    return dirs


def _exit_of_process(code: int) -> None:
    current_process().kill()


async def _never(self: Any) -> None:
    await asyncio.Event().wait()


@contextmanager
def installed(loop: VirtualLoop) -> Iterator[None]:
    """Parts of the front that reach the operating system: exit ends the virtual process, fsync is left out, clocks
    given as default arguments are virtual."""
    time = VirtualTime(loop)
    real_os, real_sync = workers.replica.os, workers.accounting.Accounting.sync_forever
    spool_defaults = dict(Spool.__init__.__kwdefaults__ or {})
    engine_defaults = ToyEngine.__init__.__defaults__
    real_toy_os, workers.engine.toy.os = workers.engine.toy.os, types.SimpleNamespace(_exit=_exit_of_process)
    workers.replica.os = types.SimpleNamespace(_exit=_exit_of_process, getpid=os.getpid)
    workers.accounting.Accounting.sync_forever = _never
    Spool.__init__.__kwdefaults__ = {**spool_defaults, "now_s": time.monotonic}
    ToyEngine.__init__.__defaults__ = (time.monotonic,)
    try:
        yield
    finally:
        workers.engine.toy.os = real_toy_os
        workers.replica.os, workers.accounting.Accounting.sync_forever = real_os, real_sync
        Spool.__init__.__kwdefaults__ = spool_defaults
        ToyEngine.__init__.__defaults__ = engine_defaults


PROFILE = EngineProfile(engine="toy", toy_step_ms=40, max_model_len=256, max_num_seqs=16, toy_faults=True)
