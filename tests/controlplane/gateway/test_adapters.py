"""LoRA adapters through a gateway: what a replica is told, which replica is asked, under whose budget."""

from __future__ import annotations

import msgspec

from controlplane.gateway.directory import AdapterRow, KeyRecord
from controlplane.gateway.dispatch import _salt
from controlplane.gateway.keycontext import context_of
from controlplane.policy.periods import Period
from controlplane.tenants import api_keys
from tests.controlplane.gateway.harness import (
    CHAT,
    DEPLOYMENT,
    KEYS,
    FakeDirectory,
    Machine,
    Running,
    running,
    until,
)

FORMAL, CASUAL = "f" * 32, "c" * 32
ADAPTERS = (
    AdapterRow(FORMAL, DEPLOYMENT, "tiny:formal", 1_000),
    AdapterRow(CASUAL, DEPLOYMENT, "tiny:casual"),
    AdapterRow("e" * 32, "9" * 32, "gone:formal"),
)


def add_adapters(directory: FakeDirectory, key: str) -> KeyRecord:
    lookup = api_keys.lookup_of(key)
    assert lookup
    record = msgspec.structs.replace(directory.records[lookup], adapters=ADAPTERS)
    directory.records[lookup] = record
    return record


async def test_a_replica_is_told_which_adapter_and_keeps_its_prompts_apart(
    gw: Running, machine: Machine
) -> None:
    gw.key = gw.directory.add_key()
    add_adapters(gw.directory, gw.key)
    names = [each["id"] for each in (await gw.http.get("/v1/models", headers=gw.auth())).json()["data"]]
    assert names == ["tiny", "tiny:casual", "tiny:formal"]
    for name, adapter in (("tiny:formal", FORMAL), ("tiny:casual", CASUAL), ("tiny", "")):
        answer = await gw.post({**CHAT, "model": name})
        assert (answer.status_code, answer.json()["model"]) == (200, name)
        told = machine.jobs[-1].envelope
        assert (told.adapter, told.model, told.deployment) == (adapter, name, DEPLOYMENT)
    salts = [job.envelope.cache_salt for job in machine.jobs]
    assert len(set(salts)) == 3
    assert salts[2] == "0" * 32  # without an adapter as ever: the organization's
    for name in ("tiny:none", "gone:formal", "tiny:", FORMAL, f"tiny:{FORMAL}"):
        missing = await gw.post({**CHAT, "model": name})
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found"), name


async def test_a_request_goes_where_its_adapter_is(redis_url: str) -> None:
    async with running(redis_url) as gw:
        add_adapters(gw.directory, gw.key)
        machines = [Machine(redis_url, f"m{n}", f"r{n}") for n in range(3)]
        for machine in machines:
            await machine.start()
        try:
            for replica, held in (("r0", CASUAL), ("r1", FORMAL), ("r2", "")):
                await gw.redis.hset(KEYS.replica(replica), "ad", held)
            await gw.post(CHAT)
            await until(lambda: len(gw.gateway.routes.candidates(DEPLOYMENT)) == 3)
            for machine in machines:
                machine.jobs.clear()
            for name in ("tiny:formal", "tiny:casual") * 3:
                assert (await gw.post({**CHAT, "model": name})).status_code == 200
            assert [len(machine.jobs) for machine in machines] == [3, 3, 0]
            assert {job.envelope.adapter for job in machines[1].jobs} == {FORMAL}
        finally:
            for machine in machines:
                await machine.stop()


async def test_a_budget_of_the_deployment_holds_for_its_adapters_too(gw: Running, machine: Machine) -> None:
    for model, refused in (("tiny", True), ("tiny:formal", True), ("tiny:casual", False)):
        gw.key = gw.directory.add_key()
        add_adapters(gw.directory, gw.key)
        budget = gw.directory.add_budget(gw.key, limit_nano=100, period=Period.DAY, model=model)
        gw.directory.in_window[budget] = {"0": 100}
        answer = await gw.post({**CHAT, "model": "tiny:formal"})
        assert answer.status_code == (429 if refused else 200), model


def test_a_key_may_be_bound_to_adapters_by_their_names() -> None:
    directory = FakeDirectory()
    record = add_adapters(directory, directory.add_key(aliases={"polite": "tiny:formal"}))
    assert context_of(record).deployments["polite"].adapter == FORMAL
    from controlplane.gateway.directory import ScopesRow

    bound = msgspec.structs.replace(record.key, scopes=ScopesRow(models=("tiny:formal",)), aliases=None)
    context = context_of(msgspec.structs.replace(record, key=bound))
    assert list(context.deployments) == ["tiny:formal"]
    formal = context.deployments["tiny:formal"]
    assert {each.adapter for each in formal.classes.values()} == {FORMAL}
    assert formal.classes.keys() == context_of(record).deployments["tiny"].classes.keys()
    assert _salt(context, formal) == f"{context.organization}.{FORMAL}"
