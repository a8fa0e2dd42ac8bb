"""corral_key_lookup: everything a gateway needs to know of an API key, in one query without a tenant."""

import json
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from django.conf import settings
from django.db import connection

from controlplane.deployments import services as deployments
from controlplane.deployments.models import Deployment
from controlplane.tenants import key_services, services
from controlplane.tenants.limits import Limits
from infra.local.postgres import EmbeddedPostgres
from tests.world import World, make_deployment


def look_up(lookup: str) -> Any:
    with connection.cursor() as cursor:
        cursor.execute("SELECT corral_key_lookup(%s)", [lookup])
        (found,) = cursor.fetchone()
    return found if found is None else json.loads(found)


@pytest.fixture
def key(world: World):
    made, _ = key_services.create_api_key(
        organization_id=world.organization.id,
        project_id=world.project.id,
        name="ci",
        weight=40,
        limits=Limits(rpm=60, budget_nano=5_000_000_000),
    )
    return made


def test_it_answers_with_key_project_organization_and_deployments(
    world: World, key, deployment: Deployment
) -> None:
    found = look_up(key.lookup)
    assert found["key"] == {
        "id": key.id.hex,
        "weight": 40,
        "scopes": None,
        "aliases": None,
        "lookup": key.lookup,
        "name": "ci",
        "digest": key.digest.hex(),
        "expires_at_ms": None,
        "revoked_at_ms": None,
        "limits": {
            "rpm": 60,
            "input_tpm": None,
            "output_tpm": None,
            "max_concurrency": None,
            "budget_nano": 5_000_000_000,
        },
    }
    assert found["project"]["id"] == world.project.id.hex
    assert found["project"]["weight"] == 100
    assert found["project"]["zero_retention"] is False
    assert found["organization"]["id"] == world.organization.id.hex
    assert found["organization"]["weight"] == 100
    assert found["organization"]["suspended_at_ms"] is None
    (served,) = found["deployments"]
    assert served == {
        "id": deployment.id.hex,
        "name": "toy-chat",
        "cell": "c0",
        "model_version": deployment.model_version_id.hex,
        "engine": "toy",
        "max_model_len": 2048,
        "min_replicas": 0,
        "max_replicas": 2,
        "generation": 1,
        "queue_order": "edf",
        "locality_window_tokens": 2000,
        "created_at_ms": int(deployment.created_at.timestamp() * 1000),
        "slo": {"name": "interactive", "band": 0, "ttft_ms": 1000, "itl_ms": 100, "deadline_s": 300},
        "price": {
            "version": deployment.price_version_id.hex,
            "input_nano_per_million": 100_000_000,
            "cached_nano_per_million": 25_000_000,
            "output_nano_per_million": 400_000_000,
        },
    }


def test_a_gateway_is_told_of_the_deployments_of_its_cell(
    world: World, key, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same name in two cells is two deployments."""
    monkeypatch.setattr(settings, "ENV", replace(settings.ENV, cell="c1"))
    twin = make_deployment(world, deployment.name, model_version_id=deployment.model_version_id)
    assert (deployment.cell, twin.cell) == ("c0", "c1")
    for cell, ids in (("c0", [deployment.id.hex]), ("c1", [twin.id.hex]), ("c2", [])):
        with connection.cursor() as cursor:
            cursor.execute("SELECT corral_key_lookup_in(%s, %s)", [key.lookup, cell])
            found = json.loads(cursor.fetchone()[0])
        assert [served["id"] for served in found["deployments"]] == ids


def test_an_unknown_key_is_null(world: World) -> None:
    assert look_up("A" * 12) is None


def test_revoked_and_suspended_are_told_with_their_time(world: World, key) -> None:
    key_services.revoke_api_key(organization_id=world.organization.id, key_id=key.id)
    services.suspend_organization(organization_id=world.organization.id, suspended=True)
    found = look_up(key.lookup)
    assert found["key"]["revoked_at_ms"] > 1_700_000_000_000
    assert found["organization"]["suspended_at_ms"] > 1_700_000_000_000


def test_deployments_of_another_project_tenant_or_the_past_are_not_in_it(
    world: World, key, deployment: Deployment
) -> None:
    second = services.create_project(organization_id=world.organization.id, name="Second", slug="second")
    deployments.create_deployment(
        organization_id=world.organization.id,
        project_id=second.id,
        name="elsewhere",
        model_version_id=deployment.model_version_id,
        engine_profile={"engine": "toy"},
    )
    assert [d["name"] for d in look_up(key.lookup)["deployments"]] == ["toy-chat"]
    deployments.delete_deployment(organization_id=world.organization.id, deployment_id=deployment.id)
    assert look_up(key.lookup)["deployments"] == []


@pytest.mark.django_db(transaction=True)
def test_it_is_one_index_lookup_and_cannot_be_read_around(pg_server: EmbeddedPostgres) -> None:
    with psycopg.connect(pg_server.dsn("app"), autocommit=True) as app:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            app.execute("SELECT * FROM corral_change")
        assert app.execute("SELECT count(*) FROM tenants_apikey").fetchone() == (0,)
    with psycopg.connect(pg_server.dsn("owner"), autocommit=True) as owner:
        owner.execute("SET enable_seqscan = off")
        plan = "\n".join(
            line
            for (line,) in owner.execute("EXPLAIN SELECT * FROM tenants_apikey WHERE lookup = 'x'").fetchall()
        )
        assert "Index Scan" in plan
