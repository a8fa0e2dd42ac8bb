"""Who may call what: every operation of the document, with every kind of caller. A new one without a row fails."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.utils import timezone

from controlplane.adapters import services as adapters
from controlplane.api.app import api as rest
from controlplane.lifecycle import erasure, exports
from controlplane.lifecycle.models import Export
from controlplane.operations.models import Operation
from controlplane.tenants import key_services, services
from controlplane.tenants import service_accounts as accounts
from controlplane.tenants.models import Role
from controlplane.tenants.rights import PERMISSIONS, Permission
from tests.booked import book_usage
from tests.controlplane.api.caller import Api, token_of
from tests.database import acting_as
from tests.world import World, make_replica, make_version

# What each write sends. Reads send nothing.
BODIES: dict[str, Any] = {
    "change_organization": {"name": "New name"},
    "set_organization_limits": {"rpm": 5},
    "create_project": {"name": "Two", "slug": "two"},
    "change_project": {"name": "New name"},
    "set_project_limits": {"rpm": 5},
    "change_member": {"role": "viewer"},
    "remove_member": None,
    "create_invitation": {"email": "new@example.org", "role": "viewer"},
    "resend_invitation": None,
    "revoke_invitation": None,
    "create_identity_provider": {
        "kind": "oidc",
        "name": "Other",
        "issuer": "https://id.example.org",
        "client_id": "corral",
    },
    "change_identity_provider": {"is_enabled": False},
    "delete_identity_provider": None,
    "create_domain": {"name": "example.net"},
    "verify_domain": None,
    "delete_domain": None,
    "change_sign_in_policy": {"require_mfa": True},
    "create_scim_token": {"name": "Entra"},
    "revoke_scim_token": None,
    "create_service_account": {"name": "robot", "role": "viewer"},
    "delete_service_account": None,
    "create_token": {"name": "t"},
    "revoke_token": None,
    "create_key": {"name": "program"},
    "change_key": {"name": "other", "tags": ["a"]},
    "set_key_scopes": {"models": ["served"], "routes": ["chat"], "ip_ranges": ["203.0.113.0/24"]},
    "set_key_limits": {"rpm": 5},
    "rotate_key": {"overlap_s": 60},
    "revoke_key": None,
    "create_deployment": {"name": "toy"},
    "change_deployment": {"max_replicas": 2},
    "delete_deployment": None,
    "begin_rollout": {"engine_profile": {"engine": "toy", "max_num_seqs": 7}},
    "order_rollout": {},
    "retire_model_version": None,
    "create_adapter": {"name": "casual"},
    "complete_adapter": None,
    "retire_adapter": None,
    "drain_replica": None,
    "drain_machine": None,
    "withdraw_grant": None,
    "create_export": {},
    "delete_export": None,
    "request_erasure": {"confirm": "acme"},
    "cancel_erasure": None,
    "create_slo_rule": {"slo_class": "batch", "ttft_ms": 5000},
    "set_end_customer_limits": {"rpm": 5, "end_customer": "cust-1"},
    "clear_end_customer_limits": None,
    "change_slo_rule": {"ttft_ms": 400},
    "delete_slo_rule": None,
    "create_budget": {"name": "team", "limit_nano": 5, "period": "day"},
    "change_budget": {"limit_nano": 7},
    "delete_budget": None,
    "set_quota": {"limit": 5},
    "clear_quota": None,
    "create_webhook": {"url": "https://example.org/hook"},
    "change_webhook": {"events": ["key.created"]},
    "delete_webhook": None,
    "rotate_webhook_secret": {},
    "try_webhook": {},
    "replay_delivery": {},
    "create_upstream": {
        "name": "other",
        "role": "overflow",
        "base_url": "https://api.example.org/v1",
        "model": "m",
        "api_key": "sk-theirs",
    },
    "change_upstream": {"slots": 4, "headers": {"X-Team": "a"}},
    "delete_upstream": None,
    "set_outside_consent": {"agreed": True},
}
READS = {
    "get_organization",
    "list_projects",
    "get_project",
    "list_members",
    "get_member",
    "list_invitations",
    "get_invitation",
    "list_identity_providers",
    "get_identity_provider",
    "list_domains",
    "get_sign_in_policy",
    "list_scim_tokens",
    "list_service_accounts",
    "get_service_account",
    "list_tokens",
    "list_keys",
    "get_key",
    "list_deployments",
    "get_deployment",
    "list_engine_profiles",
    "get_engine_profile",
    "list_rollouts",
    "get_rollout",
    "list_model_versions",
    "list_adapters",
    "get_adapter",
    "get_model_version",
    "list_slo_classes",
    "list_slo_rules",
    "list_end_customer_limits",
    "list_all_end_customer_limits",
    "get_end_customer_limits",
    "list_slo_alerts",
    "get_attainment",
    "list_budgets",
    "get_budget",
    "get_organization_limits",
    "get_project_limits",
    "get_key_limits",
    "list_replicas",
    "get_replica",
    "list_machines",
    "get_machine",
    "list_decisions",
    "get_decision",
    "replay_decision",
    "list_grants",
    "list_grants_held",
    "list_operations",
    "get_operation",
    "list_quotas",
    "list_webhooks",
    "get_webhook",
    "list_deliveries",
    "list_upstreams",
    "get_upstream",
    "get_upstream_use",
    "get_shadow_summary",
    "list_shadow_results",
    "get_outside_consent",
    "list_audit",
    "get_usage",
    "list_requests",
    "get_request",
    "list_request_decisions",
    "list_exports",
    "get_export",
    "get_export_part",
    "get_erasure",
}


def operations() -> list[tuple[str, str, str, Permission]]:
    """(name, method, path, permission) of everything the document has."""
    paths = rest.get_openapi_schema()["paths"]
    return [
        (o["operationId"], method.upper(), path.removeprefix("/api/v1"), Permission(o["x-corral-permission"]))
        for path, methods in paths.items()
        for method, o in methods.items()
    ]


class Acme:
    """One of everything, in Acme, and the paths to it."""

    def __init__(self, world: World) -> None:
        from controlplane.budgets import services as budgets
        from controlplane.deployments import services as deployments
        from controlplane.deployments import sharing
        from controlplane.endcustomers import services as endcustomers
        from controlplane.identity import domains, invitations, providers
        from controlplane.identity.models import ProviderKind
        from controlplane.operations import services as long_operations
        from controlplane.policy.periods import Period
        from controlplane.rollouts import services as rollouts
        from controlplane.rollouts.models import Rollout
        from controlplane.scim import tokens as scim_tokens
        from controlplane.slo import services as slo
        from controlplane.tenants import selectors
        from controlplane.tenants.context import tenant
        from controlplane.tenants.limits import Limits
        from controlplane.upstreams import services as upstreams
        from controlplane.webhooks import services as webhooks

        organization_id = world.organization.id
        key, _ = key_services.create_api_key(
            organization_id=organization_id, project_id=world.project.id, name="program"
        )
        account = accounts.create_service_account(
            organization_id=organization_id, name="robot zero", role=Role.VIEWER
        )
        token, _ = accounts.create_token(organization_id=organization_id, account_id=account.id, name="t")
        version = make_version(organization_id)
        deployment = deployments.create_deployment(
            organization_id=organization_id,
            project_id=world.project.id,
            name="served",
            model_version_id=version.id,
            engine_profile={"engine": "toy", "max_loras": 2},
        )
        adapter = adapters.register(
            organization_id=organization_id, deployment_id=deployment.id, name="formal"
        )
        with tenant(organization_id):
            member = next(
                m for m in selectors.members(organization_id=organization_id) if m.user_id == world.bob.id
            )
        invitation = invitations.invite(
            organization_id=organization_id, email="guest@example.org", role=Role.VIEWER
        )
        rule = slo.create_rule(
            organization_id=organization_id, project_id=world.project.id, slo_class="standard"
        )
        ends = endcustomers.set_limits(
            organization_id=organization_id,
            project_id=world.project.id,
            limits=Limits(rpm=7),
            end_customer="acme-customer",
        )
        budget = budgets.create_budget(
            organization_id=organization_id, name="team money", limit_nano=10**9, period=Period.MONTH
        )
        webhook, _ = webhooks.create_endpoint(
            organization_id=organization_id, url="https://acme.example/hook"
        )
        delivery = webhooks.try_endpoint(organization_id=organization_id, endpoint_id=webhook.id)
        provider = providers.create_provider(
            organization_id=organization_id,
            kind=ProviderKind.OIDC,
            name="Acme sign-in",
            issuer="https://login.acme.example",
            client_id="corral",
            client_secret="acme-client-secret",
        )
        scim_token, _ = scim_tokens.create_token(organization_id=organization_id, name="acme-directory")
        domain = domains.claim(organization_id=organization_id, name="acme.example")
        domains.mark_verified(organization_id=organization_id, domain_id=domain.id)
        upstream = upstreams.attach(
            organization_id=organization_id,
            deployment_id=deployment.id,
            name="acme-overflow",
            base_url="https://inference.acme.example/v1",
            model="acme-large",
            role="overflow",
            change=upstreams.Change(api_key="sk-acme-upstream", headers={"X-Acme": "acme-header"}),
        )
        booked = book_usage(world, key_id=key.id, model="served")
        annex = services.create_project(organization_id=organization_id, name="Annex", slug="annex")
        with acting_as("corral_operator"):
            grant = sharing.grant(
                organization_id=organization_id,
                deployment_id=deployment.id,
                grantee_id=organization_id,
                project_id=annex.id,
            )
        rollout = rollouts.begin(
            organization_id=organization_id,
            deployment_id=deployment.id,
            engine_profile={"max_num_seqs": 5},
            reason="formal try",
        )
        with acting_as("corral_operator"):
            Rollout.objects.filter(id=rollout.id).update(state="rolled_back", finished_at=timezone.now())
        begun = long_operations.begin(organization_id=organization_id, kind="drain_replica", subject="rep_x")
        replica, decision = make_replica(deployment)
        self.ids = {
            "replica_id": f"rep_{replica.id.hex}",
            "machine_id": f"mch_{replica.machine_id.hex}",
            "decision_id": f"dec_{decision.id.hex}",
            "grant_id": f"grt_{grant.id.hex}",
            "operation_id": f"opn_{begun.id.hex}",
            "request_id": f"req_{booked.request_id.hex}",
            "project_id": f"prj_{world.project.id.hex}",
            "member_id": f"mem_{member.id.hex}",
            "invitation_id": f"inv_{invitation.id.hex}",
            "provider_id": str(provider),
            "domain_id": str(domain),
            "scim_token_id": str(scim_token),
            "account_id": f"svc_{account.id.hex}",
            "token_id": f"tok_{token.id.hex}",
            "key_id": f"key_{key.id.hex}",
            "deployment_id": f"dep_{deployment.id.hex}",
            "version_id": f"mdl_{version.id.hex}",
            "adapter_id": str(adapter),
            "rollout_id": str(rollout),
            "number": "1",
            "rule_id": f"slo_{rule.id.hex}",
            "limits_id": str(ends),
            "budget_id": f"bud_{budget.id.hex}",
            "kind": "machines",
            "webhook_id": f"whk_{webhook.id.hex}",
            "delivery_id": f"dlv_{delivery.id.hex}",
            "upstream_id": str(upstream),
        }
        self.ids["export_id"] = str(self._export(organization_id))
        self.secrets = [
            "served",
            "formal",
            "team money",
            "guest@example.org",
            "login.acme.example",
            "acme-client-secret",
            "acme-overflow",
            "inference.acme.example",
            "sk-acme-upstream",
            "acme-header",
            "acme-directory",
            "program",
            "robot zero",
            *(text for name, text in self.ids.items() if name not in ("kind", "number")),
        ]
        self.ids["n"] = "0"
        erasure.request(organization_id=organization_id, confirm="acme")

    @staticmethod
    def _export(organization_id: Any) -> Export:
        """One that has been written."""
        export = exports.begin(organization_id=organization_id)
        with acting_as("corral_operator"):
            exports._keep(export, ['{"table": "tenants.ApiKey", "row": {"name": "program"}}'])
            Operation.objects.filter(kind=exports.KIND).update(
                state="succeeded", progress=100, finished_at=timezone.now()
            )
        return export

    def path(self, template: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda m: self.ids[m[1]], template)

    def body(self, name: str) -> Any:
        body = BODIES.get(name)
        if name in ("create_key", "create_slo_rule"):
            return {**body, "project_id": self.ids["project_id"]}
        if name in ("create_adapter", "create_upstream"):
            return {**body, "deployment_id": self.ids["deployment_id"]}
        if name == "create_deployment":
            return {
                **body,
                "project_id": self.ids["project_id"],
                "model_version_id": self.ids["version_id"],
                "engine_profile": {"engine": "toy"},
            }
        return body


def test_every_operation_has_a_row() -> None:
    names = {name for name, _, _, _ in operations()}
    assert names == BODIES.keys() | READS
    assert not BODIES.keys() & READS


def test_reads_need_reading_and_writes_writing() -> None:
    for name, method, _, permission in operations():
        verb = "read" if method == "GET" else "write"
        assert permission.endswith(f":{verb}"), name


@pytest.mark.parametrize("role", list(Role))
def test_a_role_may_what_its_permissions_say(world: World, role: Role) -> None:
    """An allowed call works, a forbidden one is a 403 that names what is missing, and changes nothing."""
    from django.db import transaction

    acme, caller = Acme(world), Api(token_of(world.organization.id, role))
    for name, method, path, permission in operations():
        with transaction.atomic():
            response = caller.call(method, acme.path(path), acme.body(name))
            transaction.set_rollback(True)
        if permission in PERMISSIONS[role]:
            assert response.status_code in (200, 201, 202, 204), (name, response.body)
        else:
            assert response.status_code == 403, (name, response.body)
            assert response.body["code"] == "not_permitted"
            assert permission.sentence in response.body["detail"]


def test_a_stranger_finds_nothing(world: World) -> None:
    acme, stranger = Acme(world), Api(token_of(world.other_organization.id, Role.OWNER))
    for name, method, path, _ in operations():
        response = stranger.call(method, acme.path(path), acme.body(name))
        if ("{" in path and "{kind}" not in path) or name in (
            "create_key",
            "create_deployment",
            "create_adapter",
            "create_upstream",
            "create_slo_rule",
        ):
            assert response.status_code == 404, (name, response.body)
        for secret in acme.secrets:
            assert secret not in response.content.decode().replace(acme.path(path), ""), (name, secret)


@pytest.mark.parametrize("kind", ["suspended", "anonymous", "revoked"])
def test_who_is_nobody_finds_nothing(world: World, kind: str) -> None:
    acme = Acme(world)
    caller = Api(None if kind == "anonymous" else token_of(world.organization.id, Role.OWNER))
    if kind == "suspended":
        services.suspend_organization(organization_id=world.organization.id, suspended=True)
    elif kind == "revoked":
        found = accounts.find_caller(caller.token)
        accounts.revoke_token(organization_id=world.organization.id, token_id=found.token_id)
    for name, method, path, _ in operations():
        response = caller.call(method, acme.path(path), acme.body(name))
        assert response.status_code == (403 if kind == "suspended" else 401), name
        assert response["Content-Type"] == "application/problem+json"
        for secret in acme.secrets:
            assert secret not in response.content.decode().replace(acme.path(path), ""), (name, secret)


def test_a_scoped_token_may_only_what_its_scopes_say(world: World) -> None:
    acme = Acme(world)
    caller = Api(token_of(world.organization.id, Role.OWNER, scopes=[Permission.KEYS_READ]))
    for name, method, path, permission in operations():
        response = caller.call(method, acme.path(path), acme.body(name))
        assert response.status_code == (200 if permission == Permission.KEYS_READ else 403), name


def test_nobody_gives_what_they_do_not_have(world: World) -> None:
    acme, admin = Acme(world), Api(token_of(world.organization.id, Role.ADMIN))
    refused = admin.post("/service-accounts", {"name": "king", "role": "owner"})
    assert (refused.status_code, refused.body["errors"][0]["field"]) == (403, "role")
    owner = accounts.create_service_account(
        organization_id=world.organization.id, name="king", role=Role.OWNER
    )
    path = f"/service-accounts/svc_{owner.id.hex}/tokens"
    assert admin.post(path, {"name": "t"}).status_code == 403
    assert admin.post(path, {"name": "t", "scopes": ["keys:read"]}).status_code == 201
    assert admin.call("PATCH", f"/members/{acme.ids['member_id']}", {"role": "owner"}).status_code == 403
    assert admin.call("PATCH", f"/members/{acme.ids['member_id']}", {"role": "admin"}).status_code == 200
    narrow = Api(token_of(world.organization.id, Role.ADMIN, scopes=[Permission.SERVICE_ACCOUNTS_WRITE]))
    assert narrow.post("/service-accounts", {"name": "wide", "role": "viewer"}).status_code == 403
