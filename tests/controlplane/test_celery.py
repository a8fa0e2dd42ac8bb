"""The control side's Celery application: scheduled tasks exist, broker keys have their prefix."""

import pytest
import redis
from django.conf import settings

from controlplane.celery import app
from workers.broker_connection import BrokerConnection
from workers.transport import Transport


def test_every_scheduled_task_exists_and_expires_no_later_than_a_few_turns() -> None:
    app.loader.import_default_modules()
    for name, entry in app.conf.beat_schedule.items():
        assert entry["task"] in app.tasks, name
        assert 0 < entry["options"]["expires"] <= max(10.0, entry["schedule"]), name


def test_a_message_lands_in_the_queue_under_the_prefix_of_control(redis_url: str) -> None:
    with app.connection_for_write() as connection:
        app.send_task("tenants.prune_changes", connection=connection)
    with redis.Redis.from_url(redis_url) as client:
        keys = {key.decode() for key in client.scan_iter()}
        assert client.llen(f"{settings.ENV.cell}:ctl:control") == 1
    assert keys
    assert all(key.startswith(f"{settings.ENV.cell}:ctl:") for key in keys), keys


def test_control_survives_a_broker_that_goes_away_as_replicas_do() -> None:
    """What that takes: tests/workers/test_broker_connection.py."""
    with app.connection_for_read() as connection:
        assert isinstance(connection, BrokerConnection)
        assert issubclass(connection.get_transport_cls(), Transport)


@pytest.mark.parametrize("content_type", ["pickle", "yaml"])
def test_nothing_but_json_is_accepted(content_type: str) -> None:
    assert content_type not in app.conf.accept_content
