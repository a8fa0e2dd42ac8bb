"""The overview and a deployment's page: what they show, alive and degraded."""

import time
import uuid
from datetime import timedelta

import msgspec
import redis
from django.test import Client
from django.utils import timezone

from autoscaler.models import Decision, Replica
from controlplane.deployments.models import Deployment, Phase
from controlplane.tenants.context import tenant
from tests.database import acting_as
from tests.world import World
from workers.contract import Heartbeat
from workers.keys import CellKeys

KEYS = CellKeys("c0")


def beat(client: redis.Redis, replica: Replica, **values: float) -> None:
    """What a ready replica and its queue look like in Redis."""
    rid, mid, did = replica.id.hex, replica.machine_id.hex, replica.deployment_id.hex
    client.hset(KEYS.replica(rid), mapping={"mid": mid, "dep": did, "state": "ready", "slots": 8, "used": 5})
    heartbeat = Heartbeat(
        machine=mid, seq=1, at_ms=int(time.time() * 1000), replica=rid, slots=8, kv_used_ratio=0.42, **values
    )
    client.set(KEYS.machine(mid).heartbeat(rid), msgspec.json.encode(heartbeat))
    client.zadd(KEYS.queue(did), {"r1": 1, "r2": 2, "r3": 3})


def text_of(client: Client, path: str) -> str:
    return " ".join(client.get(path).content.decode().split())


def test_it_shows_what_runs_and_what_was_asked(
    owner: Client, replica: Replica, usage_event, redis_url: str, world: World
) -> None:
    with redis.Redis.from_url(redis_url) as client:
        beat(client, replica)
    event = usage_event(attempts=2)
    text = text_of(owner, "/")
    assert "toy-chat" in text
    assert f"…{replica.id.hex[-8:]}" in text
    assert "5 / 8" in text  # slots used
    assert "42 %" in text  # KV cache
    assert "3 queued" in text
    assert str(event) in text
    assert "$0.000015" in text
    assert "(40 cached)</small> → 20" in text
    assert "×2" in text


def test_it_says_how_many_slots_are_given_of_how_many_and_why(
    owner: Client, replica: Replica, redis_url: str
) -> None:
    with redis.Redis.from_url(redis_url) as client:
        beat(client, replica, itl_p95_ms=97.4)
        given = replica.slots - 1
        client.hset(
            KEYS.replica(replica.id.hex), mapping={"slots": given, "why": "shrinks from <8>: too slow"}
        )
    text = text_of(owner, "/")
    assert f'5 / {given}<small class="inline"> of {replica.slots}</small>' in text
    assert "Slots: shrinks from &lt;8&gt;: too slow" in text
    assert "97 ms" in text


def test_the_polled_part_is_the_part_and_no_page(owner: Client, deployment: Deployment) -> None:
    response = owner.get("/live", headers={"HX-Request": "true"})
    assert response.status_code == 200
    assert "<html" not in response.content.decode()


def test_an_empty_organization_is_told_what_to_do(stranger: Client) -> None:
    text = text_of(stranger, "/")
    assert "No deployments yet" in text
    assert "Nothing is running" in text
    assert "No requests yet" in text


def test_a_failing_deployment_says_why(
    owner: Client, world: World, deployment: Deployment, replica: Replica
) -> None:
    with tenant(world.organization.id):
        Deployment.objects.filter(id=deployment.id).update(
            phase=Phase.FAILED, last_error="bad_weights: digest differs"
        )
    with acting_as("corral_operator"):
        Replica.objects.filter(id=replica.id).update(
            phase="failed",
            reason_code="bad_weights",
            reason_message="digest differs",
            stopped_at=timezone.now(),
        )
    for page in ("/", f"/deployments/{deployment}"):
        text = text_of(owner, page)
        assert "bad_weights: digest differs" in text
        assert '<span class="pill bad">failed</span>' in text or "pill big bad" in text


def test_a_replica_that_ended_long_ago_is_gone_from_the_page(owner: Client, replica: Replica) -> None:
    with acting_as("corral_operator"):
        Replica.objects.filter(id=replica.id).update(
            phase="stopped", stopped_at=timezone.now() - timedelta(hours=1)
        )
    assert replica.id.hex[-8:] not in text_of(owner, "/")


def test_what_a_waiting_client_is_told_is_shown(
    owner: Client, world: World, deployment: Deployment, redis_url: str
) -> None:
    with tenant(world.organization.id):
        Deployment.objects.filter(id=deployment.id).update(phase=Phase.STARTING)
    with redis.Redis.from_url(redis_url) as client:
        client.hset(KEYS.stage(deployment.id.hex), mapping={"stage": "loading_model", "eta_ms": 1900})
    assert "loading the model, about 1.9 s" in text_of(owner, "/")


def test_whatever_a_machine_writes_the_page_stands(owner: Client, replica: Replica, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        for garbage in (b"\xff\x00", b"[]", b'{"machine": 1}', b"null"):
            client.set(KEYS.machine(replica.machine_id.hex).heartbeat(replica.id.hex), garbage)
            assert owner.get("/").status_code == 200


def test_redis_away_is_said_and_the_rest_is_shown(
    owner: Client, replica: Replica, usage_event, redis_away
) -> None:
    event = usage_event()
    for page in ("/", "/live", f"/deployments/{replica.deployment}"):
        response = owner.get(page)
        text = response.content.decode()
        assert response.status_code == 503
        assert response.headers["Retry-After"]
        assert "Live figures are away" in text
        assert "toy-chat" in text
    assert str(event) in owner.get("/").content.decode()


def test_a_deployment_tells_its_decisions_with_reasons(
    owner: Client, world: World, deployment: Deployment
) -> None:
    with acting_as("corral_operator"):
        for number, (commands, reason) in enumerate(
            [([], "load 3 of 8 slots wants 1"), ([], "load 3 of 8 slots wants 1"),
             ([{"kind": "start_replica", "command_id": "c", "machine_id": "m" * 32}], "12 requests wait: start 1")]
        ):  # fmt: skip
            Decision.objects.create(
                organization=world.organization, deployment=deployment, tick_id=uuid.uuid4(), observation={}, spec={},
                memory_in={}, memory_out={}, commands=commands, reasons=[reason],
                at=timezone.now() - timedelta(seconds=number),
            )  # fmt: skip
    text = text_of(owner, f"/deployments/{deployment}")
    assert "No change" in text and "2 times since" in text
    assert "Start a replica" in text and "12 requests wait: start 1" in text


def test_a_deployment_shows_how_to_call_it(owner: Client, deployment: Deployment, settings) -> None:
    text = text_of(owner, f"/deployments/{deployment}")
    assert f"curl {settings.ENV.gateway_url}/v1/chat/completions" in text
    assert "&quot;model&quot;: &quot;toy-chat&quot;" in text or '"model": "toy-chat"' in text
    assert "$0.10 in · $0.025 cached · $0.40 out" in text
