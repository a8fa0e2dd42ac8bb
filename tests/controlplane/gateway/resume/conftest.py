"""The story's machine, and a second gateway process to come back through."""

from collections.abc import AsyncIterator

import pytest

from tests.controlplane.gateway.harness import (
    Machine,
    Running,
    running,
)
from tests.controlplane.gateway.resume.story import Teller


@pytest.fixture
def teller(machine: Machine) -> Teller:
    return Teller(machine)


@pytest.fixture
async def other(gw: Running, redis_url: str) -> AsyncIterator[Running]:
    """Another gateway process of the cell, as far as Redis can tell; its clients hold the same keys."""
    async with running(redis_url, gw.directory, name="gw-other") as it:
        it.key = gw.key
        yield it
