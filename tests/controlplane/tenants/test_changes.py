"""Change notes: a gateway that polls hears of every committed change exactly from its watermark on."""

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import redis
from django.conf import settings as django_settings
from django.db import connection, transaction

from controlplane.deployments import sharing
from controlplane.deployments.models import Phase
from controlplane.deployments.status import record_phase
from controlplane.tenants import invalidation, key_services, services
from controlplane.tenants.context import tenant
from controlplane.tenants.models import ApiKey
from controlplane.tenants.tasks import prune_changes
from infra.local.postgres import EmbeddedPostgres
from tests.database import acting_as
from tests.world import World, build_world, make_deployment

pytestmark = pytest.mark.django_db(transaction=True)


def changes_since(watermark: str | None) -> Any:
    with connection.cursor() as cursor:
        cursor.execute("SELECT corral_changes_since(%s)", [watermark])
        return json.loads(cursor.fetchone()[0])


def now() -> str:
    return changes_since(None)["watermark"]


@pytest.fixture
def committed(transactional_db: None) -> World:
    return build_world()


@pytest.fixture
def another_session(pg_server: EmbeddedPostgres) -> Iterator[psycopg.Connection]:
    with psycopg.connect(pg_server.dsn("operator")) as session:
        yield session


def new_key(world: World) -> ApiKey:
    return key_services.create_api_key(
        organization_id=world.organization.id, project_id=world.project.id, name="ci"
    )[0]


def test_each_change_is_told_under_the_name_gateways_cache_it_by(committed: World) -> None:
    before = now()
    key = new_key(committed)
    deployment = make_deployment(committed)
    told = changes_since(before)
    assert told["reset"] is False
    assert set(told["changes"]) == {
        f"key:{key.lookup}",
        f"dep:{deployment.id.hex}",
        f"prj:{committed.project.id.hex}",
    }
    assert changes_since(told["watermark"])["changes"] == []
    services.suspend_organization(organization_id=committed.organization.id, suspended=True)
    assert changes_since(told["watermark"])["changes"] == [f"org:{committed.organization.id.hex}"]


def test_what_nobody_caches_is_not_told(committed: World) -> None:
    key = new_key(committed)
    deployment = make_deployment(committed)
    before = now()
    with tenant(committed.organization.id):
        ApiKey.objects.filter(id=key.id).update(last_used_at="2026-11-20T00:00:00Z")
    with acting_as("corral_operator"):
        assert record_phase(deployment_id=deployment.id, phase=Phase.READY)
        assert not record_phase(deployment_id=deployment.id, phase=Phase.READY)
    assert changes_since(before)["changes"] == []


def test_a_change_that_commits_late_is_not_missed(
    committed: World, another_session: psycopg.Connection
) -> None:
    """The trap of polling by time: the late change carries an earlier time than the watermark."""
    key = new_key(committed)
    another_session.execute("UPDATE tenants_apikey SET revoked_at = now() WHERE id = %s", [key.id])
    early = now()
    services.suspend_organization(organization_id=committed.organization.id, suspended=True)
    seen = changes_since(early)
    assert f"key:{key.lookup}" not in seen["changes"]
    another_session.commit()
    assert f"key:{key.lookup}" in changes_since(seen["watermark"])["changes"]


def test_a_rolled_back_change_is_not_told(committed: World) -> None:
    before = now()
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        new_key(committed)
        raise ZeroDivisionError
    assert changes_since(before)["changes"] == []


def test_a_reader_from_before_the_pruning_starts_afresh(
    committed: World, pg_server: EmbeddedPostgres
) -> None:
    before = now()
    new_key(committed)
    with psycopg.connect(pg_server.dsn("owner"), autocommit=True) as owner:
        owner.execute("UPDATE corral_change SET at = now() - interval '2 hours'")
    with acting_as("corral_operator"):
        prune_changes()
    after = changes_since(before)
    assert after["reset"] is True and after["changes"] == []
    assert changes_since(after["watermark"])["reset"] is False


def test_a_watermark_of_another_server_starts_afresh(committed: World) -> None:
    assert changes_since("99999999999")["reset"] is True


def test_too_many_changes_start_afresh(committed: World, another_session: psycopg.Connection) -> None:
    before = now()
    another_session.execute(
        "INSERT INTO tenants_apikey "
        "(id, organization_id, project_id, name, lookup, digest, last4, created_at) "
        "SELECT gen_random_uuid(), %s, %s, 'many', lpad(n::text, 12, '0'), '', '', now() "
        "FROM generate_series(1, 2001) AS n",
        [committed.organization.id, committed.project.id],
    )
    another_session.commit()
    assert changes_since(before)["reset"] is True


def test_the_same_is_published_after_commit_and_only_then(committed: World, redis_url: str) -> None:
    channel = f"{django_settings.ENV.cell}:inval"
    with redis.Redis.from_url(redis_url) as client, client.pubsub() as listener:
        listener.subscribe(channel)
        assert listener.get_message(timeout=5)["type"] == "subscribe"
        with transaction.atomic():
            key = new_key(committed)
            assert listener.get_message(timeout=0.05) is None
        assert listener.get_message(timeout=5)["data"] == f"key:{key.lookup}".encode()


def test_redis_away_does_not_fail_the_change_and_is_one_line_in_the_log(
    committed: World, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(invalidation, "_client", lambda _url: redis.Redis(port=1, socket_connect_timeout=0.2))
    before = now()
    caplog.clear()
    key = new_key(committed)
    assert changes_since(before)["changes"] == [f"key:{key.lookup}"]
    (warning,) = [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert "invalidation.not_published" in warning.getMessage()


def test_leave_given_and_taken_back_is_told_to_who_holds_it(committed: World) -> None:
    deployment = make_deployment(committed)
    ref = f"org:{committed.other_organization.id.hex}"
    before = now()
    with acting_as("corral_operator"):
        held = sharing.grant(
            organization_id=committed.organization.id,
            deployment_id=deployment.id,
            grantee_id=committed.other_organization.id,
        )
    assert changes_since(before)["changes"] == [ref]
    before = now()
    sharing.withdraw(organization_id=committed.organization.id, grant_id=held.id)
    assert changes_since(before)["changes"] == [ref]
