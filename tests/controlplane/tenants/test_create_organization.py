"""`manage.py create_organization`: a tenant from the command line, twice without harm."""

import json
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from controlplane.tenants.models import Member, Organization, Project, Role
from tests.world import World


def run(as_operator: Any, *args: str) -> dict[str, Any]:
    out = StringIO()
    with as_operator():
        call_command("create_organization", *args, "--json", stdout=out)
    return dict(json.loads(out.getvalue()))


def test_it_makes_organization_project_and_owner(world: World, as_operator: Any) -> None:
    made = run(as_operator, "third", "--owner", "dora@example.org", "--weight", "300")
    assert made["password"]
    again = run(as_operator, "third", "--owner", "dora@example.org", "--project", "second")
    assert again == made | {"password": None, "project": "second"}
    with as_operator():
        organization = Organization.objects.get(slug="third")
        assert organization.weight == 300
        assert set(Project.objects.filter(organization=organization).values_list("slug", flat=True)) == {
            "main",
            "second",
        }
        member = Member.objects.select_related("user").get(organization=organization)
        assert (member.user.email, member.role) == ("dora@example.org", Role.OWNER)
        assert member.user.check_password(made["password"])


def test_a_person_who_is_there_keeps_the_password(world: World, as_operator: Any) -> None:
    assert run(as_operator, "third", "--owner", world.bob.email)["password"] is None


def test_mistakes_are_told(world: World, as_operator: Any) -> None:
    with pytest.raises(CommandError, match="weight"):
        run(as_operator, "third", "--owner", "dora@example.org", "--weight", "0")
    with pytest.raises(CommandError, match="email"):
        run(as_operator, "fourth", "--owner", "no address")
