"""Celery's way back to a broker that was away."""

from __future__ import annotations

from typing import Any

import kombu.exceptions
import kombu.utils.functional
import pytest

from infra.local.ports import free_port
from workers.app import ConsumerConfig, make_app
from workers.broker_connection import MAX_S


def test_a_broker_that_is_away_is_asked_again_within_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kombu.utils.functional, "sleep", lambda _s: None)
    app = make_app(ConsumerConfig(f"redis://127.0.0.1:{free_port()}/0", "t0:m:m1:", "r1"))
    waits: list[float] = []

    def note(_error: Exception, wait_s: float) -> None:
        waits.append(wait_s)

    connection: Any = app.connection_for_read()
    with pytest.raises(kombu.exceptions.OperationalError):
        connection.ensure_connection(note, 15)
    assert waits[0] < 0.2
    assert sum(waits[:3]) < 1.5
    assert max(waits) <= MAX_S
