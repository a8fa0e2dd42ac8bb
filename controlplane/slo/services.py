"""Writes about service-class rules. Gateways hear of each after commit."""

from collections.abc import Mapping
from typing import Any, Final
from uuid import UUID

import structlog

from controlplane.deployments import selectors as deployments
from controlplane.errors import InvalidInputError
from controlplane.saving import insert, update
from controlplane.slo import selectors
from controlplane.slo.models import SloRule
from controlplane.tenants import invalidation
from controlplane.tenants import selectors as tenants
from controlplane.tenants.context import tenant

log = structlog.get_logger("corral.slo")

CHANGEABLE: Final = frozenset({"is_default", "ttft_ms", "itl_ms", "deadline_s", "objective_ppm"})
_TAKEN = {
    "slorule_unique": ("slo_class", "there is a rule for this class, key and deployment: delete it first"),
    "slorule_one_default": ("is_default", "another class is the default here: delete that rule first"),
}


def create_rule(
    *,
    organization_id: UUID,
    project_id: UUID,
    slo_class: str,
    api_key_id: UUID | None = None,
    deployment_id: UUID | None = None,
    is_default: bool = False,
    ttft_ms: int | None = None,
    itl_ms: int | None = None,
    deadline_s: int | None = None,
    objective_ppm: int | None = None,
) -> SloRule:
    """Say what a class means for a project's requests. Raises NotFoundError, InvalidInputError, ConflictError."""
    with tenant(organization_id):
        tenants.project(organization_id=organization_id, project_id=project_id)
        classes = {each.name: each for each in deployments.slo_classes()}
        if slo_class not in classes:
            raise InvalidInputError(
                f"slo_class={slo_class!r}: choose one of {', '.join(classes)}", field="slo_class"
            )
        if deployment_id is not None:
            deployments.deployment(organization_id=organization_id, deployment_id=deployment_id)
        if api_key_id is not None:
            key = tenants.api_key(organization_id=organization_id, key_id=api_key_id)
            if key.project_id != project_id:
                raise InvalidInputError("api_key_id: a key of another project", field="api_key_id")
        rule = SloRule(
            organization_id=organization_id,
            project_id=project_id,
            api_key_id=api_key_id,
            deployment_id=deployment_id,
            slo_class=classes[slo_class],
            is_default=is_default,
            ttft_ms=ttft_ms,
            itl_ms=itl_ms,
            deadline_s=deadline_s,
            objective_ppm=objective_ppm,
        )
        insert(rule, taken=_TAKEN)
        invalidation.publish_after_commit(invalidation.project_ref(project_id))
    log.info("slo_rule.created", organization=organization_id.hex, rule=rule.id.hex, slo_class=slo_class)
    return rule


def change_rule(*, organization_id: UUID, rule_id: UUID, change: Mapping[str, Any]) -> SloRule:
    """Set what `change` names of CHANGEABLE; None of a target: as the class says. Raises NotFoundError,
    InvalidInputError, ConflictError (another class is the default)."""
    if unknown := sorted(change.keys() - CHANGEABLE):
        raise InvalidInputError(f"{unknown[0]}: cannot be changed", field=unknown[0])
    with tenant(organization_id):
        selectors.rule(organization_id=organization_id, rule_id=rule_id)
        rule = SloRule.objects.select_for_update(of=("self",)).get(id=rule_id)
        for name, value in change.items():
            setattr(rule, name, value)
        update(rule, taken=_TAKEN)
        invalidation.publish_after_commit(invalidation.project_ref(rule.project_id))
    log.info("slo_rule.changed", organization=organization_id.hex, rule=rule_id.hex)
    return rule


def delete_rule(*, organization_id: UUID, rule_id: UUID) -> None:
    """The class means again what it says itself. Raises NotFoundError."""
    with tenant(organization_id):
        rule = selectors.rule(organization_id=organization_id, rule_id=rule_id)
        project_id = rule.project_id
        rule.delete()
        invalidation.publish_after_commit(invalidation.project_ref(project_id))
    log.info("slo_rule.deleted", organization=organization_id.hex, rule=rule_id.hex)
