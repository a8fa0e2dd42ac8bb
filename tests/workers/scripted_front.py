"""A replica front without an engine, run as a process by the tests: the request id says what its job does.

`python -m tests.workers.scripted_front '<JSON of FrontOptions>'`. Jobs: `quick…` returns, `hold…` waits until
cancelled, `tidy…` waits, catches the cancellation and returns, `raise…` fails with text that must not be
logged, `wait…` takes 50 ms, `slow…` 1 s. What happened is pushed to `<prefix>log` as `<event> <id>.<epoch>`.
"""

import asyncio
import dataclasses
import json
import logging
import sys
import threading

import uvloop

from workers import runtime
from workers.app import ConsumerConfig, make_app, run_worker
from workers.redis_client import Client


@dataclasses.dataclass(frozen=True)
class FrontOptions:
    redis_url: str
    key_prefix: str
    replica_id: str
    max_in_flight: int = 64
    stop_grace_s: float = 0.2
    cancel_grace_s: float = 2.0
    may_load_scripts: bool = False


class ScriptedJobs:
    def __init__(self, redis: Client, log_key: str) -> None:
        self._redis = redis
        self._log_key = log_key

    async def serve(self, request_id: str, epoch: int) -> None:
        name = f"{request_id}.{epoch}"
        await self._log("start", name)
        try:
            await self._act(request_id)
        except asyncio.CancelledError as exc:
            await self._log(f"cancelled:{','.join(map(str, exc.args))}", name)
            if not request_id.startswith("tidy"):
                raise
        else:
            await self._log("end", name)
        finally:
            print("over", name, flush=True)

    async def _act(self, request_id: str) -> None:
        if request_id.startswith(("hold", "tidy")):
            await asyncio.Event().wait()
        elif request_id.startswith("wait"):
            await asyncio.sleep(0.05)
        elif request_id.startswith("slow"):
            await asyncio.sleep(1.0)
        elif request_id.startswith("raise"):
            raise ValueError("text of a prompt")

    async def _log(self, event: str, name: str) -> None:
        await self._redis.call("RPUSH", self._log_key, f"{event} {name}")


def main() -> int:
    options = FrontOptions(**json.loads(sys.argv[1]))
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    loop = uvloop.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def connected() -> Client:
        client = Client(options.redis_url, name="scripted", may_load_scripts=options.may_load_scripts)
        await client.connect(5.0)
        return client

    redis = asyncio.run_coroutine_threadsafe(connected(), loop).result(10)
    jobs = ScriptedJobs(redis, f"{options.key_prefix}log")
    runtime.install(
        runtime.Runtime(
            loop, jobs.serve, stop_grace_s=options.stop_grace_s, cancel_grace_s=options.cancel_grace_s
        )
    )
    config = ConsumerConfig(options.redis_url, options.key_prefix, options.replica_id, options.max_in_flight)
    exit_code = run_worker(make_app(config), config, on_ready=lambda: print("ready", flush=True))
    asyncio.run_coroutine_threadsafe(redis.close(), loop).result(5)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
