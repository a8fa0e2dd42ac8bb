"""Adapters on their deployment's page: which are served, and what is in the way of the others."""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.adapters import services
from tests.world import World, make_adapter, make_deployment

pytestmark = pytest.mark.django_db


def test_the_page_says_which_are_served_and_why_others_are_not(
    world: World, client: Any, redis_url: str
) -> None:
    chat = make_deployment(world, "chat", engine_profile={"engine": "toy", "max_loras": 2})
    plain = make_deployment(world, "plain", model_version_id=chat.model_version_id)
    client.force_login(world.alice)
    assert "None yet" in client.get(f"/deployments/{chat}").content.decode()
    assert "Adapters" not in client.get(f"/deployments/{plain}").content.decode()
    make_adapter(chat, "formal")
    bad = services.register(organization_id=world.organization.id, deployment_id=chat.id, name="bad")
    services.refuse(
        organization_id=world.organization.id, adapter_id=bad.id, code="rank_too_high", message="rank 64 is …"
    )
    gone = make_adapter(chat, "gone")
    services.retire(organization_id=world.organization.id, adapter_id=gone.id)
    text = client.get(f"/deployments/{chat}").content.decode()
    for part in (
        "chat:formal",
        "q_proj",
        ">ready<",
        "chat:bad",
        ">refused<",
        "rank 64 is …",
        "2 in memory at once",
    ):
        assert part in text, part
    assert "chat:gone" not in text
    client.force_login(world.charlie)
    assert "formal" not in client.get(f"/deployments/{chat}").content.decode()
