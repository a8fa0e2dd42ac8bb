"""A security key as second factor through the pages alone: added, asked for after a password, removed. What a browser
makes of it is in test_security_keys.py.
"""

from __future__ import annotations

import json
import re
from html import unescape
from typing import Any

import pytest
from allauth.mfa.models import Authenticator
from django.core.cache import cache
from django.test import Client

from tests.controlplane.identity.codes import sign_in
from tests.controlplane.identity.softkey import SoftKey
from tests.world import PASSWORD, World

ADD, FACTOR = "/account/2fa/keys/add", "/account/2fa/authenticate"
MAIL = "alice@example.org"


@pytest.fixture(autouse=True)
def _told_by_redis(redis_url: str) -> str:
    return redis_url


@pytest.fixture
def alice(world: World) -> Client:
    client = Client()
    assert sign_in(client, MAIL).status_code == 302
    return client


def asked(client: Client, path: str, kind: str) -> dict[str, Any]:
    """What a page asks a key for."""
    page = client.get(path).content.decode()
    found = re.search(r'<script id="key-data" type="application/json">(.*?)</script>', page, re.S)
    assert found, page
    options: dict[str, Any] = json.loads(unescape(found[1]))
    found_options: dict[str, Any] = options.get(kind, options)
    return found_options


def add(client: Client, key: SoftKey) -> Any:
    credential = key.create(asked(client, ADD, "creation_options"))
    return client.post(ADD, {"name": "My blue key", "credential": credential})


def use(client: Client, key: SoftKey) -> Any:
    credential = key.get(asked(client, FACTOR, "request_options"))
    return client.post(FACTOR, {"credential": credential})


def is_in(client: Client) -> bool:
    return client.get("/keys").status_code == 200


NO_ANSWERS = [
    "",
    "{}",
    "nonsense",
    "[]",
    '{"id": 1}',
    '{"id": "AA", "rawId": "AA", "response": 7}',
    '{"id": "AA", "rawId": "AA", "response": {}, "type": "public-key"}',
    '{"id": "AA", "rawId": "AA", "type": "public-key", "response": {"clientDataJSON": "AA", "attestationObject": "AA", '
    '"authenticatorData": "AA", "signature": "AA"}}',
]


def test_a_key_is_added_asked_for_and_removed(alice: Client) -> None:
    key = SoftKey()
    assert add(alice, key).headers["Location"] == "/account/2fa/codes"
    assert is_in(alice) and "My blue key" in alice.get("/account").content.decode()
    other = Client()
    assert sign_in(other, MAIL, next="/usage").headers["Location"] == FACTOR
    assert not is_in(other), "the password alone opens nothing"
    assert use(other, key).headers["Location"] == "/usage"
    assert is_in(other)
    row = Authenticator.objects.get(type=Authenticator.Type.WEBAUTHN)
    assert alice.post(f"/account/2fa/keys/{row.pk}/remove").status_code == 302
    assert not Authenticator.objects.filter(type=Authenticator.Type.WEBAUTHN).exists()
    assert sign_in(Client(), MAIL).headers["Location"] != FACTOR


def test_another_key_an_old_answer_or_a_changed_one_lets_nobody_in(alice: Client) -> None:
    key = SoftKey()
    add(alice, key)
    other = Client()
    sign_in(other, MAIL)
    stranger = SoftKey()
    stranger.credential_id = key.credential_id
    assert use(other, stranger).status_code == 200 and not is_in(other)
    answer = key.get(asked(other, FACTOR, "request_options"))
    asked(other, FACTOR, "request_options")  # another challenge
    assert other.post(FACTOR, {"credential": answer}).status_code == 200 and not is_in(other)
    changed = json.loads(key.get(asked(other, FACTOR, "request_options")))
    changed["response"]["authenticatorData"] = changed["response"]["authenticatorData"][:-2] + "AA"
    assert other.post(FACTOR, {"credential": json.dumps(changed)}).status_code == 200 and not is_in(other)
    assert use(other, key).status_code == 302 and is_in(other)


def test_a_page_elsewhere_that_asks_the_key_gets_nothing(alice: Client, settings: Any) -> None:
    """As in production, where the console has TLS."""
    settings.MFA_WEBAUTHN_ALLOW_INSECURE_ORIGIN = False
    key = SoftKey()
    add(alice, key)
    other = Client()
    sign_in(other, MAIL)
    key.origin = "https://testserver.example.net"
    assert use(other, key).status_code == 200 and not is_in(other)
    key.origin = "https://testserver"
    assert use(other, key).status_code == 302 and is_in(other)


def test_what_is_no_answer_is_refused_at_the_form(alice: Client) -> None:
    key = SoftKey()
    for credential in NO_ANSWERS:
        asked(alice, ADD, "creation_options")
        assert alice.post(ADD, {"name": "k", "credential": credential}).status_code == 200, credential
    assert not Authenticator.objects.exists()
    add(alice, key)
    other = Client()
    sign_in(other, MAIL)
    for credential in NO_ANSWERS:
        cache.clear()  # of tries that failed
        asked(other, FACTOR, "request_options")
        assert other.post(FACTOR, {"credential": credential}).status_code == 200, credential
    assert not is_in(other)
    alice.post("/account/reauthenticate", {"password": PASSWORD})
    assert alice.post("/account/2fa/keys/use", {"credential": NO_ANSWERS[-1]}).status_code in (200, 302)
