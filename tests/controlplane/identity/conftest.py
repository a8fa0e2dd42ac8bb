"""Mail that was sent, and the links in it."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest


@pytest.fixture
def link(mailoutbox: list) -> Callable[[], str]:
    """The path behind the link of the last mail."""

    def find() -> str:
        found = re.search(r"https?://[^/\s]+(/\S+)", mailoutbox[-1].body)
        assert found, mailoutbox[-1].body
        return found[1]

    return find
