"""Where a deployment stands, written by the autoscaler. Apart from services.py: it changes nothing wanted."""

from uuid import UUID

from controlplane.deployments.models import Deployment, Phase

_MAX_ERROR = 500


def record_phase(*, deployment_id: UUID, phase: Phase, last_error: str = "") -> bool:
    """Set phase and error of a live deployment; False if that is what it says already, or it is gone."""
    last_error = last_error[:_MAX_ERROR]
    return bool(
        Deployment.objects.filter(id=deployment_id, deleted_at=None)
        .exclude(phase=phase, last_error=last_error)
        .update(phase=phase, last_error=last_error)
    )
