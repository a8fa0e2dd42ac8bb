"""Which machines a starting replica may fetch its weights from, beside the object store."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import msgspec
import pytest
from django.utils import timezone

from autoscaler.models import Machine, MachineState
from autoscaler.siblings import MAX_NAMED, siblings_of
from tests.autoscaler.conftest import Scaling
from workers.contract import ModelShelf, PrefetchSpec, ReplicaSpec
from workers.modelcache.ticket import is_good

if TYPE_CHECKING:
    from controlplane.deployments.models import ModelVersion

DIGEST = "ab" * 32


def _holder(scaling: Scaling, n: int, digest: str = DIGEST, **row: Any) -> tuple[Machine, bytes]:
    key = bytes([n + 1]) * 32
    machine = Machine.objects.create(
        provider="fake", command_id=uuid4(), enroll_proof_digest=b"", pool_slot=n + 10,
        **{"cell": "c0", "state": MachineState.READY, "ready_at": timezone.now(), **row},
    )  # fmt: skip
    shelf = ModelShelf(digests=(digest,), url=f"http://10.0.0.{n + 1}:7437", key=key)
    cell = scaling.house.cell
    cell.redis.set(cell.keys.machine(machine.id.hex).models, msgspec.json.encode(shelf))
    return machine, key


def _from_a_bucket(scaling: Scaling, monkeypatch: pytest.MonkeyPatch) -> ModelVersion:
    """The deployment serves a version of an object store."""
    from controlplane.deployments import versions
    from controlplane.deployments.models import ModelSource

    for name, value in (
        ("AWS_ACCESS_KEY_ID", "k"),
        ("AWS_SECRET_ACCESS_KEY", "s"),
        ("AWS_DEFAULT_REGION", "r"),
    ):
        monkeypatch.setenv(name, value)
    version = versions.register(
        organization_id=scaling.world.organization.id,
        digest=DIGEST[::-1],
        name="weights",
        source_kind=ModelSource.OBJECT_STORE,
        source_uri="s3://models/x",
        size_bytes=2,
        max_model_len=64,
        manifest={"files": [{"name": "config.json"}]},
    )
    scaling.change(model_version_id=version.id)
    return version


def test_a_few_that_hold_it_and_stay_are_named_each_with_its_own_ticket(scaling: Scaling) -> None:
    cell, now_s = scaling.house.cell, time.time()
    keys = {f"10.0.0.{n + 1}": _holder(scaling, n)[1] for n in range(5)}
    _holder(scaling, 6, digest="cd" * 32)
    _holder(scaling, 7, state=MachineState.DRAINING)
    _holder(scaling, 8, ends_at=timezone.now())
    _holder(scaling, 9, cell="c1")
    named = siblings_of(uuid4(), DIGEST, cell, now_s)
    assert len(set(named)) == MAX_NAMED
    for url in named:
        where = urlsplit(url)
        assert where.path == f"/models/{DIGEST}/{{name}}"
        asked = {name: values[0] for name, values in parse_qs(where.query).items()}
        assert where.hostname in keys
        for host, key in keys.items():
            good = is_good(key, DIGEST, asked["ends"], asked["ticket"], now_s)
            assert good == (host == where.hostname), "a ticket opens one machine"
    others = {tuple(siblings_of(uuid4(), DIGEST, cell, now_s)) for _ in range(12)}
    assert len(others) > 1, "starts spread over the holders"


def test_a_machine_is_no_sibling_of_its_own_and_what_it_says_is_only_an_address(scaling: Scaling) -> None:
    cell = scaling.house.cell
    machine, key = _holder(scaling, 0)
    assert siblings_of(machine.id, DIGEST, cell, 0) == []
    where = cell.keys.machine(machine.id.hex).models
    for url in (
        "http://10.0.0.1:80/x?y=",
        "https://10.0.0.1:80",
        "file:///etc",
        "http://10.0.0.1",
        "http://[",
        "",
    ):
        cell.redis.set(where, msgspec.json.encode(ModelShelf(digests=(DIGEST,), url=url, key=key)))
        assert siblings_of(uuid4(), DIGEST, cell, 0) == [], url
    cell.redis.set(where, b"not JSON")
    assert siblings_of(uuid4(), DIGEST, cell, 0) == []


def test_a_replica_from_an_object_store_is_told_of_siblings(
    scaling: Scaling, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = _from_a_bucket(scaling, monkeypatch)
    for n in (1, 2):  # it starts on one of them
        _holder(scaling, n, digest=version.digest)
    scaling.configure(max_machines=3)
    scaling.queue("first")
    scaling.tick()
    replica = scaling.replica()
    cell = scaling.house.cell
    told = cell.redis.hget(cell.keys.machine(replica.machine_id.hex).desired, replica.id.hex)
    assert isinstance(told, bytes)
    spec = msgspec.json.decode(told, type=ReplicaSpec)
    assert list(spec.model_urls) == ["manifest.json", "config.json"]
    assert len(spec.model_siblings) == 1
    assert "ticket" not in str(scaling.replica().spec), "kept nowhere"


def test_an_idle_machine_is_asked_to_fetch_what_deployments_serve(
    scaling: Scaling, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoscaler import prefetch

    cell = scaling.house.cell
    assert prefetch.order(cell, "fake", timezone.now()) == 0, "nothing comes from a bucket"
    version = _from_a_bucket(scaling, monkeypatch)
    holder, _ = _holder(scaling, 1, digest=version.digest)
    idle, key = _holder(scaling, 2)
    _holder(scaling, 3, ends_at=timezone.now())
    where = cell.keys.machine(idle.id.hex)
    for free, n in ((1, 0), (10**9, 1), (10**9, 0)):  # no room, asked, not asked twice
        shelf = ModelShelf(digests=(DIGEST,), url="http://10.0.0.3:7437", key=key, free_bytes=free)
        cell.redis.set(where.models, msgspec.json.encode(shelf))
        assert prefetch.order(cell, "fake", timezone.now()) == n
    assert not cell.redis.exists(cell.keys.machine(holder.id.hex).prefetch)
    told = cell.redis.hget(where.prefetch, version.digest)
    assert isinstance(told, bytes)
    spec = msgspec.json.decode(told, type=PrefetchSpec)
    assert list(spec.urls) == ["manifest.json", "config.json"]
    assert len(spec.siblings) == 1 and "10.0.0.2" in spec.siblings[0]
    assert 0 < cell.redis.pttl(where.prefetch) <= 3600_000
