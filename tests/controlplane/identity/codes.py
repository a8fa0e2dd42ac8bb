"""The phone with the authenticator app."""

from __future__ import annotations

import re
import time
from typing import Any

from allauth.mfa.totp.internal.auth import format_hotp_value, hotp_value
from django.test import Client

from tests.world import PASSWORD

PERIOD_S = 30


def code_of(secret: str, *, periods: int = 0) -> str:
    """What the app shows, some periods from now."""
    return format_hotp_value(hotp_value(secret, int(time.time()) // PERIOD_S + periods))


def sign_in(client: Client, email: str, password: str = PASSWORD, **values: str) -> Any:
    return client.post("/login", {"email": email, "password": password, **values})


def enrol(client: Client) -> tuple[str, list[str]]:
    """Turn two-factor authentication on for who is signed in: the secret and the recovery codes."""
    page = client.get("/account/2fa/activate").content.decode()
    found = re.search(r'id="totp-secret">(\w+)<', page)
    assert found, page
    response = client.post("/account/2fa/activate", {"code": code_of(found[1])})
    assert response.headers.get("Location") == "/account/2fa/codes", response.content.decode()
    codes = re.findall(
        r"^(?:<pre[^>]*>)?(\d{8})$",
        client.get("/account/2fa/codes")
        .content.decode()
        .replace('<pre class="code codes" id="codes">', "\n"),
        re.M,
    )
    return found[1], codes
