"""Somebody turns two-factor authentication on, signs in with it, and turns it off. On a live stack."""

from __future__ import annotations

import re
import time

import pytest
from allauth.mfa.totp.internal.auth import format_hotp_value, hotp_value
from playwright.sync_api import Page, expect

from tests.browser.conftest import Visit
from tests.browser.test_console_walk import fits, sign_in

pytestmark = [pytest.mark.browser, pytest.mark.stack, pytest.mark.full]

PERIOD_S = 30


def code_of(secret: str, used: set[str]) -> str:
    """One that was not used, of now or of the period either side, which count, too."""
    period = int(time.time()) // PERIOD_S
    return next(
        code
        for code in (format_hotp_value(hotp_value(secret, period + n)) for n in (0, 1, -1))
        if code not in used
    )


def test_a_second_factor_from_enrolment_to_its_end(page: Page, visit: Visit) -> None:
    sign_in(page, visit)
    page.goto("/account")
    page.get_by_role("link", name="Turn on").click()
    expect(page.get_by_role("img", name=re.compile("QR code"))).to_be_visible()
    assert fits(page)
    page.get_by_text("It cannot be scanned?").click()
    secret = page.locator("#totp-secret").inner_text()
    wrong = page.get_by_label(re.compile("code", re.I))
    wrong.fill("000000")
    page.get_by_role("button", name="Turn it on").click()
    expect(page.get_by_role("alert")).to_be_visible()
    page.get_by_text("It cannot be scanned?").click()
    secret, used = page.locator("#totp-secret").inner_text(), set()
    try:
        used.add(code := code_of(secret, used))
        page.get_by_label(re.compile("code", re.I)).fill(code)
        page.get_by_role("button", name="Turn it on").click()
        expect(page.get_by_role("heading", name="Recovery codes")).to_be_visible()
        codes = page.locator("#codes").inner_text().split()
        assert len(codes) == 10
        assert fits(page)
        page.get_by_role("link", name="I have kept them").click()

        page.context.clear_cookies()
        page.goto("/login")
        page.get_by_label("E-mail").fill(visit.email)
        page.get_by_label("Password").fill(visit.password)
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("heading", name="Second factor")).to_be_visible()
        assert fits(page)
        page.goto("/keys")
        expect(page).to_have_url(re.compile("/login"))  # the password alone opens nothing
        page.goto("/account/2fa/authenticate")
        page.get_by_label(re.compile("code", re.I)).fill(codes[0])
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("heading", name="Overview")).to_be_visible()

        page.context.clear_cookies()
        page.goto("/login")
        page.get_by_label("E-mail").fill(visit.email)
        page.get_by_label("Password").fill(visit.password)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_label(re.compile("code", re.I)).fill(code_of(secret, used))
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("heading", name="Overview")).to_be_visible()
        page.goto("/sign-in")
        expect(page.get_by_role("heading", name="Sign-in and directory")).to_be_visible()
        assert fits(page)
    finally:
        page.goto("/account")
        page.get_by_role("link", name="Turn off").click()
        page.get_by_role("button", name="Turn it off").click()
        expect(page.get_by_role("link", name="Turn on")).to_be_visible()
