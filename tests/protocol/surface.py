"""Gateways and clients on virtual time: the product's Gateway whole (app, dispatch, inbox, watch), and people.

Thin, and what they stand for: `Client.ask` is uvicorn and an SDK: it hands the ASGI app a request, reads what comes,
leaves when it likes, and sees its connection break when the gateway dies.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from controlplane.gateway import schemas
from controlplane.gateway.config import GatewayConfig
from controlplane.gateway.gateway import Gateway
from controlplane.gateway.toolcalls import CallReader, whole
from tests.controlplane.gateway.harness import PEPPER, ListLog
from tests.protocol.clock import Process
from workers.contract import Endpoint, FinishReason
from workers.engine import toy_text
from workers.engine.base import EngineRequest, SamplingSpec
from workers.engine.toy_calls import calls_of
from workers.engine.toy_sequence import Sequence

if TYPE_CHECKING:
    from tests.protocol.world import World

REQUEST_TIMEOUT_S = 60.0
MAX_RETURNS = 40
_AGAIN = ("request_ending", "request_in_progress", "cell_unavailable", "auth_unavailable")


class Door:
    """One gateway process."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.process = Process(world.loop, name, name, world.skew_s.get(name, 0.0))
        self.gateway: Gateway | None = None
        self.process.spawn(self._run())

    async def _run(self) -> None:
        config = GatewayConfig(
            redis_url=self.world.network.url, pg_dsn="", key_pepper=PEPPER, cell=self.world.keys.cell,
            name=self.process.name, request_timeout_s=REQUEST_TIMEOUT_S, stall_s=2.0, redis_grace_s=6.0,
            stream_buffer=self.world.stream_buffer,
        )  # fmt: skip
        gateway = Gateway(config, directory=self.world.directory, request_log=ListLog())
        await gateway.start()
        self.gateway = gateway
        await asyncio.Event().wait()

    @property
    def open(self) -> bool:
        return self.process.alive and not self.process.stopped and self.gateway is not None


@dataclass
class Answer:
    """What a client has seen of one request."""

    prompt: str
    max_tokens: int
    streaming: bool
    asked_at_s: float = 0.0
    request: str = ""
    status: int = 0
    code: str = ""
    text: str = ""
    finish: str = ""
    out_of_money: bool = False
    usage: dict[str, Any] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    over: bool = False
    left: bool = False  # the client hung up
    broken: bool = False  # the gateway did
    sampling: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    ended_at_s: float = 0.0
    leave: asyncio.Event = field(default_factory=asyncio.Event)
    # Comes back with Last-Event-ID, or with its Idempotency-Key, when its connection ends before the answer does.
    returns: bool = False
    idempotency_key: str = ""
    n_returns: int = 0

    @property
    def complete(self) -> bool:
        return self.over and not (self.left or self.broken or self.code) and bool(self.finish)


def reference(prompt: str, max_tokens: int, sampling: dict[str, Any] | None = None) -> tuple[str, int, str]:
    """(text, tokens, finish reason) of an undisturbed run."""
    if sampling and "tools" in sampling:
        return _called(prompt, max_tokens, sampling)
    ids = toy_text.tokenize_chat([{"role": "user", "content": prompt}])
    spec = SamplingSpec(max_tokens=max_tokens, **{"temperature": 0.0, **(sampling or {})})
    sequence = Sequence(EngineRequest("reference", ids, spec), (0, 0), 10_000)
    while sequence.finish is None:
        sequence.advance()
    text = sequence.take()[1]
    finish = "stop" if sequence.finish is FinishReason.STOP else "length"
    return text, sequence.n_out, finish


def _called(prompt: str, max_tokens: int, sampling: dict[str, Any]) -> tuple[str, int, str]:
    """The same of a request that must call a function."""
    body = _body(prompt, max_tokens, sampling)
    rule = schemas.parse(Endpoint.CHAT, body).calls
    assert rule is not None
    ids = toy_text.tokenize_chat(json.loads(body)["messages"], sampling["tools"])
    text = calls_of(rule, body, toy_text.seed_of(ids, None))
    assert text is not None
    calls = [
        {"function": {"name": n, "arguments": a}} for n, a in whole([CallReader().read(text, final=True)])[1]
    ]
    return _words({"tool_calls": calls}), len(toy_text.spelled(text)[0]), "tool_calls"


def _body(prompt: str, max_tokens: int, sampling: dict[str, Any], *, streaming: bool = False) -> bytes:
    return json.dumps(
        {
            "model": "tiny", "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens, "stream": streaming,
            "temperature": sampling.get("temperature", 0.0),
            **{k: v for k, v in sampling.items() if k != "temperature"},
        }
    ).encode()  # fmt: skip


def _words(said: dict[str, Any]) -> str:
    """What a message or a delta says, calls as `[name]arguments`."""
    text = said.get("content") or ""
    for call in said.get("tool_calls") or ():
        name = call["function"].get("name")
        text += (f"[{name}]" if name else "") + call["function"]["arguments"]
    return text


class Client:
    """One person with an API key."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.process = Process(world.loop, name)
        self.answers: list[Answer] = []

    def ask(
        self,
        prompt: str,
        max_tokens: int,
        *,
        streaming: bool = True,
        leave_after_s: float | None = None,
        slow_s: float = 0.0,
        key: str | None = None,
        door: Door | None = None,
        returns: bool = False,
        idempotency_key: str = "",
        **sampling: Any,
    ) -> Answer:
        answer = Answer(prompt, max_tokens, streaming, self.world.loop.now_s, sampling=sampling)
        answer.key = key or self.world.key
        answer.returns, answer.idempotency_key = returns, idempotency_key
        self.answers.append(answer)
        self.process.spawn(self._ask_until_answered(answer, leave_after_s, slow_s, door))
        return answer

    async def _ask_until_answered(
        self, answer: Answer, leave_after_s: float | None, slow_s: float, door: Door | None
    ) -> None:
        for _ in range(MAX_RETURNS):
            headers = {"idempotency-key": answer.idempotency_key} if answer.idempotency_key else {}
            if answer.n_returns and answer.streaming and answer.ids:
                headers["last-event-id"] = answer.ids[-1]
            outcome = await self._ask(answer, leave_after_s, slow_s, door, headers)
            can_return = bool(answer.idempotency_key or (answer.streaming and answer.ids))
            again = outcome in ("left", "broken") or (answer.n_returns and answer.code in _AGAIN)
            if not (answer.returns and can_return and again):
                break
            answer.n_returns += 1
            answer.code, answer.status, answer.left, answer.broken = "", 0, False, False
            answer.leave.clear()
            door, leave_after_s = None, None
            if not answer.ids:
                answer.text = ""
            await asyncio.sleep(self.world.rng.uniform(0.1, 1.0))
        answer.over = True
        answer.ended_at_s = self.world.loop.now_s

    async def _ask(
        self,
        answer: Answer,
        leave_after_s: float | None,
        slow_s: float,
        door: Door | None,
        headers: dict[str, str],
    ) -> None:
        world = self.world
        while door is None or not door.open:
            open_doors = [d for d in world.doors if d.open]
            if open_doors:
                door = world.rng.choice(open_doors)
            else:
                await asyncio.sleep(0.2)
        body = _body(answer.prompt, answer.max_tokens, answer.sampling, streaming=answer.streaming)
        gone = asyncio.Event()
        over = asyncio.Event()
        sse = bytearray()
        sent = False

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if gone.is_set():
                return  # nobody is there any more; a server's send returns all the same
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                for name, value in message["headers"]:
                    if name == b"x-request-id" and not answer.request:
                        answer.request = value.decode().removeprefix("req_")
                return
            sse.extend(message.get("body", b""))
            if not message.get("more_body"):
                _read(answer, bytes(sse))
                over.set()
            elif answer.streaming:
                end = sse.rfind(b"\n\n") + 2
                _read(answer, bytes(sse[:end]))
                del sse[:end]
            if slow_s:
                await asyncio.sleep(slow_s)

        scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions",
            "headers": [
                (b"authorization", f"Bearer {answer.key}".encode()), (b"content-type", b"application/json"),
                *((k.encode(), v.encode()) for k, v in headers.items()),
            ],
        }  # fmt: skip

        def broken() -> None:
            if not (over.is_set() or gone.is_set()):
                answer.broken = True
                over.set()

        door.process.on_death.append(broken)
        assert door.gateway is not None
        door.process.spawn(door.gateway.app(scope, receive, send))
        if leave_after_s is not None:
            world.loop.call_later(leave_after_s, answer.leave.set)
        leaves = asyncio.ensure_future(answer.leave.wait())
        await asyncio.wait((leaves, asyncio.ensure_future(over.wait())), return_when=asyncio.FIRST_COMPLETED)
        leaves.cancel()
        gone.set()
        if answer.broken:
            return "broken"
        answer.left = not over.is_set()
        return "left" if answer.left else "over"


def _read(answer: Answer, data: bytes) -> None:
    """Take what a body, or a part of an event stream, says."""
    if answer.status != 200 or not answer.streaming:
        if not data:
            return
        body = json.loads(data)
        if answer.status != 200:
            answer.code = body["error"]["code"] or "error"
            return
        choice = body["choices"][0]
        answer.text, answer.finish = _words(choice["message"]), choice["finish_reason"]
        answer.usage = body["usage"]
        answer.out_of_money = "budget" in str(body.get("corral")) or "budget" in str(choice.get("corral"))
        return
    for event in data.decode().split("\n\n"):
        for line in event.split("\n"):
            if line.startswith("id: "):
                answer.ids.append(line[4:])
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            payload = json.loads(line[6:])
            if "error" in payload:
                answer.code = payload["error"]["code"] or "error"
                continue
            for choice in payload["choices"]:
                answer.text += _words(choice["delta"])
                answer.finish = choice.get("finish_reason") or answer.finish
            answer.out_of_money = answer.out_of_money or b'"finish":"budget"' in line.encode()
            answer.usage = payload.get("usage") or answer.usage


class Ids:
    """uuid_utils for the gateway: ids of virtual time and seeded chance."""

    def __init__(self, world: World) -> None:
        self._world = world

    def uuid7(self) -> Any:
        import uuid

        ms = self._world.time.time_ns() // 1_000_000
        bits = self._world.rng.getrandbits(74)
        return uuid.UUID(int=ms << 80 | 7 << 76 | (bits >> 62) << 64 | 2 << 62 | (bits & ((1 << 62) - 1)))
