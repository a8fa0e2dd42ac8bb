"""Fixtures of the agent's tests."""

from collections.abc import Iterator

import pytest

from tests.workers.serving import Cell


@pytest.fixture
def cell(redis_url: str) -> Iterator[Cell]:
    made = Cell(redis_url)
    yield made
    made.close()
