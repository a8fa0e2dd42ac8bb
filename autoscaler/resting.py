"""The rungs that a replica of a deployment may rest on, at the prices and with the times of now. Called by specs.py."""

from __future__ import annotations

from django.db.models import F, Max
from django.db.models.functions import Coalesce, NullIf

from autoscaler import timings
from autoscaler.config import AutoscalerConfig
from autoscaler.models import Machine, MachineState
from autoscaler.policy.ladder import Rung, Stakes
from autoscaler.policy.resting import ASLEEP, GONE
from controlplane.deployments.models import Deployment

NANO = 1e9
UNKNOWN_WAKE_RATIO = 0.5  # of a start, until one has woken: it has its process and its weights already


def rungs(deployment: Deployment, config: AutoscalerConfig) -> tuple[tuple[Rung, ...], Stakes | None]:
    """None where its engine does not sleep, or the house does not want it. The place that a sleeper gave up costs as
    much as the dearest one of a machine that could hold it.
    """
    level = deployment.engine_profile.get("sleep_level", 0)
    if not level or not config.warm_ladder or not config.sleepers_per_machine:
        return (), None
    pool = Machine.objects.filter(cell=deployment.cell, provider=config.provider, state=MachineState.READY)
    n_places = Coalesce(NullIf("n_places", 0), config.replicas_per_machine)
    dearest_nano = pool.aggregate(dearest=Max(F("price_nano_per_h") / n_places))["dearest"]
    place_usd = (dearest_nano or config.machine_nano_per_h / config.replicas_per_machine) / NANO
    known = timings.read(config.provider, deployment.model_version.digest)
    if known.starting_replica is None or known.loading_model is None:
        start_s = timings.usual_start_s(config.provider)
    else:
        start_s = (known.starting_replica + known.loading_model) / 1000
    wake_s = start_s * UNKNOWN_WAKE_RATIO if known.waking_replica is None else known.waking_replica / 1000
    stakes = Stakes(config.late_after_s, config.late_usd, config.late_usd_per_s, place_usd)
    return (Rung(ASLEEP, place_usd * config.sleep_share, wake_s), Rung(GONE, 0.0, start_s)), stakes
