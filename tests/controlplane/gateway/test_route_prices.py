"""What a token costs at an endpoint elsewhere weighs in routing: of two that are otherwise equal, ours goes first."""

from __future__ import annotations

from tests.controlplane.gateway.harness import DEPLOYMENT, Machine, Running
from tests.workers.waiting import until


async def test_a_dear_replica_comes_last(gw: Running, machine: Machine) -> None:
    gateway, keys = gw.gateway, gw.gateway.keys
    for rid, price in (("a" * 32, "5.000"), ("b" * 32, "")):
        fields = ("mid", "m1", "dep", DEPLOYMENT, "state", "ready", "slots", 8, "used", 0)
        await gateway.redis.call("HSET", keys.replica(rid), *fields, *(("price", price) if price else ()))
        await gateway.redis.call("SADD", keys.replicas(DEPLOYMENT), rid)
    gateway.routes.candidates(DEPLOYMENT)
    gateway.routes.on_change(DEPLOYMENT)
    await until(lambda: len(gateway.routes.candidates(DEPLOYMENT)) >= 2, "both to be seen")
    for turn in range(8):
        ranked = gateway.routes.candidates(DEPLOYMENT, turn=turn)
        assert ranked.index("b" * 32) < ranked.index("a" * 32)
