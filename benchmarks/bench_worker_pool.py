"""What a task costs the replica's consumer: LoopPool over the atomic transport against stock Celery.

`python -m benchmarks.bench_worker_pool [--json] [--tasks N] [--wait-ms 0]`. Every arrangement is a worker
process of its own over an embedded Redis, with the backlog queued before it starts; CPU is user + system
time of the worker from its first task to its last, and of Redis over that span. The messages are those
of the gateway.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import redis

from infra.local.redis import EmbeddedRedis
from workers import runtime
from workers.app import ConsumerConfig, make_app, run_worker
from workers.contract import SERVE_TASK, celery_message
from workers.scripts import MACHINE_SCRIPTS

PREFIX = "c0:m:bench:"
ARRANGEMENTS = ("threads+stock", "threads+atomic", "loop+stock", "loop+atomic")


class Meter:
    """Counts tasks in the worker process and, at the last one, prints what the span cost."""

    def __init__(self, n_tasks: int, redis_url: str) -> None:
        self._n_tasks = n_tasks
        self._redis = redis.Redis.from_url(redis_url)
        self._lock = threading.Lock()
        self._n_started = self._n_ended = self._n_peak = 0
        self._start: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def begin(self) -> None:
        with self._lock:
            self._n_started += 1
            self._n_peak = max(self._n_peak, self._n_started - self._n_ended)
            if self._n_started == 1:
                self._start = self._clocks()

    def end(self) -> None:
        with self._lock:
            self._n_ended += 1
            if self._n_ended == self._n_tasks:
                spent = [now - then for now, then in zip(self._clocks(), self._start, strict=True)]
                worker_ms, redis_ms, wall_s = spent[0] * 1e3, spent[1] * 1e3, spent[2]
                result = {
                    "worker_ms_per_task": round(worker_ms / self._n_tasks, 4),
                    "redis_ms_per_task": round(redis_ms / self._n_tasks, 4),
                    "tasks_per_s": round(self._n_tasks / wall_s),
                    "n_peak": self._n_peak,
                }
                print(json.dumps(result), flush=True)

    def _clocks(self) -> tuple[float, float, float]:
        cpu = self._redis.info("cpu")
        return time.process_time(), cpu["used_cpu_sys"] + cpu["used_cpu_user"], time.monotonic()


def run_consumer(arrangement: str, redis_url: str, n_tasks: int, wait_s: float) -> None:
    """Body of the worker process; ends by SIGTERM."""
    pool, transport = arrangement.split("+")
    meter = Meter(n_tasks, redis_url)
    config = ConsumerConfig(redis_url, PREFIX, "bench", max_in_flight=512 if pool == "loop" else 64)
    app = make_app(config)
    if transport == "stock":
        app.conf.broker_transport = "redis"
    if pool == "threads":
        app.conf.worker_pool = "threads"

        def blocking(request_id: str, epoch: int) -> None:
            meter.begin()
            if wait_s:
                time.sleep(wait_s)
            meter.end()

        app.finalize()
        app.tasks.unregister(SERVE_TASK)
        app.task(name=SERVE_TASK, shared=False)(blocking)
    else:

        async def serve(request_id: str, epoch: int) -> None:
            meter.begin()
            if wait_s:
                await asyncio.sleep(wait_s)
            meter.end()

        import uvloop

        loop = uvloop.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        runtime.install(runtime.Runtime(loop, serve, stop_grace_s=0.1))
    run_worker(app, config)
    os._exit(0)


def measure(server: EmbeddedRedis, arrangement: str, n_tasks: int, wait_ms: float) -> dict[str, Any]:
    """Queue `n_tasks` messages, run one worker over them, return its figures."""
    with server.connect() as client:
        client.flushall()
        for script in MACHINE_SCRIPTS:
            client.script_load(script.source)
        queue = f"{PREFIX}replica.bench"
        for start in range(0, n_tasks, 1000):
            batch = [
                celery_message(f"{n:032x}", 1, "bench") for n in range(start, min(start + 1000, n_tasks))
            ]
            client.lpush(queue, *batch)
    command = [sys.executable, "-m", "benchmarks.bench_worker_pool", "--consumer", arrangement]
    command += ["--tasks", str(n_tasks), "--wait-ms", str(wait_ms)]
    environment = {**os.environ, "BENCH_REDIS_URL": server.url()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as worker:
        assert worker.stdout is not None
        line = worker.stdout.readline()
        worker.kill()
    return {"arrangement": arrangement, "wait_ms": wait_ms, **json.loads(line)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tasks", type=int, default=5000)
    parser.add_argument("--wait-ms", type=float, default=0.0)
    parser.add_argument("--only", choices=ARRANGEMENTS)
    parser.add_argument("--consumer", choices=ARRANGEMENTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.consumer:
        run_consumer(options.consumer, os.environ["BENCH_REDIS_URL"], options.tasks, options.wait_ms / 1e3)
        return
    server = EmbeddedRedis(Path(tempfile.mkdtemp(prefix="corral-bench-")))
    server.start()
    server.wait_ready()
    try:
        for arrangement in [options.only] if options.only else ARRANGEMENTS:
            row = measure(server, arrangement, options.tasks, options.wait_ms)
            if options.json:
                print(json.dumps(row), flush=True)
            else:
                print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    finally:
        server.destroy()


if __name__ == "__main__":
    main()
