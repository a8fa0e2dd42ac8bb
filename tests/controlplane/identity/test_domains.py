"""Proof of a mail domain: a TXT record, asked of a real DNS server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from io import StringIO
from typing import Any

import dns.message
import dns.resolver
import dns.rrset
import pytest
from django.core.management import call_command
from django.core.management.base import CommandError

from controlplane.errors import ConflictError, InvalidInputError
from controlplane.identity import domains
from controlplane.tenants.context import tenant
from tests.world import World


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[str]]]:
    """TXT records by name, served over UDP."""
    records: dict[str, list[str]] = {}
    listening = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listening.bind(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                packet, asker = listening.recvfrom(4096)
            except OSError:
                return
            if not packet:
                return
            asked = dns.message.from_wire(packet)
            answer = dns.message.make_response(asked)
            name = asked.question[0].name
            texts = records.get(name.to_text(omit_final_dot=True))
            if texts is None:
                answer.set_rcode(3)
            else:
                answer.answer.append(
                    dns.rrset.from_text(name, 60, "IN", "TXT", *(f'"{each}"' for each in texts))
                )
            listening.sendto(answer.to_wire(), asker)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    resolver = dns.resolver.Resolver(configure=False)
    resolver.nameservers, resolver.port = ["127.0.0.1"], listening.getsockname()[1]
    monkeypatch.setattr(domains, "_resolver", lambda: resolver)
    yield records
    listening.sendto(b"", listening.getsockname())
    thread.join(5)
    listening.close()


def verify(world: World, row: Any) -> Any:
    return domains.verify(organization_id=world.organization.id, domain_id=row.id)


def test_a_domain_counts_once_its_record_says_so(world: World, zone: dict[str, list[str]]) -> None:
    row = domains.claim(organization_id=world.organization.id, name=" Example.ORG. ")
    name, text = domains.record_of(row)
    assert name == "_corral.example.org"
    with pytest.raises(domains.NotProvenError, match=text):
        verify(world, row)
    zone[name] = ["v=spf1 -all", "corral-verification=another"]
    with pytest.raises(domains.NotProvenError):
        verify(world, row)
    zone[name].append(text)
    assert verify(world, row).verified_at is not None
    zone.clear()
    assert verify(world, row).verified_at is not None  # it stays


def test_a_domain_has_one_holder(world: World, zone: dict[str, list[str]]) -> None:
    ours = domains.claim(organization_id=world.organization.id, name="example.org")
    theirs = domains.claim(organization_id=world.other_organization.id, name="example.org")
    zone["_corral.example.org"] = [domains.record_of(ours)[1], domains.record_of(theirs)[1]]
    verify(world, ours)
    with pytest.raises(ConflictError, match="another organization"):
        domains.verify(organization_id=world.other_organization.id, domain_id=theirs.id)


@pytest.mark.parametrize(
    "name", ["org", "example", "*.example.org", "exa mple.org", "a@example.org", "-a.org", "1.2.3.4"]
)
def test_what_is_no_domain_is_named(world: World, name: str) -> None:
    with pytest.raises(InvalidInputError, match="name"):
        domains.claim(organization_id=world.organization.id, name=name)


def test_the_house_may_prove_a_domain_by_other_means(world: World, as_operator: Any) -> None:
    with as_operator():
        call_command("verify_domain", "Example.org", organization="acme", stdout=StringIO())
        with pytest.raises(CommandError, match="another organization"):
            call_command("verify_domain", "example.org", organization="other")
    with tenant(world.organization.id):
        assert domains.is_verified(organization_id=world.organization.id, email="bob@EXAMPLE.org")
