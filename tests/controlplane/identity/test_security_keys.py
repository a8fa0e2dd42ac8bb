"""A security key as second factor, by Chromium's virtual authenticator: added, asked for after a password, removed."""

from __future__ import annotations

import re
import shutil
import threading
from typing import Any

import pytest

from controlplane.tenants import services
from tests.world import PASSWORD

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.full, pytest.mark.usefixtures("redis_url")]


def walk(base_url: str, email: str) -> None:
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        executable = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        context = browser.new_context(base_url=base_url)
        context.set_default_timeout(20_000)
        page, troubles = context.new_page(), list[str]()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        session = context.new_cdp_session(page)
        session.send("WebAuthn.enable")
        options = {"protocol": "ctap2", "transport": "usb", "automaticPresenceSimulation": True}
        key = session.send("WebAuthn.addVirtualAuthenticator", {"options": options})["authenticatorId"]

        def sign_in() -> None:
            page.goto("/login")
            page.get_by_label("E-mail").fill(email)
            page.get_by_label("Password").fill(PASSWORD)
            page.get_by_role("button", name="Sign in", exact=True).click()

        sign_in()
        page.goto("/account")
        page.get_by_role("link", name="Add a security key").click()
        page.get_by_label("Name").fill("My blue key")
        page.get_by_role("button", name="Add it").click()
        expect(page.get_by_role("heading", name="Recovery codes")).to_be_visible()
        assert len(session.send("WebAuthn.getCredentials", {"authenticatorId": key})["credentials"]) == 1
        page.context.clear_cookies()
        sign_in()
        expect(page.get_by_role("heading", name="Second factor")).to_be_visible()
        page.goto("/keys")
        expect(page).to_have_url(re.compile("/login"))  # the password alone opens nothing
        page.goto("/account/2fa/authenticate")
        page.get_by_role("button", name="Use your security key").click()
        expect(page.get_by_role("heading", name="Second factor")).to_have_count(0)
        page.goto("/account")
        page.get_by_role("link", name="Remove My blue key").click()
        page.get_by_role("button", name="Remove it").click()
        expect(page.get_by_role("link", name="Turn on")).to_be_visible()
        assert troubles == []
        browser.close()


def test_a_security_key_from_its_first_use_to_its_end(live_server: Any, settings: Any) -> None:
    """Browsers give keys to `localhost` without TLS."""
    if not (shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("no Chromium on PATH: install the package chromium")
    settings.ALLOWED_HOSTS = ["*"]
    services.create_user(email="kim@example.org", password=PASSWORD)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            walk(live_server.url.replace("127.0.0.1", "localhost"), "kim@example.org")
        except BaseException as error:  # told by the thread that waits
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(110)
    if failed:
        raise failed[0]
    assert not thread.is_alive()
