"""Reads about service-class rules, scoped by organization."""

from uuid import UUID

from django.db.models import QuerySet

from controlplane.errors import NotFoundError
from controlplane.slo.models import SloRule


def rules(*, organization_id: UUID, project_id: UUID | None = None) -> QuerySet[SloRule]:
    found = SloRule.objects.filter(organization_id=organization_id)
    return found if project_id is None else found.filter(project_id=project_id)


def rule(*, organization_id: UUID, rule_id: UUID) -> SloRule:
    """Raises NotFoundError, also for another tenant's."""
    found = SloRule.objects.filter(organization_id=organization_id, id=rule_id).first()
    if found is None:
        raise NotFoundError("no such rule", field="slo_rule")
    return found
