"""Usage events and machines' streams for the tests of intake."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import redis

from controlplane import ids
from tests.records import packed
from workers.contract import WITNESS_SPOOL, Endpoint, FinishReason, UsageEvent, encode
from workers.keys import CellKeys

KEYS = CellKeys("c0")
# The price that a migration puts there: $0.10 in, $0.025 cached, $0.40 out, per million tokens.
STANDARD = "019b76daa80070008000000000000001"


def new_hex() -> str:
    return ids.new_id().hex


@dataclass(frozen=True)
class Tenant:
    """Ids that go together."""

    org: str = field(default_factory=new_hex)
    project: str = field(default_factory=new_hex)
    key: str = field(default_factory=new_hex)
    deployment: str = field(default_factory=new_hex)


def event(tenant: Tenant, machine: str, **values: Any) -> UsageEvent:
    """A request that just ended: 100 prompt tokens, 40 of them cached, 20 completion tokens."""
    request_id = values.pop("request_id", None) or new_hex()
    defaults: dict[str, Any] = {
        "request_id": request_id,
        "org": tenant.org,
        "project": tenant.project,
        "key": tenant.key,
        "deployment": tenant.deployment,
        "replica": new_hex(),
        "machine": machine,
        "model": "toy-chat",
        "endpoint": Endpoint.CHAT,
        "n_prompt": 100,
        "n_cached": 40,
        "n_completion": 20,
        "attempts": 1,
        "finish_reason": FinishReason.STOP,
        "status": 200,
        "admitted_at_ms": ids.created_ms(ids.from_wire(request_id)),
        "first_token_ms": 80,
        "duration_ms": 900,
        "price_version": STANDARD,
    }
    return UsageEvent(**(defaults | values))


def altered(original: UsageEvent, **values: Any) -> UsageEvent:
    return msgspec.structs.replace(original, **values)


def deliver(client: redis.Redis, machine: str, payload: UsageEvent | bytes, *, spool: bool = False) -> str:
    """Put it into the machine's stream as flush does, or as the spool announces it; returns the entry id."""
    raw = payload if isinstance(payload, bytes) else encode(payload)
    witness = {"w": WITNESS_SPOOL} if spool else {}
    return client.xadd(KEYS.machine(machine).usage, {"u": raw, **witness}).decode()


def admit(client: redis.Redis, usage: UsageEvent, *, n_held: int = 1_000, money: int = 0) -> None:
    """The record that admission leaves (workers/lua/admit.lua), without limits."""
    client.hset(
        KEYS.request(usage.request_id),
        mapping={
            "state": "queued",
            "adm": packed(
                deployment=usage.deployment, price_version=usage.price_version, n_prompt_estimate=usage.n_prompt,
                n_output_asked=n_held, money_held_nano=money, admitted_at_ms=usage.admitted_at_ms, band="1",
                n_output_expected=n_held, prefixes="", note="cp:", key=usage.key, project=usage.project,
                organization=usage.org,
            ),
        },
    )  # fmt: skip
