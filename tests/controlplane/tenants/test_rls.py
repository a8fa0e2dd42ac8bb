"""Row-level security over the whole schema: walks every table, so that a new one cannot be forgotten."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import psycopg
import pytest
from django.apps import apps
from django.db import IntegrityError, connection, models, transaction

from controlplane.tenants.context import tenant
from controlplane.tenants.models import ApiKey, Organization, Project
from infra.local.postgres import EmbeddedPostgres
from tests.world import World, build_world

AsOperator = Callable[[], AbstractContextManager[None]]

# Tables without a tenant that the app role may read nevertheless.
READABLE_WITHOUT_TENANT = {
    "tenants_user": "signing in comes before a tenant is known; a user may belong to several",
    "django_session": "likewise; rows are found by an unguessable key",
    "account_emailaddress": "likewise; allauth's, kept empty",
    "mfa_authenticator": "likewise; a person's second factor, its seed sealed",
    "usersessions_usersession": "likewise; where a person is signed in",
    "socialaccount_socialaccount": "likewise; which subject of which identity provider a person is",
    "identity_cache": "counters of attempts and used codes, by user or address",
    "deployments_sloclass": "the same promises for every tenant",
}
# References between tenant tables that no composite foreign key guards.
NOT_SAME_TENANT = {
    "deployments_deployment.price_version_id": "prices may be everybody's (NULL); the service checks",
    "audit_seal.entry_id": "the house alone seals; verifying asks for both",
    "billing_usageevent.project_id": "an event outlives what it names; intake checks the admission record",
    "billing_usageevent.api_key_id": "likewise",
    "slo_slowindow.project_id": "sums of what intake has checked",
}


def rows(query: str, *parameters: object) -> list[tuple]:
    with connection.cursor() as cursor:
        cursor.execute(query, parameters or None)
        return cursor.fetchall()


def tenant_models() -> list[type[models.Model]]:
    """Models with an organization, and the organization itself."""
    return [
        model
        for model in apps.get_models()
        if model is Organization or any(field.name == "organization" for field in model._meta.fields)
    ]


@pytest.mark.django_db
def test_every_table_with_an_organization_has_row_security_and_policies_for_both_roles() -> None:
    assert len(tenant_models()) >= 10
    for model in tenant_models():
        table = model._meta.db_table
        assert rows("SELECT relrowsecurity FROM pg_class WHERE relname = %s", table) == [(True,)], table
        policies = {
            (name, role): (using, check)
            for name, role, using, check in rows(
                "SELECT policyname, unnest(roles)::text, qual, with_check "
                # What is restrictive only takes away from what these allow.
                "FROM pg_policies WHERE tablename = %s AND permissive = 'PERMISSIVE'",
                table,
            )
        }
        column = "id" if model is Organization else "organization_id"
        using, check = policies["tenant", "corral_app"]
        assert using == check
        assert column in using and "corral.organization_id" in using, table
        assert policies["operator", "corral_operator"] == ("true", "true"), table
        others = policies.keys() - {("tenant", "corral_app"), ("operator", "corral_operator")}
        assert others <= {("shared", "corral_app"), ("granted", "corral_app")}, table
        if ("granted", "corral_app") in others:  # the other side of an agreement may read it, no more
            assert table == "deployments_grant"
            assert rows("SELECT cmd FROM pg_policies WHERE policyname = 'granted'") == [("SELECT",)]


@pytest.mark.django_db(transaction=True)
def test_no_table_shows_the_app_role_a_row_without_a_tenant(pg_server: EmbeddedPostgres) -> None:
    build_world()
    with psycopg.connect(pg_server.dsn("app"), autocommit=True) as app:
        tables = app.execute(
            "SELECT oid::regclass::text FROM pg_class WHERE relnamespace = 'public'::regnamespace "
            "AND relkind IN ('r', 'p', 'v', 'm', 'f')"
        ).fetchall()
        assert len(tables) > 20
        for (table,) in tables:
            try:
                n_rows = len(app.execute(f"SELECT 1 FROM {table}").fetchall())
            except psycopg.errors.InsufficientPrivilege:
                continue
            if table == "billing_priceversion":  # the one shared catalogue: only rows of nobody's
                n_rows = len(
                    app.execute(f"SELECT 1 FROM {table} WHERE organization_id IS NOT NULL").fetchall()
                )
            assert n_rows == 0 or table in READABLE_WITHOUT_TENANT, table
        assert app.execute("SELECT count(*) FROM tenants_user").fetchone() == (3,)


@pytest.mark.django_db
def test_no_serving_role_owns_bypasses_or_creates_anything() -> None:
    attributes = rows(
        "SELECT rolname, rolsuper, rolbypassrls, rolcreaterole, rolcreatedb FROM pg_roles "
        "WHERE rolname IN ('corral_app', 'corral_operator') ORDER BY rolname"
    )
    assert attributes == [
        ("corral_app", False, False, False, False),
        ("corral_operator", False, False, False, False),
    ]
    assert rows("SELECT has_schema_privilege('corral_app', 'public', 'CREATE')") == [(False,)]
    owners = rows("SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'")
    assert owners == [("corral_owner",)]


@pytest.mark.django_db
def test_security_definer_functions_pin_their_search_path_and_are_not_public() -> None:
    functions = rows(
        "SELECT proname, proconfig::text, proacl::text FROM pg_proc "
        "WHERE pronamespace = 'public'::regnamespace AND prosecdef"
    )
    assert {name for name, _, _ in functions} >= {"corral_key_lookup", "corral_user_memberships"}
    for name, configuration, rights in functions:
        assert "search_path=public, pg_temp" in configuration, name
        assert rights is not None and "{=X" not in rights and ",=X" not in rights, name


@pytest.mark.django_db
def test_a_partition_cannot_be_read_around_its_parent() -> None:
    partitions = rows("SELECT oid::regclass::text FROM pg_class WHERE relispartition AND relkind = 'r'")
    assert partitions
    for (partition,) in partitions:
        for role in ("corral_app", "corral_operator"):
            assert rows("SELECT has_table_privilege(%s, %s, 'SELECT')", role, partition) == [(False,)]


@pytest.mark.django_db
def test_every_reference_between_tenant_tables_stays_in_one_tenant() -> None:
    tenant_tables = {model._meta.db_table for model in tenant_models()} - {"tenants_organization"}
    composite = {
        (table, column)
        for table, column in rows(
            "SELECT c.conrelid::regclass::text, a.attname FROM pg_constraint c "
            "JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = c.conkey[2] "
            "WHERE c.contype = 'f' AND cardinality(c.conkey) = 2"
        )
    }
    for model in tenant_models():
        for field in model._meta.fields:
            if not isinstance(field, models.ForeignKey) or field.name == "organization":
                continue
            if field.related_model._meta.db_table not in tenant_tables:
                continue
            reference = (model._meta.db_table, field.column)
            assert reference in composite or ".".join(reference) in NOT_SAME_TENANT, reference


def test_a_stranger_finds_none_of_it(world: World) -> None:
    with tenant(world.other_organization.id):
        assert list(Project.objects.values_list("id", flat=True)) == [world.other_project.id]
        assert not Project.objects.filter(id=world.project.id).exists()
        assert list(Organization.objects.values_list("slug", flat=True)) == ["other"]
        assert Project.objects.filter(id=world.project.id).update(name="taken over") == 0


def test_without_a_tenant_there_is_nothing(world: World) -> None:
    assert not Project.objects.exists()
    assert not Organization.objects.exists()
    assert rows("SELECT * FROM tenants_member") == []


def test_the_house_sees_all(world: World, as_operator: AsOperator) -> None:
    with as_operator():
        assert set(Organization.objects.values_list("slug", flat=True)) == {"acme", "other"}


def test_writing_into_another_tenant_is_refused(world: World) -> None:
    with (
        tenant(world.other_organization.id),
        pytest.raises(Exception, match="row-level security"),
        transaction.atomic(),
    ):
        Project.objects.create(organization=world.organization, name="Trojan", slug="trojan")


def test_pointing_at_another_tenants_row_is_refused(world: World) -> None:
    """A plain foreign key check ignores row security and would accept this project's id."""
    with (
        pytest.raises(IntegrityError, match="same_tenant"),
        tenant(world.other_organization.id),
        transaction.atomic(),
    ):
        ApiKey.objects.create(
            organization=world.other_organization,
            project=world.project,
            name="reach over",
            lookup="x" * 12,
            digest=b"d" * 32,
            last4="xxxx",
        )
        with connection.cursor() as cursor:
            cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
