"""Compiled engine profiles of deployments: kept, found again, compared.

Called by deployments/services.py inside its transaction, by the REST API and by the autoscaler. Compiling is
deployments/profiles.py; nothing here decides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final
from uuid import UUID

from django.db.models import Max

from controlplane.deployments.models import Deployment
from controlplane.deployments.profiles import OWN_KNOBS, Chosen
from controlplane.errors import NotFoundError
from controlplane.rollouts.models import EngineProfile

MAX_KEPT: Final = 1_000  # of one deployment; numbers grow with every new set of settings


def digest_of(model_digest: str, settings: Mapping[str, object]) -> str:
    """Names what a replica runs; scale, price and class are no part of it."""
    what = {"model": model_digest, "profile": settings}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def record(deployment: Deployment, chosen: Chosen) -> EngineProfile:
    """The row of these settings of this deployment; its reasons are brought up to date. May run twice.

    Inside the transaction that changes the deployment, which serialises writers by its generation.
    """
    digest = digest_of(deployment.model_version.digest, chosen.profile)
    told = {
        "chosen": [{**asdict(value), "inputs": dict(value.inputs)} for value in chosen.compiled.values],
        "forecast": dict(chosen.compiled.forecast),
        "warnings": list(chosen.compiled.warnings),
        "slo_class": deployment.slo_class_id,
        "hardware": chosen.hardware,
    }
    rows = EngineProfile.objects.filter(
        organization_id=deployment.organization_id, deployment_id=deployment.id
    )
    known = rows.filter(digest=digest).first()
    if known is not None:
        rows.filter(id=known.id).update(**told)
        known.refresh_from_db()
        return known
    last: int = rows.aggregate(last=Max("number"))["last"] or 0
    return EngineProfile.objects.create(
        organization_id=deployment.organization_id,
        deployment_id=deployment.id,
        number=last + 1,
        digest=digest,
        model_version_id=deployment.model_version_id,
        settings=chosen.profile,
        **told,
    )


def current(deployment: Deployment) -> EngineProfile | None:
    """The row of what the deployment wants now; None for one that was last changed before profiles were kept."""
    digest = digest_of(deployment.model_version.digest, deployment.engine_profile)
    return EngineProfile.objects.filter(
        organization_id=deployment.organization_id, deployment_id=deployment.id, digest=digest
    ).first()


def profile(*, organization_id: UUID, deployment_id: UUID, number: int) -> EngineProfile:
    """Raises NotFoundError."""
    found = (
        EngineProfile.objects.select_related("model_version")
        .filter(organization_id=organization_id, deployment_id=deployment_id, number=number)
        .first()
    )
    if found is None:
        raise NotFoundError("no such engine profile", field="number")
    return found


def overrides(deployment: Deployment) -> tuple[dict[str, Any], dict[str, str]]:
    """(what its owner insists on: knob -> value, knob -> reason). All of it where nobody kept what was compiled."""
    row = current(deployment)
    if row is None:
        return dict(deployment.engine_profile), {}
    return overrides_of(row)


def overrides_of(row: EngineProfile) -> tuple[dict[str, Any], dict[str, str]]:
    own = [value for value in row.chosen if value["overridden"]]
    given = {value["name"]: value["value"] for value in own}
    given |= {name: row.settings[name] for name in OWN_KNOBS if name in row.settings}
    return given, {value["name"]: value["reason"] for value in own}
