"""Writes about who may call a deployment besides the keys of its own project: giving leave, and taking it back.

Called by `manage.py share`. Giving leave is the house's (operator role): it names another tenant, which no tenant may
look up. The owner may take it back. Callers reach the deployment as `<owner's slug>/<its name>`, so nobody can put a
model into another's list under a name that sounds like its own.
"""

from uuid import UUID

import structlog
from django.db.models import Q
from django.utils import timezone

from billing.prices import price_in_force
from controlplane.deployments import selectors
from controlplane.deployments.models import Grant
from controlplane.errors import ConflictError, InvalidInputError, NotFoundError
from controlplane.saving import insert
from controlplane.tenants import invalidation
from controlplane.tenants import selectors as tenants
from controlplane.tenants.context import tenant
from controlplane.upstreams.services import check_grant

log = structlog.get_logger("corral.deployments")


def grant(
    *, organization_id: UUID, deployment_id: UUID, grantee_id: UUID, project_id: UUID | None = None
) -> Grant:
    """Let `project_id` of the grantee, or all its projects, call the deployment. May run twice.

    Needs the operator role. Raises NotFoundError, InvalidInputError (the deployment's own project; a name too long;
    no price of that name for the grantee) or ConflictError (a namesake from another project is shared with them).
    """
    with tenant(organization_id):
        deployment = selectors.deployment(organization_id=organization_id, deployment_id=deployment_id)
        owner = tenants.organization(organization_id=organization_id)
        tenants.organization(organization_id=grantee_id)
        if project_id is not None:
            tenants.project(organization_id=grantee_id, project_id=project_id)
        if project_id == deployment.project_id:
            raise InvalidInputError("project: the deployment is its own, it needs no leave", field="project")
        check_grant(deployment, grantee_id)
        price_in_force(organization_id=grantee_id, at=timezone.now(), name=deployment.price_version.name)
        held = Grant.objects.filter(deployment=deployment, grantee_id=grantee_id)
        only = Q(project_id=None) if project_id is None else Q(project_id=project_id)
        known = held.filter(only).first()
        if known is not None:
            return known
        made = Grant(
            organization_id=organization_id,
            deployment=deployment,
            grantee_id=grantee_id,
            project_id=project_id,
            name=f"{owner.slug}/{deployment.name}",
        )
        held_as = Grant.objects.filter(only, grantee_id=grantee_id, name=made.name)
        if held_as.filter(deployment__cell=deployment.cell).exists():
            raise ConflictError(f"another deployment is shared with them as {made.name!r}", field="name")
        insert(made, taken={"grant_unique": ("grantee", "it was shared with them just now")})
        _tell(made)
    log.info("grant.given", organization=organization_id.hex, deployment=deployment_id.hex, to=grantee_id.hex)
    return made


def withdraw(*, organization_id: UUID, grant_id: UUID) -> None:
    """Take leave back: running answers end in peace, the next request is refused. Raises NotFoundError."""
    with tenant(organization_id):
        found = Grant.objects.filter(organization_id=organization_id, id=grant_id).first()
        if found is None:
            raise NotFoundError("no such grant", field="grant")
        found.delete()
        _tell(found)
    log.info(
        "grant.withdrawn",
        organization=organization_id.hex,
        deployment=found.deployment_id.hex,
        to=found.grantee_id.hex,
    )


def withdraw_all(*, organization_id: UUID, deployment_id: UUID) -> None:
    """Of a deployment that is deleted."""
    for held in selectors.grants_given(organization_id=organization_id, deployment_id=deployment_id):
        withdraw(organization_id=organization_id, grant_id=held.id)


def _tell(changed: Grant) -> None:
    invalidation.publish_after_commit(invalidation.organization_ref(changed.grantee_id))
