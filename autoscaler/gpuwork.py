"""What a replica of a deployment does on each GPU of a market, by the performance model and its own requests' sizes.

Called by launch.py where a machine is bought for a deployment and several kinds of GPU serve it: an offer's price is
then that of the work it does. The sums are those of the GPU mix (policy/gpumix.py); which size goes where is not
decided here, so a GPU must serve all of them in time. Reads only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Final

from autoscaler.policy.gpumix import Kind, Promise, buckets, loads
from autoscaler.policy.sizes import Need
from controlplane.deployments.models import Deployment
from controlplane.deployments.usage import request_sizes
from controlplane.policy.engineprofile.modelconfig import model_config
from controlplane.policy.gpus import GPUS
from controlplane.policy.perfmodel import kv_tokens
from controlplane.prediction.perf.coefficients import coefficients

# Of a deployment that nobody has used yet: the typical request that its engine profile is made for.
TYPICAL: Final = (1024, 256)


def replicas_for_the_same(
    deployment: Deployment, gpus: Iterable[str], need: Need, now: datetime
) -> Mapping[str, float]:
    """Replicas on each GPU that do what one does on the GPU they need; infinite where a size of request cannot be
    served in time, nothing where nobody can tell: no config.json, or one kind of GPU only.
    """
    names = sorted({name for name in gpus if name in GPUS} | {need.gpu})
    version = deployment.model_version
    if len(names) < 2 or not version.config or need.gpu not in GPUS:
        return {}
    model = model_config(
        version.name,
        version.config,
        n_params=float(version.n_params or 0),
        max_model_len=version.max_model_len,
    )
    shape, known = model.shape(), coefficients()
    kinds = [
        Kind(name, 1.0, known.step_model(shape, GPUS[name], need.n_gpus), room)
        for name in names
        if (room := kv_tokens(shape, GPUS[name], need.n_gpus))
    ]
    sizes = request_sizes(
        organization_id=deployment.organization_id, deployment_id=deployment.id, now=now
    ) or [TYPICAL]
    slo = deployment.slo_class
    table = loads(kinds, buckets(sizes, 1.0), Promise(slo.itl_ms / 1000, slo.ttft_ms / 1000))
    work = {kind.name: math.fsum(row[at] for row in table) for at, kind in enumerate(kinds)}
    own = work.get(need.gpu, math.inf)
    if not math.isfinite(own):  # it serves what it can where its owner put it
        return {}
    return {name: work.get(name, math.inf) / own for name in names}
