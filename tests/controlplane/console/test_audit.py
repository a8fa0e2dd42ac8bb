"""The audit log's page and the page of machines: who changed what, what leaves and why, and nothing of others."""

from __future__ import annotations

import re
from datetime import timedelta

from django.test import Client
from django.utils import timezone

from autoscaler.models import Machine, MachineState, Replica
from controlplane.audit.models import Entry, Seal
from controlplane.console.views.audit import PAGE_ROWS
from controlplane.tenants import services
from controlplane.tenants.context import tenant
from controlplane.tenants.models import ApiKey
from tests.controlplane.console.conftest import signed_in
from tests.database import acting_as
from tests.world import World


def text_of(client: Client, path: str) -> str:
    response = client.get(path)
    assert response.status_code == 200, response.content.decode()
    return " ".join(response.content.decode().split())


def test_a_change_is_told_with_who_made_it_and_what_it_was(owner: Client, world: World) -> None:
    form = {"name": "<b>ci</b>", "project": world.project.id.hex, "expires": ""}
    assert owner.post("/keys/create", form).status_code == 200
    with tenant(world.organization.id):
        key = ApiKey.objects.get(name="<b>ci</b>")
    owner.post(f"/keys/{key}/limits", {"rpm": "7"})
    found = text_of(owner, f"/audit?kind=api_key&thing={key}")
    assert "alice@example.org" in found
    assert "API key &lt;b&gt;ci&lt;/b&gt;" in found and "<b>ci</b>" not in found
    assert found.count('<span class="pill ok">create</span>') == 1
    assert key.lookup not in found, "nothing that a key could be found by"
    assert "<dt>rpm</dt><dd><ins>7</ins></dd>" in text_of(owner, "/audit?action=update&kind=api_key")
    assert "Nothing of this kind was changed" in text_of(owner, f"/audit?action=delete&thing={key.id.hex}")


def test_links_of_the_chain_are_counted(owner: Client, world: World) -> None:
    before = text_of(owner, "/audit")
    assert "0 sealed in a hash chain" in before
    with acting_as("corral_operator"):
        entry = Entry.objects.filter(organization=world.organization).first()
        assert entry is not None
        Seal.objects.create(organization=world.organization, n=12, entry=entry, hash=b"h" * 32)
    after = text_of(owner, "/audit")
    assert "12 sealed in a hash chain" in after and '<td class="num lo">12</td>' in after


def test_older_entries_are_a_page_away_and_every_entry_is_on_one(owner: Client, world: World) -> None:
    for n in range(PAGE_ROWS + 5):
        services.update_project(
            organization_id=world.organization.id, project_id=world.project.id, name=f"name-{n:03}"
        )
    first = text_of(owner, "/audit?kind=project&action=update")
    older = re.search(r'href="([^"]*before=\d+)">Older', first)
    assert older
    second = text_of(owner, "/audit" + older[1].replace("&amp;", "&"))
    assert ">Older" not in second and ">Newest" in second
    seen = first + second
    assert [n for n in range(PAGE_ROWS + 5) if f"<ins>name-{n:03}</ins>" not in seen] == []
    for nonsense in ("?before=abc", f"?before={'9' * 400}", "?thing=zzz", "?kind=%00&action=drop"):
        text_of(owner, f"/audit{nonsense}")


def test_a_machine_tells_what_it_is_and_why_it_leaves(
    owner: Client, stranger: Client, replica: Replica
) -> None:
    with acting_as("corral_operator"):
        Machine.objects.filter(id=replica.machine_id).update(
            state=MachineState.DRAINING,
            offering="spot/us-east-1a/g6.xlarge",
            n_gpus=1,
            capabilities={"memory_bytes": 16 * 2**30},
            reason="its spot price rose",
            ends_at=timezone.now() + timedelta(minutes=2, seconds=30),
        )
    found = text_of(owner, "/machines")
    for told in ("spot/us-east-1a/g6.xlarge", "its spot price rose", "gone in 2 min", "16 GiB", "toy-chat"):
        assert told in found, told
    assert replica.machine_id.hex not in text_of(stranger, "/machines")


def test_only_who_may_see_the_log_is_shown_the_way_to_it(world: World, owner: Client, viewer: Client) -> None:
    assert 'href="/audit"' in text_of(owner, "/")
    assert 'href="/audit"' not in text_of(viewer, "/")
    assert viewer.get("/audit").status_code == 403
    assert world.project.id.hex not in text_of(signed_in(world.charlie), "/audit")
