"""Where a deployment stands, written by the autoscaler. Apart from services.py: it changes nothing wanted."""

from uuid import UUID

from django.db import transaction

from controlplane.deployments.models import Deployment, Phase
from controlplane.webhooks.services import emit

_MAX_ERROR = 500
_TOLD = {Phase.READY: "deployment.ready", Phase.FAILED: "deployment.failed"}


def record_phase(*, deployment_id: UUID, phase: Phase, last_error: str = "") -> bool:
    """Set phase and error of a live deployment; False if that is what it says already, or it is gone."""
    last_error = last_error[:_MAX_ERROR]
    with transaction.atomic():
        other = Deployment.objects.filter(id=deployment_id, deleted_at=None).exclude(
            phase=phase, last_error=last_error
        )
        found = other.select_for_update(no_key=True).first()
        if found is None:
            return False
        Deployment.objects.filter(id=deployment_id).update(phase=phase, last_error=last_error)
        if found.phase != phase and phase in _TOLD:
            data = {"deployment_id": str(found), "name": found.name}
            if phase == Phase.FAILED:
                data["reason"] = last_error
            emit(organization_id=found.organization_id, kind=_TOLD[phase], data=data)
    return True
