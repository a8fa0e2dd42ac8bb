"""Rules about service classes: made, refused, isolated, told to gateways."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from django.db import connection
from msgspec import convert

from billing.money import NanoPerMillion, Rates
from billing.prices import create_price_version
from controlplane.deployments import services as deployments
from controlplane.deployments.models import Deployment
from controlplane.errors import ConflictError, InvalidInputError, NotFoundError
from controlplane.gateway.directory import KeyRecord
from controlplane.gateway.keycontext import context_of
from controlplane.slo import services
from controlplane.slo.models import SloRule
from controlplane.tenants import key_services
from controlplane.tenants.context import tenant
from tests.database import acting_as
from tests.world import World, make_deployment


def record(world: World, lookup: str) -> KeyRecord:
    with connection.cursor() as cursor:
        cursor.execute("SELECT corral_key_lookup_slo(%s, 'c0')", [lookup])
        return convert(json.loads(cursor.fetchone()[0]), KeyRecord)


def rule(world: World, slo_class: str = "standard", **values: object) -> SloRule:
    return services.create_rule(
        organization_id=world.organization.id, project_id=world.project.id, slo_class=slo_class, **values
    )


def test_a_gateway_learns_rules_classes_and_prices_with_the_key(world: World, deployment: Deployment) -> None:
    key, _ = key_services.create_api_key(
        organization_id=world.organization.id, project_id=world.project.id, name="k"
    )
    other, _ = key_services.create_api_key(
        organization_id=world.organization.id, project_id=world.project.id, name="other"
    )
    rule(world, ttft_ms=4_000, api_key_id=key.id, is_default=True)
    rule(world, "batch", deployment_id=deployment.id, objective_ppm=700_000)
    deployments.update_deployment(
        organization_id=world.organization.id,
        deployment_id=deployment.id,
        change=deployments.Change(admission="predicted"),
    )
    with acting_as("corral_operator"):
        create_price_version(
            name="standard-batch",
            rates=Rates(NanoPerMillion(1), NanoPerMillion(2), NanoPerMillion(3)),
            valid_from=datetime(2026, 1, 1, tzinfo=UTC),
        )
    served = context_of(record(world, key.lookup)).deployments["toy-chat"]
    assert (served.promise.name, served.promise.ttft_ms, served.predicts) == ("standard", 4_000, True)
    assert served.classes["batch"].promise.objective_ppm == 700_000
    assert served.classes["batch"].rates.output == 3
    assert served.classes["flex"].price_version == served.price_version == deployment.price_version_id.hex
    assert served.classes["flex"].promise.objective_ppm == 900_000
    theirs = context_of(record(world, other.lookup)).deployments["toy-chat"]
    assert (theirs.promise.name, theirs.classes["standard"].promise.ttft_ms) == ("interactive", 5_000)


def test_what_a_rule_may_not_say_is_refused_by_field(world: World, deployment: Deployment) -> None:
    for error, field, values in (
        (InvalidInputError, "slo_class", {"slo_class": "gold"}),
        (NotFoundError, "project", {"project_id": world.other_project.id}),
        (NotFoundError, "deployment", {"deployment_id": world.project.id}),
    ):
        with pytest.raises(error) as refused:
            services.create_rule(
                **{
                    "organization_id": world.organization.id,
                    "project_id": world.project.id,
                    "slo_class": "batch",
                    **values,
                }
            )
        assert refused.value.field == field
    rule(world, is_default=True)
    for values, field in (({}, "slo_class"), ({"slo_class": "batch", "is_default": True}, "is_default")):
        with pytest.raises(ConflictError) as taken:
            rule(world, **values)
        assert taken.value.field == field


def test_a_strangers_rule_does_not_exist(world: World) -> None:
    made = rule(world)
    with pytest.raises(NotFoundError):
        services.delete_rule(organization_id=world.other_organization.id, rule_id=made.id)
    with tenant(world.other_organization.id):
        assert not SloRule.objects.filter(id=made.id).exists()
    services.delete_rule(organization_id=world.organization.id, rule_id=made.id)


def test_every_change_is_noted_for_gateways_and_audited(world: World) -> None:
    made = rule(world)
    services.delete_rule(organization_id=world.organization.id, rule_id=made.id)
    with acting_as("corral_owner"), connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM corral_change WHERE ref = %s", [f"prj:{world.project.id.hex}"])
        assert cursor.fetchone()[0] >= 2
        cursor.execute("SELECT array_agg(action ORDER BY id) FROM audit_entry WHERE thing = %s", [made.id])
        assert cursor.fetchone()[0] == ["create", "delete"]


def test_a_deployments_way_to_refuse_is_one_of_three(world: World) -> None:
    with pytest.raises(InvalidInputError) as refused:
        make_deployment(world, admission="never")
    assert refused.value.field == "admission"
