"""A secret key that changes takes no sealed secret with it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from allauth.mfa.models import Authenticator
from allauth.mfa.recovery_codes.internal.auth import RecoveryCodes
from allauth.mfa.totp.internal.auth import TOTP
from django.core.management import call_command

from controlplane import resealing, secretbox
from controlplane.identity import providers
from controlplane.identity.models import ProviderKind
from controlplane.upstreams import services as upstreams
from controlplane.upstreams.models import UpstreamSecrets
from controlplane.webhooks import services as webhooks
from tests.database import acting_as
from tests.world import World, make_deployment

ROOT = Path(resealing.__file__).parents[1]


def test_every_code_that_seals_has_its_place() -> None:
    """What seals under a purpose that resealing.py does not know would be lost at the second rotation."""
    sealing = set()
    for path in (ROOT / "controlplane").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and node.attr == "seal"
                and isinstance(node.value, ast.Name)
                and node.value.id == "secretbox"
            ):
                sealing.add(path.relative_to(ROOT).as_posix())
    assert sealing == {
        "controlplane/identity/adapters.py",
        "controlplane/identity/providers.py",
        "controlplane/upstreams/services.py",
        "controlplane/webhooks/services.py",
    }


@pytest.fixture
def sealed(world: World) -> Any:
    """One of each, and what they open to."""
    organization_id = world.organization.id
    provider = providers.create_provider(
        organization_id=organization_id,
        kind=ProviderKind.OIDC,
        name="P",
        issuer="https://id.example.org",
        client_id="c",
        client_secret="its secret",
    )
    endpoint, secret = webhooks.create_endpoint(
        organization_id=organization_id, url="https://acme.example/hook"
    )
    webhooks.rotate_secret(organization_id=organization_id, endpoint_id=endpoint.id)
    upstream = upstreams.attach(
        organization_id=organization_id,
        deployment_id=make_deployment(world).id,
        name="elsewhere",
        base_url="https://api.example.org/v1",
        model="m",
        role="overflow",
        change=upstreams.Change(api_key="sk-elsewhere"),
    )
    TOTP.activate(world.alice, "JBSWY3DPEHPK3PXP")
    codes = RecoveryCodes.activate(world.alice).get_unused_codes()

    def opened() -> list[Any]:
        with acting_as("corral_operator"):
            provider.refresh_from_db()
            kept = webhooks.EndpointState.objects.get(endpoint=endpoint)
            seeds = {each.type: each for each in Authenticator.objects.filter(user=world.alice)}
            assert TOTP(seeds["totp"]).instance.data["secret"]
            return [
                providers.secret_of(provider),
                upstreams.secret_of(UpstreamSecrets.objects.get(upstream=upstream)).api_key,
                secretbox.unseal(bytes(kept.sealed_secret_before), purpose=webhooks.PURPOSE),
                secretbox.unseal(bytes(kept.sealed_secret), purpose=webhooks.PURPOSE),
                secretbox.unseal(bytes.fromhex(seeds["totp"].data["secret"]), purpose="second factor"),
                RecoveryCodes(seeds["recovery_codes"]).get_unused_codes(),
            ]

    first = opened()
    assert first[:3] == ["its secret", "sk-elsewhere", secret]
    assert first[4:] == ["JBSWY3DPEHPK3PXP", codes]
    return opened


def test_sealed_secrets_open_after_the_former_key_has_ended(
    sealed: Any, settings: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sealed()
    for _ in range(2):  # a second rotation ends the first key altogether
        settings.SECRET_KEY_FALLBACKS = [settings.SECRET_KEY]
        settings.SECRET_KEY = settings.SECRET_KEY + "x"
        assert sealed() == before
        with acting_as("corral_operator"):
            call_command("reseal")
            assert capsys.readouterr().out == "6 secrets sealed anew\n"
            assert resealing.reseal() == resealing.Resealed(0, 0), "once is enough"
        settings.SECRET_KEY_FALLBACKS = []
        assert sealed() == before


def test_what_no_key_opens_is_counted_and_left(sealed: Any, settings: Any) -> None:
    settings.SECRET_KEY = "another"
    settings.SECRET_KEY_FALLBACKS = []
    with acting_as("corral_operator"):
        assert resealing.reseal() == resealing.Resealed(n_renewed=0, n_lost=6)


def test_what_was_changed_meanwhile_is_left_as_it_is(
    world: World, sealed: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.SECRET_KEY_FALLBACKS = [settings.SECRET_KEY]
    settings.SECRET_KEY = "new"
    place = resealing.PLACES[0]

    def slow(value: Any, purpose: str) -> Any:
        """Somebody sets another secret between our reading and our writing."""
        place.model._default_manager.update(secret=secretbox.seal("set meanwhile", purpose=providers.SECRET))
        return resealing._box(value, purpose)

    monkeypatch.setattr(
        resealing, "PLACES", (resealing.Place(place.model, place.column, place.purpose, slow),)
    )
    with acting_as("corral_operator"):
        assert resealing.reseal() == resealing.Resealed(0, 0)
    assert sealed()[0] == "set meanwhile"
