"""Reads about deployments and model versions, scoped by organization."""

from uuid import UUID

from controlplane.deployments.models import Deployment, Grant, ModelVersion, SloClass
from controlplane.errors import NotFoundError


def deployments(*, organization_id: UUID, project_id: UUID | None = None) -> list[Deployment]:
    """Live deployments by name, with model version, price and class loaded."""
    found = Deployment.objects.filter(organization_id=organization_id, deleted_at=None)
    if project_id is not None:
        found = found.filter(project_id=project_id)
    return list(
        found.select_related("project", "model_version", "price_version", "slo_class").order_by("name", "id")
    )


def deployment(*, organization_id: UUID, deployment_id: UUID) -> Deployment:
    """One live deployment. Raises NotFoundError, also for another tenant's."""
    found = (
        Deployment.objects.filter(organization_id=organization_id, id=deployment_id, deleted_at=None)
        .select_related("project", "model_version", "price_version", "slo_class")
        .first()
    )
    if found is None:
        raise NotFoundError("no such deployment", field="deployment")
    return found


def model_versions(*, organization_id: UUID) -> list[ModelVersion]:
    """All model versions, newest first."""
    return list(ModelVersion.objects.filter(organization_id=organization_id).order_by("-created_at", "-id"))


def model_version(*, organization_id: UUID, model_version_id: UUID) -> ModelVersion:
    """One model version. Raises NotFoundError, also for another tenant's."""
    found = ModelVersion.objects.filter(organization_id=organization_id, id=model_version_id).first()
    if found is None:
        raise NotFoundError("no such model version", field="model_version")
    return found


def slo_classes() -> list[SloClass]:
    """The service classes, first served first."""
    return list(SloClass.objects.order_by("band"))


def grants_given(*, organization_id: UUID, deployment_id: UUID | None = None) -> list[Grant]:
    """Who may call this organization's deployments (or one of them) besides their own projects, by name."""
    found = Grant.objects.filter(organization_id=organization_id)
    if deployment_id is not None:
        found = found.filter(deployment_id=deployment_id)
    return list(found.order_by("name", "created_at", "id"))


def grants_held(*, organization_id: UUID) -> list[Grant]:
    """What others share with this organization or a project of it, by name."""
    return list(Grant.objects.filter(grantee_id=organization_id).order_by("name", "created_at", "id"))
