"""Fixtures of the worker's tests."""

from collections.abc import Iterator

import pytest

from tests.workers.fronts import Machine


@pytest.fixture
def machine(redis_url: str) -> Iterator[Machine]:
    """A machine with its restricted Redis user, on an empty Redis."""
    made = Machine(redis_url)
    yield made
    made.r.close()
