"""A client of a deployment in a simulated region: admits requests and hears answers as a gateway does."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import msgspec

from autoscaler.cell import Cell
from controlplane import ids
from controlplane.policy.flows import ANY_MS
from workers.contract import End, Endpoint, FrameEntry, RequestEnvelope, Sampling, decode_frame, encode
from workers.scripts import ADMIT, SETTLE


@dataclass
class Asker:
    """`ask`, then `answer` until it is there."""

    cell: Cell
    deployment: str
    _frames: list[FrameEntry] = field(default_factory=list)
    _streams: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._heard = self.cell.redis.pubsub(ignore_subscribe_messages=True)
        self._heard.psubscribe(f"{self.cell.keys.cell}:m:*:g:*")
        self._heard.get_message(timeout=1)  # the confirmation

    def ask(self, text: str, max_tokens: int = 8) -> str:
        """Admits a request and wakes whoever scales; its id."""
        request, number, now_ms = ids.new_id().hex, len(self._streams) + 1, time.time_ns() // 1_000_000
        envelope = RequestEnvelope(
            id=request, org="o1", project="p1", key="k1", deployment=self.deployment, model="toy",
            endpoint=Endpoint.CHAT,
            payload=msgspec.json.encode({"messages": [{"role": "user", "content": text}]}),
            sampling=Sampling(max_tokens=max_tokens, temperature=0.0), price_version="pv1", admitted_at_ms=now_ms,
            stream=True,
        )  # fmt: skip
        keys, redis = self.cell.keys, self.cell.redis
        redis.set(keys.body(request), encode(envelope))
        scopes = [arg for scope in ("k1", "p1", "o1") for arg in (scope, -1, -1, -1, -1, -1, 100)]
        routed = [replica.hex for replica in self.cell.routed(self.deployment)]
        verdict = redis.eval(
            ADMIT.source, 0, keys.prefix, now_ms, request, self.deployment, "g1", number, "pv1", 10, max_tokens, 0,
            now_ms, 100, 0, 0, "cs:", 0, *scopes, 0, max_tokens, "", 0, 600_000, 0, 0, ANY_MS, 0, *routed,
        )  # fmt: skip
        assert verdict[0] in (b"queued", b"bound"), verdict
        self._streams[request] = number
        redis.publish(keys.wake_channel, self.deployment)
        return request

    def answer(self, request: str) -> tuple[str, End | None]:
        """(its text so far, its end), without gap or overlap."""
        while (message := self._heard.get_message(timeout=0.005)) is not None:
            self._frames += decode_frame(message["data"])
        text, at, end = "", 0, None
        for entry in self._frames:
            if entry.stream == self._streams[request] and entry.offset >= 0:  # else it asks for money
                assert entry.offset == at, f"offset {entry.offset}, expected {at}"
                at += entry.n
                text += entry.text
                end = entry.end or end
        return text, end

    def settle(self, request: str) -> None:
        """What usage intake does at its end: its place is free again."""
        redis, now_ms = self.cell.redis, time.time_ns() // 1_000_000
        redis.eval(SETTLE.source, 0, self.cell.keys.prefix, now_ms, request, 10, 8, 0, 60_000, 0)

    def close(self) -> None:
        self._heard.close()
