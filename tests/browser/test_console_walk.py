"""What somebody does on the first day: signs in, makes a key, chats, and finds the usage. On a live stack."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Visit

pytestmark = [pytest.mark.browser, pytest.mark.stack]

# A replica may have to wake first.
ANSWER_TIMEOUT_MS = 60_000
# Usage appears a second after the end; pages are asked again until then.
BOOKED_TIMEOUT_MS = 15_000


def sign_in(page: Page, visit: Visit) -> None:
    page.goto("/")
    expect(page).to_have_url(re.compile("/login"))
    page.get_by_label("E-mail").fill(visit.email)
    page.get_by_label("Password").fill(visit.password)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="Overview")).to_be_visible()


def fits(page: Page) -> bool:
    """Nothing sticks out to the right."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


def test_sign_in_key_chat_usage(page: Page, visit: Visit) -> None:
    sign_in(page, visit)
    expect(page.locator("#live").get_by_role("link", name=visit.deployment, exact=True)).to_be_visible()
    assert fits(page)

    page.get_by_role("navigation", name="Main").get_by_role("link", name=re.compile("keys", re.I)).click()
    page.get_by_label("Name").fill("walk")
    page.get_by_role("button", name="Create key").click()
    expect(page.get_by_role("heading", name="Key “walk” is ready")).to_be_focused()
    expect(page.locator("#secret")).to_have_text(re.compile(r"^sk-crl-[0-9A-Za-z]{12}-[\w-]{43}$"))
    assert fits(page)
    page.reload()
    expect(page.locator("#secret")).to_have_count(0)

    page.goto("/playground")
    page.get_by_label("Message", exact=True).fill("What is the capital of France?")
    page.keyboard.press("Enter")
    answer = page.get_by_role("article", name="Answer")
    expect(answer).to_contain_text(re.compile(r"\d+ tokens · first after"), timeout=ANSWER_TIMEOUT_MS)
    assert fits(page)
    n_tokens = re.search(r"(\d+) tokens · first", answer.inner_text())
    assert n_tokens is not None
    expect(page.get_by_role("button", name="Send")).to_be_visible()

    page.goto("/usage")
    newest = page.locator("#requests tbody tr").first
    for _ in range(BOOKED_TIMEOUT_MS // 500):
        if newest.count() and f"→ {n_tokens[1]}" in newest.inner_text():
            break
        page.wait_for_timeout(500)
        page.reload()
    expect(newest).to_contain_text(visit.deployment)
    expect(newest).to_contain_text(f"→ {n_tokens[1]}")
    expect(newest).to_contain_text(re.compile(r"\$0\.0\d+"))
    assert fits(page)


def test_stop_ends_an_answer_early(page: Page, visit: Visit) -> None:
    sign_in(page, visit)
    page.goto("/playground")
    if not page.get_by_label("Max tokens").is_visible():
        page.get_by_text("Settings").click()
    page.get_by_label("Max tokens").fill("2000")
    page.get_by_label("Message", exact=True).fill("Tell me a long story.")
    page.keyboard.press("Enter")
    answer = page.get_by_role("article", name="Answer")
    expect(answer.locator(".text")).not_to_be_empty(timeout=ANSWER_TIMEOUT_MS)
    page.get_by_role("button", name="Stop").click()
    expect(answer).to_contain_text(re.compile(r"Stopped after \d+ tokens"))
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    stopped = re.search(r"Stopped after (\d+) tokens", answer.inner_text())
    assert stopped is not None
    assert 1 <= int(stopped[1]) < 2000


def test_revoking_a_key_asks_in_a_dialog(page: Page, visit: Visit) -> None:
    sign_in(page, visit)
    page.goto("/keys")
    page.get_by_label("Name").fill("short-lived")
    page.get_by_role("button", name="Create key").click()
    revoke = page.get_by_role("link", name="Revoke short-lived").first
    revoke.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("link", name="Keep it").click()
    expect(dialog).to_be_hidden()
    revoke.click()
    dialog.get_by_role("button", name="Revoke key").click()
    expect(page.get_by_role("status")).to_contain_text("is revoked")
    assert page.get_by_role("link", name="Revoke short-lived").count() == 0


def test_the_keyboard_alone_signs_in_and_reaches_the_content(page: Page, visit: Visit) -> None:
    page.goto("/login")
    expect(page.get_by_label("E-mail")).to_be_focused()
    page.keyboard.type(visit.email)
    page.keyboard.press("Tab")
    page.keyboard.type(visit.password)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Overview")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    assert page.evaluate("document.activeElement.id") == "main"
