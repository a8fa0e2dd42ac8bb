"""Organizations, projects, keys and members as the services make them."""

from controlplane.tenants import api_keys, selectors, services
from controlplane.tenants.context import tenant
from tests.world import World


def test_key_is_shown_once_and_stored_as_digest(world: World, settings) -> None:
    key, plaintext = services.create_api_key(
        organization_id=world.organization.id, project_id=world.project.id, name="ci", created_by=world.alice
    )
    with tenant(world.organization.id):
        stored = selectors.api_key(organization_id=world.organization.id, key_id=key.id)
    assert api_keys.lookup_of(plaintext) == stored.lookup
    assert api_keys.matches(settings.ENV.key_pepper, plaintext, bytes(stored.digest))
    assert not api_keys.matches(settings.ENV.key_pepper, plaintext[:-1] + "!", bytes(stored.digest))
    assert plaintext.endswith(stored.last4)
