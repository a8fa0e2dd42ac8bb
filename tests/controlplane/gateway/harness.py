"""A gateway on a real port and a machine that runs the real scripts on a real Redis; only the engine is
scripted.

The directory is the fake of its protocol (test_directory.py has the real one). Nothing here sleeps and hopes:
`until` polls a condition with a deadline.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import redis.asyncio as aioredis
import uvicorn

from billing.money import Nano
from controlplane.gateway.__main__ import Server, listen
from controlplane.gateway.config import GatewayConfig
from controlplane.gateway.directory import (
    BudgetRow,
    Changes,
    DeploymentRow,
    DirectoryUnavailable,
    EndCustomerRow,
    EndLeaseRow,
    KeyRecord,
    KeyRow,
    LimitsRow,
    OrganizationRow,
    PriceRow,
    ProjectRow,
    SloRow,
)
from controlplane.gateway.exchange import Protocol
from controlplane.gateway.gateway import Gateway
from controlplane.gateway.requestlog import RequestLine, RequestLog
from controlplane.tenants import api_keys
from tests.records import expanded
from workers import scripts
from workers.contract import (
    End,
    FinishReason,
    FrameEntry,
    JournalEntry,
    RequestEnvelope,
    WireError,
    decode_envelope,
    encode,
)
from workers.keys import RETENTION_MS, CellKeys

CELL = "t0"
KEYS = CellKeys(CELL)
PEPPER = b"pepper-of-the-tests-0123456789"
DEPLOYMENT = "d" * 32
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello there"}]}


async def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """The first true value of `condition` (may be a coroutine function)."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {condition}"
        await asyncio.sleep(0.005)


class FakeDirectory:
    """Keys in memory; `up` False stands for Postgres being away."""

    def __init__(self) -> None:
        self.up = True
        self.records: dict[str, KeyRecord] = {}
        self.spent: dict[tuple[str, str], int] = {}
        self.spent_for: dict[str, int] = {}
        self.end_leases: dict[str, int] = {}
        self.lease_left_ms, self.elsewhere, self.n_leased = 60_000, 0, 0
        self.in_window: dict[str, dict[str, int]] = {}
        self.noted: list[str] = []
        self.n_found = 0

    def add_key(
        self,
        *,
        key_limits: LimitsRow = LimitsRow(),  # noqa: B008 - frozen
        organization: str = "0" * 32,
        project: str = "1" * 32,
        zero_retention: bool = False,
        names: tuple[str, ...] = ("tiny",),
        context: int = 2048,
        **changes: Any,
    ) -> str:
        """A new key's text. `changes` go to its row."""
        new = api_keys.generate(PEPPER)
        n = len(self.records)
        price = PriceRow("c" * 32, 1_000_000, 500_000, 2_000_000)  # 1 and 2 nano-dollars a token
        self.records[new.lookup] = KeyRecord(
            key=KeyRow(f"{n:032x}", new.lookup, new.digest.hex(), key_limits, **changes),
            project=ProjectRow(project, LimitsRow(), zero_retention=zero_retention),
            organization=OrganizationRow(organization, LimitsRow()),
            deployments=tuple(
                DeploymentRow(DEPLOYMENT if i == 0 else f"{i:032x}", name, context, price, SloRow())
                for i, name in enumerate(names)
            ),
        )
        return new.plaintext

    def limit_ends(self, key: str, *rows: EndCustomerRow) -> None:
        """Limits on the end customers of a key's project."""
        from msgspec.structs import replace as replace_struct

        lookup = api_keys.lookup_of(key)
        assert lookup
        self.records[lookup] = replace_struct(self.records[lookup], end_customers=rows)

    async def spent_for_nano(self, project: str, customer: str) -> Nano:
        self._require_up()
        return Nano(self.spent_for.get(f"{project}.{customer}", 0))

    async def lease_end(
        self, project: str, customer: str, *, used: Nano, idle: bool, need: Nano
    ) -> EndLeaseRow:
        """Four times what is needed of what `end_leases` has, of which the rest is elsewhere."""
        self._require_up()
        self.n_leased += 1
        most = self.end_leases[f"{project}.{customer}"]
        return EndLeaseRow(0, min(used + 4 * need, most), self.lease_left_ms, self.elsewhere)

    def change(self, key: str, **changes: Any) -> None:
        """Alter a key's row, as the console would."""
        lookup = api_keys.lookup_of(key)
        assert lookup
        record = self.records[lookup]
        from msgspec.structs import replace as replace_struct

        self.records[lookup] = replace_struct(record, key=replace_struct(record.key, **changes))

    async def find(self, lookup: str, digests: tuple[bytes, ...]) -> KeyRecord | None:
        self._require_up()
        self.n_found += 1
        record = self.records.get(lookup)
        return record if record and bytes.fromhex(record.key.digest) in digests else None

    async def rehash(self, lookup: str, old: bytes, new_lookup: str, new: bytes, pepper_id: str) -> None:
        self._require_up()
        record = self.records[lookup]
        if record.key.digest == old.hex():
            from msgspec.structs import replace as replace_struct

            key = replace_struct(record.key, lookup=new_lookup, digest=new.hex())
            del self.records[lookup]
            self.records[new_lookup] = replace_struct(record, key=key)
            self.noted += dict.fromkeys([f"key:{lookup}", f"key:{new_lookup}"])

    async def changes(self, watermark: str | None) -> Changes:
        self._require_up()
        noted, self.noted = self.noted, []
        return Changes("1", False, tuple(noted))

    async def spent_nano(self, scope: str, scope_id: str) -> Nano:
        self._require_up()
        return Nano(self.spent.get((scope, scope_id), 0))

    async def spent_in_window(self, budget: str, from_ms: int, until_ms: int, step_ms: int) -> dict[str, int]:
        self._require_up()
        return self.in_window.get(budget, {})

    def add_budget(self, key: str, **values: Any) -> str:
        """A window budget for a key's record; its id."""
        from msgspec.structs import replace as replace_struct

        lookup = api_keys.lookup_of(key)
        assert lookup
        record = self.records[lookup]
        row = BudgetRow(
            f"b{len(record.budgets):031x}", **({"name": "team", "scope": "key", "timezone": "UTC"} | values)
        )
        self.records[lookup] = replace_struct(record, budgets=(*record.budgets, row))
        return row.id

    def _require_up(self) -> None:
        if not self.up:
            raise DirectoryUnavailable


@dataclass
class Job:
    """One attempt of a request on a machine."""

    machine: Machine
    id: str
    epoch: int
    envelope: RequestEnvelope
    gateway: str
    stream: int
    offset: int
    attempt: int
    journal: list[bytes]
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    async def emit(
        self, text: str, n: int = 1, *, lost: bool = False, logprobs: list[object] | None = None
    ) -> str:
        """Flush one entry; `lost` journals it and publishes to nobody. Returns the verdict."""
        return await self._flush(text, n, None, lost, logprobs)

    async def finish(
        self,
        text: str = "",
        reason: FinishReason = FinishReason.STOP,
        *,
        n: int = 0,
        n_prompt: int = 7,
        n_cached: int = 0,
        error: WireError | None = None,
        lost: bool = False,
    ) -> str:
        end = End(reason, n_prompt, n_cached, self.offset + n, error, self.attempt)
        return await self._flush(text, n, end, lost)

    async def _flush(
        self, text: str, n: int, end: End | None, lost: bool, logprobs: list[object] | None = None
    ) -> str:
        frame = encode(FrameEntry(self.stream, 0, self.offset, n, text, end, logprobs))
        journal = encode(JournalEntry(0, self.offset, [9] * n, text, end, logprobs))
        machine = self.machine
        verdict = await machine.redis.evalsha(
            scripts.FLUSH.sha, 0, machine.keys.prefix, "nobody" if lost else self.gateway, RETENTION_MS, 1000,
            self.id, self.epoch, self.offset, self.offset + n, frame, journal, b"U" if end else b"",
        )  # fmt: skip
        if verdict in (b"a", b"c", b"m"):
            self.offset += n
        if verdict == b"m":
            await self.find_reader()
        return verdict.decode()

    async def find_reader(self) -> None:
        """Where the client reads now, as a replica finds out."""
        lease = self.machine.keys.lease(self.id)
        await self.machine.redis.hdel(lease, "moved")
        gateway, stream = await self.machine.redis.hmget(lease, "gw", "stream")
        self.gateway, self.stream = gateway.decode(), int(stream)


async def echo(job: Job) -> None:
    """Answers with three tokens."""
    for word in ("one ", "two ", "three"):
        await job.emit(word)
    await job.finish()


class Machine:
    """A replica's front as Redis sees it: takes messages, claims, serves each with `behaviour`."""

    def __init__(
        self,
        url: str,
        machine: str = "m1",
        replica: str = "r1",
        deployment: str = DEPLOYMENT,
        role: str = "",
    ) -> None:
        self.deployment = deployment
        self.role = role
        self.keys = KEYS.machine(machine)
        self.machine_id, self.replica = machine, replica
        self.redis = aioredis.Redis.from_url(url)
        self.behaviour: Callable[[Job], Awaitable[None]] = echo
        self.jobs: list[Job] = []
        self.hears_moves = True
        self.errors: list[BaseException] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, slots: int = 4) -> None:
        for script in (*scripts.TRUSTED_SCRIPTS, *scripts.MACHINE_SCRIPTS):
            await self.redis.script_load(script.source)
        await self.enrol(slots)
        self._spawn(self._consume())
        self._spawn(self._hear_cancels())

    async def enrol(self, slots: int = 4, kv_tokens: int = 0) -> None:
        args: tuple[Any, ...] = (self.replica, self.machine_id, self.deployment, slots, kv_tokens)
        if self.role:  # as of an endpoint elsewhere
            args = (*args, self.role, 60_000, 1)
        await self.redis.evalsha(scripts.ENROL.sha, 0, KEYS.prefix, _now_ms(), *args)

    async def withdraw(self, mode: str = "dead") -> list[Any]:
        return await self.redis.evalsha(
            scripts.WITHDRAW.sha, 0, KEYS.prefix, _now_ms(), self.replica, mode, 1
        )

    async def stop(self) -> None:
        pending = self._tasks
        while pending:  # redis-py swallows a cancellation that meets a connection being opened
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=0.5)
        await self.redis.aclose()
        assert not self.errors, self.errors

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)

    async def _consume(self) -> None:
        queue = self.keys.prefix + self.keys.queue_name(self.replica)
        while True:
            try:
                found = await self.redis.brpop([queue], timeout=1)
            except aioredis.ConnectionError:
                await asyncio.sleep(0.05)
                continue
            if found:
                request, epoch = json.loads(json.loads(found[1])["body"])[0]
                self._spawn(self._serve(request, epoch))

    async def _serve(self, request: str, epoch: int) -> None:
        try:
            granted = await self.redis.evalsha(
                scripts.CLAIM.sha, 0, self.keys.prefix, _now_ms(), request, epoch, self.replica
            )
            if granted[0] != b"ok":
                return
            _, body, gateway, stream, n, _, attempt = granted[:7]
            job = Job(
                self, request, epoch, decode_envelope(body), gateway.decode(), int(stream), int(n), int(attempt),
                granted[7:],
            )  # fmt: skip
            self.jobs.append(job)
            await self.behaviour(job)
        except (aioredis.ConnectionError, asyncio.CancelledError):
            pass
        except BaseException as error:
            self.errors.append(error)

    async def _hear_cancels(self) -> None:
        while True:
            try:
                listener = self.redis.pubsub()
                await listener.subscribe(self.keys.control_channel(self.replica))
                async for message in listener.listen():
                    if message["type"] == "message":
                        word = message["data"].decode()
                        for job in self.jobs:
                            if job.id == word:
                                job.cancelled.set()
                            elif "@" + job.id == word and self.hears_moves:
                                await job.find_reader()
            except aioredis.ConnectionError:
                await asyncio.sleep(0.05)


class ListLog(RequestLog):
    """Keeps the lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[RequestLine] = []

    def write(self, line: RequestLine) -> None:
        self.lines.append(line)


@dataclass
class Running:
    """A gateway that serves, with everything a test looks at."""

    gateway: Gateway
    directory: FakeDirectory
    http: httpx.AsyncClient
    url: str
    redis: aioredis.Redis
    log: ListLog
    key: str
    server: Server

    def auth(self, key: str | None = None) -> dict[str, str]:
        return {"authorization": f"Bearer {key or self.key}"}

    async def post(self, body: Any, *, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.http.post(path, content=content, headers={**self.auth(), **headers})

    @asynccontextmanager
    async def stream(
        self, body: dict[str, Any], path: str = "/v1/chat/completions", **headers: str
    ) -> AsyncIterator[Events]:
        async with self.http.stream(
            "POST", path, json={**body, "stream": True}, headers={**self.auth(), **headers}
        ) as response:
            yield Events(response)

    async def limit(self, scope: str, scope_id: str) -> dict[bytes, bytes]:
        return await self.redis.hgetall(KEYS.limits(scope, scope_id))

    async def record(self, request: str) -> dict[bytes, bytes]:
        return expanded(await self.redis.hgetall(KEYS.request(request)))


class Events:
    """Server-sent events of a response, one by one."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.status = response.status_code
        self.comments: list[str] = []
        self.ids: list[str] = []
        self._lines = response.aiter_lines()

    async def next(self) -> Any:
        """The next event's data, decoded; "[DONE]" as it is; None at the end of the body."""
        async for line in self._lines:
            if line.startswith(":"):
                self.comments.append(line[1:].strip())
            elif line.startswith("id: "):
                self.ids.append(line[4:])
            elif line.startswith("data: "):
                return line[6:] if line == "data: [DONE]" else json.loads(line[6:])
        return None

    async def comment(self) -> str:
        """The next comment, as its line arrives."""
        async for line in self._lines:
            if line.startswith(":"):
                self.comments.append(line[1:].strip())
                return self.comments[-1]
        raise AssertionError("the stream ended without a comment")

    async def rest(self) -> list[Any]:
        events = []
        while (event := await self.next()) is not None:
            events.append(event)
        return events


def text_of(events: list[Any]) -> str:
    """The text of chat or completion chunks."""
    out = []
    for event in events:
        if isinstance(event, dict):
            for choice in event.get("choices", ()):
                out.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
    return "".join(out)


def config(url: str, **changes: Any) -> GatewayConfig:
    """Short times, so that tests of timers take little."""
    fast = GatewayConfig(
        redis_url=url, pg_dsn="", key_pepper=PEPPER, cell=CELL, name="gw-test", comment_after_s=0.05, stall_s=0.3,
        keepalive_s=0.2, request_timeout_s=20, shutdown_grace_s=1, change_poll_s=0.05,
        cors_origins=("http://console.test",),
    )  # fmt: skip
    return replace(fast, **changes)


@asynccontextmanager
async def running(url: str, directory: FakeDirectory | None = None, **changes: Any) -> AsyncIterator[Running]:
    """A gateway under uvicorn on a free port."""
    directory = directory or FakeDirectory()
    log = ListLog()
    gateway = Gateway(config(url, **changes), directory=directory, request_log=log)
    await gateway.start()
    sock = listen("127.0.0.1", 0)
    server = Server(
        uvicorn.Config(
            gateway.app, http=Protocol, loop="none", lifespan="off", ws="none", log_config=None,
            access_log=False, timeout_graceful_shutdown=3, proxy_headers=False,
            ssl_certfile=gateway.config.tls_cert or None, ssl_keyfile=gateway.config.tls_key or None,
        ),
        gateway,
    )  # fmt: skip
    serving = asyncio.get_running_loop().create_task(server.serve(sockets=[sock]))
    scheme = "https" if gateway.config.tls_cert else "http"
    base = f"{scheme}://127.0.0.1:{sock.getsockname()[1]}"
    client = aioredis.Redis.from_url(url)
    async with httpx.AsyncClient(base_url=base, timeout=20, verify=scheme == "http") as http:
        try:
            await until(lambda: server.started)
            yield Running(gateway, directory, http, base, client, log, directory.add_key(), server)
        finally:
            server.should_exit = True
            server.force_exit = True
            await serving
            await gateway.close()
            await client.aclose()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
