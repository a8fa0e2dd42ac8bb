"""The pages about endpoints elsewhere: health in words, use, and what their forms do."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from django.test import Client
from django.utils import timezone

from autoscaler.models import ReplicaPhase
from controlplane.console import live
from controlplane.deployments.models import Deployment
from controlplane.tenants.context import tenant
from controlplane.upstreams import services
from controlplane.upstreams.models import Upstream, UpstreamDay, UpstreamReplica, UpstreamSecrets
from tests.controlplane.upstreams.test_services import attach
from tests.database import acting_as
from tests.world import World, make_deployment, make_replica
from workers.contract import Heartbeat
from workers.keys import CellKeys

FORM = {
    "name": "their-vllm",
    "role": "overflow",
    "base_url": "https://inference.example.org/v1",
    "model": "big",
    "api_key": "sk-theirs",
    "slots": "8",
    "input_usd": "0.05",
    "output_usd": "",
}


@pytest.fixture
def served(world: World) -> Deployment:
    return make_deployment(world, "served")


def text_of(client: Client, path: str = "/upstreams") -> str:
    return " ".join(client.get(path).content.decode().split())


def stand_for(upstream: Upstream, **values: Any) -> Any:
    replica, _ = make_replica(upstream.deployment, slots=upstream.slots, **values)
    with acting_as("corral_operator"):
        UpstreamReplica.objects.create(
            replica_id=replica.id,
            organization_id=upstream.organization_id,
            upstream_id=upstream.id,
            deployment_id=upstream.deployment_id,
        )
    return replica


def beat(replica: Any, note: str, used: int = 0) -> None:
    keys = CellKeys("c0")
    told = Heartbeat(
        machine=replica.machine_id.hex, seq=1, at_ms=1, replica=replica.id.hex, slots=4, note=note
    )
    client = live._client()
    client.set(keys.machine(replica.machine_id.hex).heartbeat(replica.id.hex), msgspec.json.encode(told))
    client.hset(keys.replica(replica.id.hex), mapping={"used": used, "slots": 4})


@pytest.mark.parametrize(
    ("note", "says"),
    [
        ("", '<span class="pill ok">serving</span>'),
        ("open upstream_timeout", "left alone</span><small class=\"reason\">it takes too long: gets nothing"),
        ("half_open upstream_failed", "on trial</span><small class=\"reason\">it answers with errors"),
        ("closed upstream_busy", "serving</span><small class=\"reason\">it says it is busy: the last call failed"),
        ("<script>", '<span class="pill ok">serving</span>'),
    ],
)  # fmt: skip
def test_health_is_what_its_breaker_says(owner: Client, served: Deployment, note: str, says: str) -> None:
    upstream = attach(served, slots=4)
    replica = stand_for(upstream)
    beat(replica, note, used=3)
    text = text_of(owner)
    assert says in text and "3 / 4" in text and "<script>" not in text
    assert says.split(">")[-1] in text_of(owner, f"/upstreams/{upstream}")


def test_without_a_live_replica_it_says_why(owner: Client, served: Deployment) -> None:
    upstream = attach(served)
    assert "starting</span>" in text_of(owner)
    stand_for(upstream, phase=ReplicaPhase.FAILED, reason_message="its key cannot be opened")
    text = text_of(owner)
    assert "not running</span>" in text and "its key cannot be opened" in text
    stand_for(upstream)
    assert "silent</span>" in text_of(owner)
    services.change_upstream(
        organization_id=upstream.organization_id,
        upstream_id=upstream.id,
        change=services.Change(enabled=False),
    )
    assert "disabled</span>" in text_of(owner)


def test_use_is_summed_with_its_margin(owner: Client, world: World, served: Deployment) -> None:
    upstream = attach(served)
    with acting_as("corral_operator"):
        UpstreamDay.objects.create(
            organization_id=world.organization.id,
            upstream_id=upstream.id,
            day=timezone.now().date(),
            n_requests=1200,
            n_failed=7,
            n_counted_here=3,
            cost_nano=5 * 10**9,
            revenue_nano=3 * 10**9,
        )
    text = text_of(owner)
    assert "1,200" in text and "7 failed" in text and "-$2.00" in text.replace("−", "-")
    assert "us for 3 of 1,200 requests" in text_of(owner, f"/upstreams/{upstream}")


def test_the_form_attaches_and_names_what_is_wrong(owner: Client, world: World, served: Deployment) -> None:
    form = {**FORM, "deployment": served.id.hex}
    assert owner.post("/upstreams/attach", form).status_code == 302
    with tenant(world.organization.id):
        made = Upstream.objects.get()
        kept = services.secret_of(UpstreamSecrets.objects.get())
    assert (made.slots, made.input_nano_per_million, kept.api_key) == (8, 50_000_000, "sk-theirs")
    twice = owner.post("/upstreams/attach", form)
    assert twice.status_code == 409 and "is called &#x27;their-vllm&#x27;" in twice.content.decode()
    inside = owner.post("/upstreams/attach", {**form, "base_url": "http://169.254.169.254/v1"})
    assert inside.status_code == 400 and "CORRAL_OUTBOUND_ALLOW" in inside.content.decode()
    assert "sk-theirs" not in twice.content.decode() + text_of(owner, f"/upstreams/{made}")


def test_settings_are_changed_and_the_key_stays_unless_said(
    owner: Client, world: World, served: Deployment
) -> None:
    upstream = attach(served, api_key="sk-theirs", input_nano_per_million=5, slots=3)
    page = owner.get(f"/upstreams/{upstream}")
    values = {
        name: value for name, value in page.context["form"].initial.items() if value not in (None, False)
    }
    path = f"/upstreams/{upstream}/change"
    assert owner.post(path, {**values, "slots": 9}).status_code == 302
    with tenant(world.organization.id):
        changed = Upstream.objects.get()
    assert (changed.slots, changed.input_nano_per_million, changed.has_api_key) == (9, 5, True)
    assert changed.secrets_version == upstream.secrets_version
    wrong = owner.post(path, {**values, "slots": 0})
    assert wrong.status_code == 400 and "greater than or equal to 1" in wrong.content.decode()
    assert owner.post(path, {**values, "forget_key": "on"}).status_code == 302
    with tenant(world.organization.id):
        assert not Upstream.objects.get().has_api_key
    assert owner.post(f"/upstreams/{upstream}/detach").status_code == 302
    assert "No endpoint is attached" in text_of(owner)


def test_consent_is_given_and_withdrawn(owner: Client, served: Deployment) -> None:
    assert "not agreed" in text_of(owner)
    owner.post("/upstreams/consent", {"agreed": "1"})
    assert '<span class="pill warn">agreed</span>' in text_of(owner)
    owner.post("/upstreams/consent", {"agreed": "0"})
    assert "not agreed" in text_of(owner)


def test_who_may_not_change_sees_no_buttons(developer: Client, viewer: Client, served: Deployment) -> None:
    upstream = attach(served)
    seen = text_of(developer) + text_of(developer, f"/upstreams/{upstream}")
    assert "elsewhere" in seen and "Attach an endpoint" not in seen and "Detach" not in seen
    assert viewer.get("/upstreams").status_code == 403
    home = text_of(viewer, "/")
    assert 'href="/upstreams"' not in home and 'href="/webhooks"' not in home and 'href="/sharing"' in home


def test_a_shadow_is_shown_and_changed_also_where_it_is_a_deployment(
    world: World, served: Deployment, client: Client
) -> None:
    client.force_login(world.alice)
    organization_id = world.organization.id
    services.set_consent(organization_id=organization_id, agreed=True)
    second = make_deployment(world, "second", model_version_id=served.model_version_id)
    made = services.attach(
        organization_id=organization_id,
        deployment_id=served.id,
        name="trial",
        role="shadow",
        target_deployment_id=second.id,
        change=services.Change(),
    )
    page = text_of(client, f"/upstreams/{made}")
    assert "copying" in page and "second" in page and "10000 of a million requests" in page
    form = client.get(f"/upstreams/{made}").context["form"]
    sent = {name: value for name, value in form.initial.items() if value is not None} | {"slots": "3"}
    assert client.post(f"/upstreams/{made}/change", sent).status_code == 302
    with tenant(organization_id):
        after = Upstream.objects.get(id=made.id)
    assert (after.slots, after.role, after.target_id) == (3, "shadow", second.id)
