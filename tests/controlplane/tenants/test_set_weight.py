"""`manage.py set_weight`: what a tenant gets of a full queue."""

import io

import pytest
from django.core.management import CommandError, call_command

from controlplane import ids
from controlplane.tenants.models import ApiKey, Organization, Project
from tests.controlplane.tenants.test_services import new_key
from tests.world import World


def set_weight(*args: object) -> str:
    out = io.StringIO()
    call_command("set_weight", *map(str, args), stdout=out)
    return out.getvalue().strip()


def test_it_reaches_each_level(world: World, as_operator) -> None:
    key, _ = new_key(world)
    acme, project = world.organization.slug, world.project.slug
    with as_operator():
        assert set_weight(200, "--organization", acme) == "weight 200"
        set_weight(300, "--organization", acme, "--project", project)
        set_weight(400, "--organization", acme, "--key", ids.to_text(ids.Prefix.API_KEY, key.id))
        assert Organization.objects.get(id=world.organization.id).weight == 200
        assert Project.objects.get(id=world.project.id).weight == 300
        assert ApiKey.objects.get(id=key.id).weight == 400


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((0,), "1 to 10000"),
        ((5, "--organization", "nobody"), "no organization 'nobody'"),
        ((5, "--project", "nothing"), "no project acme/nothing"),
        ((5, "--key", "k1"), "key_<32 hex digits>"),
        ((5, "--key", "key_" + "0" * 32), "no such"),
    ],
)
def test_mistakes_are_told(world: World, as_operator, args: tuple[object, ...], says: str) -> None:
    with as_operator(), pytest.raises(CommandError, match=says):
        set_weight(*args)
