"""Intake between a real Redis and a real Postgres, both thrown away. Imports late: this is read before Django
is up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import redis

from tests.billing.usage import KEYS
from tests.database import acting_as

if TYPE_CHECKING:
    from billing.booking import Books
    from billing.intake import Intake
    from billing.usage_streams import UsageStreams


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, socket_timeout=5) as found:
        yield found


@pytest.fixture
def streams(client: redis.Redis) -> UsageStreams:
    from billing.usage_streams import UsageStreams

    return UsageStreams(client, KEYS)


@pytest.fixture
def books(db: None) -> Iterator[Books]:
    """On the test's own connection, as the operator; everything is rolled back."""
    from django.db import connection

    from billing.booking import Books

    with acting_as("corral_operator"):
        yield Books(connection)


@pytest.fixture
def intake(streams: UsageStreams, books: Books) -> Intake:
    from billing.intake import Intake

    return Intake(streams, books)
