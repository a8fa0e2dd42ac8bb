"""The replica front: what a child of the zygote runs. Engine first, then the loop's thread, then Celery.

`run` is called on the main thread of a fresh, single-threaded process. The order is fixed: the engine forks
its core before any thread exists (workers/engine/vllm.py); then the loop starts on its own thread and
connects and warms up while Celery boots on this one. The replica is READY when both are. Exit code 0 after a
drain, EXIT_FAILED with an outcome file otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any, Final

import msgspec
import uvloop
from celery import signals

from workers import logs, runtime
from workers.app import ConsumerConfig, make_app, run_worker
from workers.config import EXIT_FAILED, EXIT_OK, FrontConfig
from workers.contract import UpstreamSecret, UpstreamSpec
from workers.engine.base import Engine, EngineProfile
from workers.failure import ReplicaFailure, check_model_dir, classify, write_outcome
from workers.modelcache.arrival import Arrival, ArrivalFailed
from workers.modelcache.uses import Uses
from workers.replica import Replica
from workers.watchdog import Watchdog

log = logging.getLogger(__name__)

_STOP_S: Final = 8.0
_SPARE_JOBS: Final = 32  # beyond the slots: attempts that end or are refused while new ones arrive


def run(argument: dict[str, object]) -> int:
    """Entry for the zygote: `argument` is a FrontConfig as plain data. Returns the exit code."""
    born_at_s = time.monotonic()
    config = msgspec.convert(argument, FrontConfig)
    logs.configure(machine=config.machine, replica=config.replica)
    try:
        engine = build_engine(config)
    except Exception as error:
        failure = classify(error, _own_log())
        log.error("engine cannot start: %s", failure.message, extra={"code": failure.code})
        write_outcome(config.dirs.outcome(config.replica), failure)
        return EXIT_FAILED
    return _serve(config, engine, born_at_s)


def build_engine(config: FrontConfig) -> Engine:
    """The engine of the profile, constructed but not started. Must be called before any thread exists."""
    if config.spec.upstream is not None:
        return _upstream_engine(config, config.spec.upstream)
    profile = EngineProfile.from_json(dict(config.spec.profile))
    if profile.engine == "toy":
        from workers.engine.toy import ToyEngine

        return ToyEngine(profile)
    model_dir = Path(config.model_dir)
    check_model_dir(model_dir, arriving=config.arriving)
    # For as long as this process lives nobody evicts its weights, also while its machine has no agent.
    with contextlib.suppress(OSError):  # a directory that is no store is evicted by nobody
        Uses(model_dir.parent / ".uses").claim(model_dir.name, counts=False)
    from workers.engine.vllm import VllmEngine

    if not config.arriving:
        return VllmEngine(profile, model_dir)
    arrival: Arrival | None = None
    try:
        arrival = Arrival(model_dir)
        engine = VllmEngine(profile, model_dir, arriving=True)
        arrival.verified()  # its loader has asked that too: no engine serves what is not the model
    except Exception as error:
        raise _failure_of(arrival, error) from error
    finally:
        if arrival is not None:
            arrival.close()
    return engine


def _failure_of(arrival: Arrival | None, error: Exception) -> Exception:
    """Why it could not start: the fetch, if that failed, and only else what the engine says of it."""
    told = error if isinstance(error, ArrivalFailed) else arrival and arrival.failure()
    return ReplicaFailure(told.code, told.message) if told else error


def _upstream_engine(config: FrontConfig, spec: UpstreamSpec) -> Engine:
    """Raises BoxError where the credentials were sealed for another machine: it must be ordered anew."""
    from workers.engine.upstream.engine import UpstreamEngine
    from workers.sealed import open_box

    secret = UpstreamSecret()
    if spec.sealed:
        secret = msgspec.json.decode(open_box(config.box_key, spec.sealed), type=UpstreamSecret)
    return UpstreamEngine(spec, secret)


def _serve(config: FrontConfig, engine: Engine, born_at_s: float) -> int:
    loop = uvloop.new_event_loop()
    threading.Thread(target=_run_loop, args=(loop,), name="engine-loop", daemon=True).start()
    replica = Replica(config, engine, born_at_s)
    starting = asyncio.run_coroutine_threadsafe(replica.start(), loop)
    grace_s = config.spec.grace_s
    runtime.install(runtime.Runtime(loop, replica.serve, stop_grace_s=grace_s))
    signals.worker_shutting_down.connect(lambda **_: loop.call_soon_threadsafe(replica.drain), weak=False)

    def on_hang(failure: ReplicaFailure) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(replica.fail, failure)  # says goodbye if the loop still turns
        time.sleep(1.0)
        write_outcome(config.dirs.outcome(config.replica), failure)
        os._exit(EXIT_FAILED)

    watchdog = Watchdog(replica.glance, config.tuning.hang_s, on_hang)
    watchdog.start()
    consumer = ConsumerConfig(
        redis_url=config.redis_url,
        key_prefix=config.keys.prefix,
        replica_id=config.replica,
        max_in_flight=config.spec.slots + _SPARE_JOBS,
    )

    def on_ready() -> None:
        loop.call_soon_threadsafe(replica.consumer_ready)

    try:
        run_worker(make_app(consumer), consumer, on_ready)
    except Exception as error:
        loop.call_soon_threadsafe(
            replica.fail, ReplicaFailure("consumer_died", f"consumer: {type(error).__name__}")
        )
        log.exception("the consumer ended")
    watchdog.stop()
    starting.cancel()
    stopping = asyncio.run_coroutine_threadsafe(replica.stop(), loop)
    with contextlib.suppress(Exception):
        stopping.result(_STOP_S)
    return EXIT_FAILED if replica.failed else EXIT_OK


def _run_loop(loop: Any) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()


def _own_log() -> Path | None:
    """The file our stderr goes to, if it is one."""
    path = Path("/proc/self/fd/2").resolve()
    return path if path.is_file() else None
