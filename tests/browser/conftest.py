"""A real headless Chromium, and the stack it visits.

`CORRAL_TEST_QUICKSTART` names the quickstart.json of a stack that runs already; without it, one is started with the
toy engine and ended afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
# A browser, a whole stack and other tests share the cores: an answer that a free machine gives in 50 ms took 6 s.
ACTION_TIMEOUT_MS = 60_000


@dataclass(frozen=True)
class Visit:
    """Where to go and whom to be."""

    console_url: str
    email: str
    password: str
    deployment: str


@pytest.fixture(scope="session")
def visit() -> Iterator[Visit]:
    named = os.environ.get("CORRAL_TEST_QUICKSTART")
    if named:
        facts = json.loads(Path(named).read_text())
        yield Visit(facts["console_url"], facts["admin_email"], facts["admin_password"], facts["deployment"])
        return
    from benchmarks.stack import bench_stack

    with bench_stack("toy") as stack:
        yield Visit(
            stack.facts.console_url,
            stack.facts.admin_email,
            stack.facts.admin_password,
            stack.facts.deployment,
        )


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    executable = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if executable is None:
        pytest.skip(
            f"no Chromium on PATH (looked for {', '.join(CHROMIUM_NAMES)}): install the package chromium"
        )
    expect.set_options(timeout=ACTION_TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 860), (390, 844)], ids=["desktop", "phone"])
def page(browser: Browser, visit: Visit, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A fresh window that fails the test on any script error or refusal of the content security policy."""
    width, height = request.param
    context = browser.new_context(
        base_url=visit.console_url, viewport={"width": width, "height": height}, has_touch=width < 600
    )
    context.set_default_timeout(ACTION_TIMEOUT_MS)
    page = context.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    yield page
    context.close()
    assert troubles == []
