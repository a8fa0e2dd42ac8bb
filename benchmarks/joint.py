"""The riskiest joint, measured: zygote → replica front → engine core, under Celery, with 512 requests in
flight.

`measure` forks a front whose main thread runs a stock Celery worker (LoopPool, atomic transport) and whose
second thread runs the engine's loop, then inspects, revokes, stops and kills it. Called by `manage.py bench
joint` and by tests/workers/agent/test_zygote.py, which holds it to what must be true; the figures are for
people.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import redis
import uvloop

from workers.agent.zygote_client import Zygote
from workers.agent.zygote_protocol import ChildExit, ForkSpec
from workers.app import ConsumerConfig, broker_keys, make_app, run_worker
from workers.contract import celery_message
from workers.engine.base import Engine, EngineProfile, EngineRequest, SamplingSpec
from workers.keys import MachineKeys

MACHINE = "benchjoint"
GRACE_S = 1.0
DONE, READY = "bench:done", "bench:ready"  # lists the front writes


@dataclass
class JointFigures:
    """What was seen. Times in seconds; `n_…` are counts of requests or messages."""

    zygote_start_s: float = 0.0
    fork_to_ready_s: float = 0.0
    engine_made_s: float = 0.0
    first_token_s: float = 0.0
    zygote_threads: list[str] = field(default_factory=list)
    threads_at_core_fork: list[list[str]] = field(default_factory=list)
    n_in_flight: int = 0
    n_in_engine: int = 0
    n_active_seen: int = 0
    n_served: int = 0
    n_distinct: int = 0
    tokens_per_s: float = 0.0
    n_revoked_running: int = 0
    revoke_to_idle_s: float = 0.0
    n_revoked_queued_served: int = 0
    sigterm_to_exit_s: float = 0.0
    n_running_at_sigterm: int = 0
    n_requeued: int = 0
    sigkill_to_core_gone_s: float = 0.0
    n_running_at_sigkill: int = 0
    n_unacked_after_kill: int = 0
    n_lost: int = 0
    exits: list[str] = field(default_factory=list)


# -- the front


def front(argument: dict[str, Any]) -> int:
    """Entry of the forked child.

    Engine first, while this process has one thread; loop, hub and worker after.
    """
    began_s = time.monotonic()
    profile = EngineProfile.from_json(argument["profile"])
    engine: Any
    if profile.engine == "vllm":
        from workers.engine.vllm import VllmEngine

        engine = VllmEngine(profile, Path(argument["model_dir"]))
    else:
        from workers.engine.toy import ToyEngine

        engine = ToyEngine(profile)
    made_s = time.monotonic()
    loop = uvloop.new_event_loop()
    threading.Thread(target=loop.run_forever, name="engine-loop", daemon=True).start()
    asyncio.run_coroutine_threadsafe(engine.start(), loop).result(60)
    report = {
        "engine_made_s": made_s - began_s,
        "first_token_s": time.monotonic() - made_s,
        "threads_at_core_fork": getattr(engine, "threads_at_fork", []),
        "core_pids": getattr(engine, "core_pids", []),
    }
    return _run_worker(engine, loop, report, argument)


def _run_worker(
    engine: Engine, loop: asyncio.AbstractEventLoop, report: dict[str, Any], argument: dict[str, Any]
) -> int:
    from workers import runtime

    store = redis.Redis.from_url(argument["redis_url"], socket_timeout=5)

    async def handle(request_id: str, epoch: int) -> None:
        """A generation whose length is the number behind the id's dot; its tokens and a hash leave by Redis."""
        n_tokens = int(request_id.rpartition(".")[2])
        prompt = engine.tokenize_chat([{"role": "user", "content": f"request {request_id}"}])
        sampling = SamplingSpec(max_tokens=n_tokens, temperature=0.0, ignore_eos=True)
        token_ids: list[int] = []
        async for delta in engine.generate(EngineRequest(request_id, prompt, sampling)):
            token_ids += delta.token_ids
        store.rpush(DONE, json.dumps([request_id, len(token_ids), hash(tuple(token_ids))]))

    runtime.install(runtime.Runtime(loop, handle, stop_grace_s=GRACE_S))

    async def publish_stats() -> None:
        while True:
            store.set("bench:running", engine.stats().n_running)
            await asyncio.sleep(0.02)

    asyncio.run_coroutine_threadsafe(publish_stats(), loop)

    def announce() -> None:
        store.rpush(READY, json.dumps(report))

    config = _consumer(argument["redis_url"], argument["replica"], argument["slots"])
    code = run_worker(make_app(config), config, on_ready=announce)
    asyncio.run_coroutine_threadsafe(engine.stop(), loop).result(10)
    return code


def _consumer(redis_url: str, replica: str, slots: int) -> ConsumerConfig:
    prefix = MachineKeys("c0", MACHINE).prefix
    return ConsumerConfig(redis_url, prefix, replica, max_in_flight=slots)


# -- the measurement


class Joint:
    """One zygote, one front at a time, and the messages pushed to it."""

    def __init__(self, redis_url: str, directory: Path, profile: EngineProfile, model_dir: str, slots: int):
        self.store = redis.Redis.from_url(redis_url, socket_timeout=5)
        self.replica = "r1"
        self.consumer = _consumer(redis_url, self.replica, slots)
        self.app = make_app(self.consumer)
        self.queue_key, self.unacked_key, _ = broker_keys(self.consumer)
        self.figures = JointFigures()
        self._redis_url, self._directory = redis_url, directory
        self._profile, self._model_dir, self._slots = profile, model_dir, slots
        self._n_forks = 0
        self.zygote: Zygote
        self.core_pids: list[int] = []

    async def start_zygote(self) -> None:
        began_s = time.monotonic()
        engines = ("vllm", "toy") if self._profile.engine == "vllm" else ("toy",)
        self.zygote = await Zygote.start(
            self._directory / "zygote.sock",
            log=self._directory / "zygote.log",
            engines=engines,
            preimport=("benchmarks.joint", "workers.pool", "workers.transport"),
            orphan_s=30.0,
        )
        self.figures.zygote_start_s = time.monotonic() - began_s
        if self._profile.engine not in self.zygote.engines:
            raise RuntimeError(f"zygote: {self.zygote.missing}")
        from workers.engine.forking import thread_names

        self.figures.zygote_threads = thread_names(self.zygote.pid)

    async def fork_front(self) -> int:
        """Fork a front and wait until it is ready; its pid."""
        self._n_forks += 1
        began_s = time.monotonic()
        pid = await self.zygote.fork(
            ForkSpec(
                entry="benchmarks.joint:front",
                tag=f"front-{self._n_forks}",
                log=str(self._directory / "front.log"),
                argument={
                    "redis_url": self._redis_url,
                    "replica": self.replica,
                    "slots": self._slots,
                    "profile": self._profile.to_json(),
                    "model_dir": self._model_dir,
                },
            )
        )
        await until(lambda: bool(self.store.llen(READY)), 90, "the front is ready", self._log_tail)
        report = json.loads(self.store.lpop(READY))  # type: ignore[arg-type]
        self.core_pids = report.pop("core_pids")
        self.figures.fork_to_ready_s = time.monotonic() - began_s
        for name, value in report.items():
            setattr(self.figures, name, value)
        return pid

    def push(self, name: str, n: int, n_tokens: int) -> list[str]:
        """`n` requests of `n_tokens` each; their ids. Celery's task id is `<id>.<epoch>`."""
        ids = [f"{name}-{i}.{n_tokens}" for i in range(n)]
        self.store.lpush(self.queue_key, *(celery_message(i, 1, self.replica) for i in ids))
        return ids

    def done(self) -> dict[str, tuple[int, int]]:
        """Finished requests: tokens and a hash of them, by id."""
        return {i: (n, h) for i, n, h in map(json.loads, self.store.lrange(DONE, 0, -1))}

    async def inspect(self, what: str) -> Any:
        """A stock `celery inspect` answer of the front."""
        inspector = self.app.control.inspect(timeout=5.0, limit=1)
        answer = await asyncio.to_thread(getattr(inspector, what))
        return (answer or {}).get(self.consumer.node_name)

    async def pool_stats(self) -> dict[str, Any]:
        return dict(((await self.inspect("stats")) or {}).get("pool", {}))

    def running(self) -> int:
        """Sequences in the engine's batch, as of 20 ms ago."""
        return int(self.store.get("bench:running") or 0)

    def n_unacked(self) -> int:
        return self.store.hlen(self.unacked_key)

    def n_queued(self) -> int:
        return self.store.llen(self.queue_key)

    async def next_exit(self, timeout_s: float = 30.0) -> ChildExit:
        async with asyncio.timeout(timeout_s):
            async for ended in self.zygote.exits():
                self.figures.exits.append(f"{ended.tag} {ended.describe()}")
                return ended
        raise AssertionError("unreachable")

    def _log_tail(self) -> str:
        log = self._directory / "front.log"
        return log.read_text()[-3000:] if log.exists() else "(no log)"


async def measure(
    redis_url: str,
    directory: Path,
    profile: EngineProfile,
    model_dir: str = "",
    n: int = 512,
    n_tokens: int = 64,
) -> JointFigures:
    """Run the whole story against an empty Redis; raises TimeoutError naming the condition that never came."""
    joint = Joint(redis_url, directory, profile, model_dir, slots=n)
    joint.store.script_load(_pop_script())
    await joint.start_zygote()
    try:
        pid = await joint.fork_front()
        await _throughput(joint, n, n_tokens)
        await _revoke(joint, n)
        await _sigterm(joint, pid)
        pid = await joint.fork_front()
        await _sigkill(joint, pid)
    finally:
        await joint.zygote.shutdown(grace_s=2.0)
    return joint.figures


async def _throughput(joint: Joint, n: int, n_tokens: int) -> None:
    ids = joint.push("load", n, n_tokens)
    began_s = time.monotonic()
    await until(lambda: joint.running() >= n // 2, 30, "half of the load is in the engine", joint._log_tail)
    joint.figures.n_in_engine = joint.running()
    await until(lambda: int(joint.store.llen(DONE)) >= n, 120, "all are served", joint._log_tail)
    joint.figures.tokens_per_s = n * n_tokens / (time.monotonic() - began_s)
    done = joint.done()
    joint.figures.n_served = sum(done[i][0] == n_tokens for i in ids)
    joint.figures.n_distinct = len({h for _, h in done.values()})


async def _revoke(joint: Joint, n: int) -> None:
    """All slots busy with endless requests; one more waits.

    Revoke the waiting one and then all running ones.
    """
    joint.store.delete(DONE)
    running = joint.push("endless", n, 1_000_000)
    await until(lambda: joint.n_unacked() == n, 30, "all are taken", joint._log_tail)
    joint.figures.n_in_flight = (await joint.pool_stats()).get("in_flight", 0)
    await until(lambda: joint.running() >= n // 2, 30, "the endless ones run", joint._log_tail)
    active = await joint.inspect("active")
    joint.figures.n_active_seen = len(active or ())
    (queued,) = joint.push("queued", 1, 1)
    revoke = joint.app.control.revoke
    await asyncio.to_thread(revoke, f"{queued}.1", reply=True, timeout=5.0, limit=1)
    began_s = time.monotonic()
    tasks = [f"{i}.1" for i in running]
    await asyncio.to_thread(revoke, tasks, terminate=True, reply=True, timeout=10.0, limit=1)
    await until(lambda: joint.running() == 0, 30, "the engine is idle after the revoke", joint._log_tail)
    joint.figures.revoke_to_idle_s = time.monotonic() - began_s
    await until(
        lambda: not joint.n_queued() and not joint.n_unacked(), 10, "nothing is left", joint._log_tail
    )
    stats = await joint.pool_stats()
    while stats.get("in_flight") and time.monotonic() < began_s + 60:  # acknowledged first, ended then
        stats = await joint.pool_stats()
    joint.figures.n_revoked_running = stats.get("cancelled", 0)
    joint.figures.n_revoked_queued_served = len(joint.done())


async def _sigterm(joint: Joint, pid: int) -> None:
    """64 endless requests cannot finish within the grace: all must be back in the queue, and no core be left."""
    joint.push("term", 64, 1_000_000)
    await until(lambda: joint.running() == 64, 30, "64 run", joint._log_tail)
    joint.figures.n_running_at_sigterm = 64
    began_s = time.monotonic()
    await joint.zygote.kill(pid, signal.SIGTERM)
    await joint.next_exit()
    joint.figures.sigterm_to_exit_s = time.monotonic() - began_s
    joint.figures.n_requeued = joint.n_queued()
    await until(lambda: not any(map(_alive, joint.core_pids)), 10, "the core has ended", joint._log_tail)


async def _sigkill(joint: Joint, pid: int) -> None:
    """The next front took the 64 over; killed, it leaves them on record, and its core dies with it."""
    joint.store.delete("bench:running")
    await until(lambda: joint.running() == 64, 30, "the 64 run again", joint._log_tail)
    joint.figures.n_running_at_sigkill = 64
    began_s = time.monotonic()
    await joint.zygote.kill(pid, signal.SIGKILL)
    await joint.next_exit()
    await until(lambda: not any(map(_alive, joint.core_pids)), 10, "the core has ended", joint._log_tail)
    joint.figures.sigkill_to_core_gone_s = time.monotonic() - began_s
    joint.figures.n_unacked_after_kill = joint.n_unacked()
    joint.figures.n_lost = 64 - joint.n_unacked() - joint.n_queued()


async def until(
    condition: Callable[[], bool], timeout_s: float, what: str, explain: Callable[[], str] = str
) -> None:
    """Poll a condition; TimeoutError saying what never came about, and why that may be."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end_s:
            raise TimeoutError(f"within {timeout_s} s it did not happen that {what}\n{explain()}")
        await asyncio.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _pop_script() -> str:
    from workers.scripts import POP

    return POP.source


def report(
    *, repeats: int = 1, progress: Callable[[str], None] = lambda text: None, n: int = 512
) -> dict[str, Any]:
    """`manage.py bench joint`: an embedded Redis, a tiny model on the real engine, `repeats` times the story."""
    import tempfile

    from infra.local.redis import EmbeddedRedis
    from workers.modelcache.tiny import make_tiny_model

    runs = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = make_tiny_model(directory / "tiny", max_model_len=4096)
        profile = EngineProfile(max_model_len=4096, max_num_seqs=n, kv_cache_bytes=512 << 20)
        for turn in range(repeats):
            progress(f"run {turn + 1} of {repeats}: {n} requests in flight on the tiny model")
            server = EmbeddedRedis(directory / f"redis-{turn}")
            server.start()
            try:
                server.wait_ready()
                runs.append(asdict(asyncio.run(measure(server.url(), directory, profile, str(model), n))))
            finally:
                server.destroy()
    return {"runs": runs}


def as_text(result: dict[str, Any]) -> str:
    """The figures of each run, one line per figure."""
    return "\n".join(
        f"{key:28} "
        + "  ".join(f"{r[key]:.3f}" if isinstance(r[key], float) else str(r[key]) for r in result["runs"])
        for key in result["runs"][0]
    )
