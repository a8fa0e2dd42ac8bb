"""Somebody adds a security key, signs in with it, and removes it: Chromium's own virtual authenticator. On a live stack."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, CDPSession, Page, expect

from tests.browser.conftest import ACTION_TIMEOUT_MS, Visit
from tests.browser.test_console_walk import fits

pytestmark = [pytest.mark.browser, pytest.mark.stack, pytest.mark.full]


@pytest.fixture
def key_page(browser: Browser, visit: Visit) -> Iterator[tuple[Page, CDPSession, str]]:
    """A page at `localhost`, where browsers allow keys without TLS, with a key plugged in."""
    context = browser.new_context(base_url=visit.console_url.replace("127.0.0.1", "localhost"))
    context.set_default_timeout(ACTION_TIMEOUT_MS)
    page = context.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    session = context.new_cdp_session(page)
    session.send("WebAuthn.enable")
    options = {"protocol": "ctap2", "transport": "usb", "automaticPresenceSimulation": True}
    added = session.send("WebAuthn.addVirtualAuthenticator", {"options": options})
    yield page, session, added["authenticatorId"]
    context.close()
    assert troubles == []


def sign_in(page: Page, visit: Visit) -> None:
    page.goto("/login")
    page.get_by_label("E-mail").fill(visit.email)
    page.get_by_label("Password").fill(visit.password)
    page.get_by_role("button", name="Sign in").click()


def test_a_security_key_from_its_first_use_to_its_end(
    key_page: tuple[Page, CDPSession, str], visit: Visit
) -> None:
    page, session, authenticator = key_page
    sign_in(page, visit)
    page.goto("/account")
    page.get_by_role("link", name="Add a security key").click()
    page.get_by_label("Name").fill("My blue key")
    assert fits(page)
    page.get_by_role("button", name="Add it").click()
    expect(page.get_by_role("heading", name="Recovery codes")).to_be_visible()
    try:
        assert (
            len(session.send("WebAuthn.getCredentials", {"authenticatorId": authenticator})["credentials"])
            == 1
        )
        page.goto("/account")
        expect(page.get_by_role("cell", name="My blue key", exact=True)).to_be_visible()
        assert fits(page)

        page.context.clear_cookies()
        sign_in(page, visit)
        expect(page.get_by_role("heading", name="Second factor")).to_be_visible()
        page.goto("/keys")
        expect(page).to_have_url(re.compile("/login"))  # the password alone opens nothing
        page.goto("/account/2fa/authenticate")
        session.send("WebAuthn.setUserVerified", {"authenticatorId": authenticator, "isUserVerified": True})
        page.get_by_role("button", name="Use your security key").click()
        expect(page.get_by_role("heading", name="Overview")).to_be_visible()
    finally:
        page.goto("/account")
        page.get_by_role("link", name="Remove My blue key").click()
        page.get_by_role("button", name="Remove it").click()
        expect(page.get_by_role("link", name="Turn on")).to_be_visible()
