"""A cell with real scripts, a machine's restricted user, and a replica that serves in this very loop."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import redis

from controlplane.policy.flows import ANY_MS
from workers import scripts
from workers.accounting import Accounting
from workers.config import FrontConfig, ServeTuning
from workers.contract import (
    Endpoint,
    FrameEntry,
    JournalEntry,
    ReplicaSpec,
    RequestEnvelope,
    Sampling,
    UpstreamSecret,
    UpstreamSpec,
    UsageEvent,
    decode_frame,
    decode_journal_entry,
    decode_usage,
    encode,
)
from workers.control import ControlChannel
from workers.engine.base import EngineDead, EngineProfile
from workers.engine.toy import ToyEngine
from workers.engine.upstream.engine import UpstreamEngine
from workers.keys import CellKeys
from workers.publisher import Publisher
from workers.redis_client import Client
from workers.scripts import Script
from workers.serve import Server
from workers.spool import Spool

GATEWAY = "g1"
PASSWORD = "machine-password"
NO_LIMIT = -1


class Cell:
    """The trusted side."""

    def __init__(self, redis_url: str) -> None:
        self.url = redis_url
        self.keys = CellKeys("t0")
        self.r = redis.Redis.from_url(redis_url)
        for script in (*scripts.TRUSTED_SCRIPTS, *scripts.MACHINE_SCRIPTS):
            self.r.script_load(script.source)
        self.heard = self.r.pubsub(ignore_subscribe_messages=True)
        self.heard.psubscribe("t0:m:*:g:*")
        self.heard.get_message(timeout=1)  # the confirmation
        self.frames: list[FrameEntry] = []
        self.n_frames = 0
        self._n_requests = 0

    def close(self) -> None:
        self.heard.close()
        self.r.close()

    def run(self, script: Script, *args: Any) -> Any:
        return self.r.evalsha(script.sha, 0, *args)

    def add_machine(self, machine: str) -> str:
        """URL of its new user, with the very rules that enrolment gives."""
        keys = self.keys.machine(machine)
        rules = keys.acl_rules(hashlib.sha256(PASSWORD.encode()).hexdigest())
        self.r.execute_command("ACL", "SETUSER", keys.redis_user, *rules)
        return f"redis://{keys.redis_user}:{PASSWORD}@{self.url.rpartition('@')[2]}"

    def enrol(self, replica: str, machine: str = "m1", slots: int = 64) -> int:
        return int(self.run(scripts.ENROL, self.keys.prefix, now_ms(), replica, machine, "d1", slots))

    def admit(
        self,
        text: str = "badi hoga",
        *,
        max_tokens: int = 20,
        hold: int | None = None,
        money: tuple[int, int] | None = None,
        candidates: tuple[str, ...] = ("r1",),
        request: str = "",
        note: str = "cs:",
        n_carried: int = 0,
        **envelope: Any,
    ) -> str:
        """Admit a chat request bound to the first candidate; its id. `money`: (budget, rate per token)."""
        self._n_requests += 1
        request = request or f"{self._n_requests:032x}"
        sampling = envelope.pop("sampling", {})
        body = RequestEnvelope(
            id=request, org="o1", project="p1", key="k1", deployment="d1", model="toy",
            endpoint=envelope.pop("endpoint", Endpoint.CHAT),
            payload=envelope.pop("payload", None)
            or msgspec.json.encode({"messages": [{"role": "user", "content": text}]}),
            sampling=Sampling(max_tokens=max_tokens, temperature=0.0, **sampling),
            price_version="pv1", admitted_at_ms=now_ms(), stream=envelope.pop("stream", True), n_carried=n_carried,
            **envelope,
        )  # fmt: skip
        self.r.set(self.keys.body(request), encode(body))
        n_out = max_tokens if hold is None else hold
        budget, rate = money or (NO_LIMIT, 0)
        scopes: list[Any] = []
        for scope_id in ("k1", "p1", "o1"):
            scopes += [
                scope_id,
                NO_LIMIT,
                NO_LIMIT,
                NO_LIMIT,
                NO_LIMIT,
                budget if scope_id == "k1" else NO_LIMIT,
                100,
            ]
        if money:
            self.run(scripts.SEED, self.keys.prefix, "key", "k1", 0)
        answer = self.run(
            scripts.ADMIT, self.keys.prefix, now_ms(), request, "d1", GATEWAY, self._n_requests, "pv1", 10,
            n_out, n_out * rate, now_ms(), 100, 0, rate, note, n_carried, *scopes,
            0, n_out, "", 0, 60_000, 0, 0, ANY_MS, 0, *candidates,
        )  # fmt: skip
        assert answer[0] in (b"bound", b"queued"), answer
        return request

    def epoch(self, request: str) -> int:
        return int(self.r.hget(self.keys.request(request), "epoch") or 0)

    def cancel(self, request: str) -> bytes:
        return bytes(self.run(scripts.CANCEL, self.keys.prefix, now_ms(), request))

    def withdraw(self, replica: str, mode: str = "dead") -> list[Any]:
        return list(self.run(scripts.WITHDRAW, self.keys.prefix, now_ms(), replica, mode, 1))

    def listen(self) -> None:
        """Take in every frame published so far."""
        while (message := self.heard.get_message(timeout=0.005)) is not None:
            self.n_frames += 1
            self.frames += decode_frame(message["data"])

    def stream(self, request: str) -> list[FrameEntry]:
        """What the client of a request was sent, which must be without gap or overlap."""
        self.listen()
        number = int(self.r.hget(self.keys.request(request), "stream") or 0)
        entries = [entry for entry in self.frames if entry.stream == number]
        at = 0
        for entry in entries:
            assert entry.offset == at, f"offset {entry.offset}, expected {at}"
            at += entry.n
        return entries

    def text(self, request: str) -> str:
        return "".join(entry.text for entry in self.stream(request))

    def end(self, request: str) -> Any:
        entries = self.stream(request)
        return entries[-1].end if entries else None

    def journal(self, request: str, machine: str = "m1") -> list[JournalEntry]:
        raw = self.r.lrange(self.keys.machine(machine).journal(request), 0, -1)
        return [decode_journal_entry(entry) for entry in raw]

    def lease(self, request: str, machine: str = "m1") -> dict[bytes, bytes]:
        return dict(self.r.hgetall(self.keys.machine(machine).lease(request)))

    def usage(self, machine: str = "m1") -> list[UsageEvent]:
        entries = self.r.xrange(self.keys.machine(machine).usage)
        return [decode_usage(fields[b"u"]) for _, fields in entries]


@dataclass
class Serving:
    """A replica without Celery and processes: deliver messages by hand."""

    config: FrontConfig
    engine: ToyEngine
    client: Client
    spool: Spool
    publisher: Publisher
    server: Server
    accounting: Accounting
    deaths: list[EngineDead] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def deliver(self, request: str, epoch: int = 1) -> asyncio.Task[None]:
        task = asyncio.create_task(self.server.serve(request, epoch))
        self.tasks.append(task)
        return task


PROFILE = EngineProfile(engine="toy", toy_step_ms=0, max_model_len=512)


@asynccontextmanager
async def serving(
    cell: Cell,
    var: Path,
    *,
    replica: str = "r1",
    machine: str = "m1",
    profile: EngineProfile = PROFILE,
    tuning: ServeTuning | None = None,
    enrol: bool = True,
    redis_port: int | None = None,
    upstream: UpstreamSpec | None = None,
) -> AsyncIterator[Serving]:
    """A replica whose user is its machine's, enrolled, until the block ends. `redis_port`: of a proxy on loopback."""
    redis_url = cell.add_machine(machine)
    if redis_port is not None:
        redis_url = f"{redis_url.rpartition('@')[0]}@127.0.0.1:{redis_port}"
    config = FrontConfig(
        cell=cell.keys.cell,
        machine=machine,
        redis_url=redis_url,
        var_dir=str(var / machine),
        spec=ReplicaSpec(
            replica=replica,
            deployment="d1",
            model_digest="",
            model_source="",
            profile=profile.to_json(),
            slots=64,
            upstream=upstream,
        ),
        model_cache=str(var / machine / "models"),
        tuning=tuning or ServeTuning(),
    )
    config.dirs.create()
    client = Client(config.redis_url, name=replica, may_load_scripts=False)
    engine: Any = (
        ToyEngine(profile) if upstream is None else UpstreamEngine(upstream, UpstreamSecret("sk-test"))
    )
    spool = Spool(config.dirs.spool_file(replica), max_bytes=config.tuning.spool_max_bytes)
    await client.connect()
    publisher = Publisher(client, config.keys, config.tuning)
    deaths: list[EngineDead] = []
    server = Server(config, engine, client, publisher, spool, deaths.append)
    control = ControlChannel(
        config.redis_url, config.keys, replica, server.cancel, server.moved, server.grant
    )
    await control.start(5.0)
    await engine.start()
    if enrol:
        cell.enrol(replica, machine)
    made = Serving(
        config, engine, client, spool, publisher, server,
        Accounting(spool, client, config.keys, replica, config.tuning), deaths,
    )  # fmt: skip
    try:
        yield made
    finally:
        for task in made.tasks:
            task.cancel()
        await asyncio.gather(*made.tasks, return_exceptions=True)
        await control.close()
        await engine.stop()
        await client.close(drain_s=0.2)
        spool.close()


def now_ms() -> int:
    return time.time_ns() // 1_000_000
