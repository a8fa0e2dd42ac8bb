"""Keeps a replica for every endpoint elsewhere that is attached to a deployment of this cell, on a machine of its own.

Called by tasks.py every few seconds and after changes. No policy: an endpoint that is wanted has one replica with its
configuration, all others drain. What scales, buys and observes does not see these replicas (provider `external`);
routing, fencing, slots and metering treat them as any other. Everything may be repeated, and run twice at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID, uuid5

import msgspec
import redis
import structlog
from django.conf import settings
from django.db import IntegrityError, transaction
from django.utils import timezone

from autoscaler import launch
from autoscaler.act import drain
from autoscaler.models import LIVE_PHASES, Machine, MachineState, Replica, ReplicaPhase
from autoscaler.specs import desired_spec
from autoscaler.tick import House
from controlplane import ids
from controlplane.deployments.models import Deployment, ModelSource
from controlplane.upstreams.models import Upstream, UpstreamReplica
from infra.providers.external import DIRECTORY, ExternalProvider
from workers.contract import ReplicaSpec, UpstreamRole, UpstreamSpec

log = structlog.get_logger("corral.autoscaler")

PROVIDER: Final = ExternalProvider.name
MAX_REPLICAS: Final = 256  # of the machine
# A replica that failed is started again after so long, twice as long each time.
RETRY_S: Final = 5.0
RETRY_MOST_S: Final = 300.0
FAILURES_FOR: Final = timedelta(minutes=30)
_ENROLLED: Final = (MachineState.ENROLLED, MachineState.READY)
_NAMESPACE: Final = UUID("6f1d7f0e-6f0b-4d55-9d5e-5a6a3f7f2c11")


def keep(house: House, now: datetime | None = None) -> None:
    """One pass. `house` is the external one. Raises django.db errors when Postgres is away."""
    now = now or timezone.now()
    cell = house.cell.keys.cell
    wanted = {upstream.id: upstream for upstream in _wanted(cell)}
    live = list(
        Replica.objects.filter(machine__provider=PROVIDER, machine__cell=cell, phase__in=LIVE_PHASES)
        .select_related("machine")
        .order_by("id")
    )
    current = _drop(live, wanted, house)
    missing = [upstream for key, upstream in wanted.items() if key not in current]
    if not missing:
        return
    machine = _machine(house)
    if machine is None:
        return
    for upstream in missing:
        if not _is_resting(upstream, now):
            _order(upstream, machine, house)


def spec_of(upstream: Upstream) -> UpstreamSpec:
    """How its replica calls it, without the secret."""
    deployment = upstream.deployment
    return UpstreamSpec(
        upstream=upstream.id.hex,
        base_url=upstream.base_url,
        model=upstream.model,
        role=UpstreamRole(upstream.role),
        allow=",".join(map(str, settings.ENV.outbound_allow)),
        max_model_len=int(deployment.engine_profile.get("max_model_len", 2048)),
        connect_s=upstream.connect_ms / 1000,
        first_token_s=upstream.first_token_ms / 1000,
        between_tokens_s=upstream.between_tokens_ms / 1000,
        n_retries=upstream.n_retries,
        breaker_failures=upstream.breaker_failures,
        breaker_pause_s=upstream.breaker_pause_ms / 1000,
        extensions=upstream.extensions,
        stream_usage=upstream.stream_usage,
        max_tokens_field=upstream.max_tokens_field,
        tokenizers=_tokenizers(deployment),
    )


def _wanted(cell: str) -> Iterable[Upstream]:
    found = Upstream.objects.filter(
        disabled_at=None,
        target=None,
        deployment__cell=cell,
        deployment__deleted_at=None,
        organization__suspended_at=None,
    )
    return found.select_related("deployment__model_version").order_by("id")[:MAX_REPLICAS]


def digest_of(upstream: Upstream) -> str:
    """SHA-256 of all that its replica is told."""
    told = [msgspec.to_builtins(spec_of(upstream)), upstream.slots, upstream.secrets_version]
    told += [upstream.overflow_after_ms]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _drop(live: list[Replica], wanted: dict[UUID, Upstream], house: House) -> set[UUID]:
    """Drain what nobody wants any more, or not like this; the endpoints that have their replica.

    One on a machine that leaves serves until another one does.
    """
    current: set[UUID] = set()
    leaving: list[tuple[UUID, Replica]] = []
    ready: set[UUID] = set()
    for row in live:
        upstream_id = UUID(hex=row.spec["upstream"]["upstream"])
        upstream = wanted.get(upstream_id)
        as_wanted = upstream is not None and row.spec_digest == digest_of(upstream)
        if row.machine.state == MachineState.DRAINING and as_wanted:
            leaving.append((upstream_id, row))
            continue
        if as_wanted and row.phase == ReplicaPhase.READY:
            ready.add(upstream_id)
        if as_wanted and upstream_id not in current and row.phase != ReplicaPhase.DRAINING:
            current.add(upstream_id)
        elif row.phase != ReplicaPhase.DRAINING:
            why = (
                "its upstream was changed" if upstream is not None else "its upstream is not wanted any more"
            )
            drain(row.id, why, house.cell)
    for upstream_id, row in leaving:
        if upstream_id in ready and row.phase != ReplicaPhase.DRAINING:
            drain(row.id, "its machine leaves, and another one serves", house.cell)
    return current


def _machine(house: House) -> Machine | None:
    """The one that takes them; ordered where there is none, None until it has enrolled."""
    cell = house.cell.keys.cell
    rows = Machine.objects.filter(provider=PROVIDER, cell=cell).exclude(
        state__in=(MachineState.GONE, MachineState.DRAINING)
    )
    machine = rows.order_by("id").first()
    if machine is None:
        launch.launch(ids.new_id(), house.provider, house.config, house.cell)
        return None
    return machine if machine.state in _ENROLLED and machine.capabilities.get("box_public") else None


def _is_resting(upstream: Upstream, now: datetime) -> bool:
    """Its replica failed lately; told by the rows, so that a restart forgets nothing."""
    failed = Replica.objects.filter(
        machine__provider=PROVIDER,
        deployment_id=upstream.deployment_id,
        phase=ReplicaPhase.FAILED,
        spec_digest=digest_of(upstream),
        stopped_at__gte=now - FAILURES_FOR,
    ).order_by("-stopped_at")
    ends = [at for at in failed.values_list("stopped_at", flat=True)[:10] if at is not None]
    if not ends:
        return False
    pause_s = min(RETRY_S * 2 ** (len(ends) - 1), RETRY_MOST_S)
    return now - ends[0] < timedelta(seconds=pause_s)


def _order(upstream: Upstream, machine: Machine, house: House) -> None:
    """A replica for it. Two passes at once order it once: they make the same command."""
    n_before = Replica.objects.filter(
        machine__provider=PROVIDER, spec_digest=(digest := digest_of(upstream))
    ).count()
    replica_id = ids.new_id()
    spec = ReplicaSpec(
        replica=replica_id.hex,
        deployment=upstream.deployment_id.hex,
        model_digest="",
        model_source="",
        profile={},
        slots=upstream.slots,
        upstream=spec_of(upstream),
    )
    try:
        with transaction.atomic():
            replica = Replica.objects.create(
                id=replica_id,
                organization_id=upstream.organization_id,
                deployment_id=upstream.deployment_id,
                machine=machine,
                generation=upstream.deployment.generation,
                slots=upstream.slots,
                command_id=uuid5(_NAMESPACE, f"{upstream.id.hex} {digest} {n_before}"),
                spec=msgspec.to_builtins(spec),
                spec_digest=digest,
            )
            UpstreamReplica.objects.create(
                replica_id=replica_id,
                organization_id=upstream.organization_id,
                upstream_id=upstream.id,
                deployment_id=upstream.deployment_id,
                input_nano_per_million=upstream.input_nano_per_million,
                cached_nano_per_million=upstream.cached_nano_per_million,
                output_nano_per_million=upstream.output_nano_per_million,
            )
    except IntegrityError:
        return
    try:
        house.cell.set_desired(machine.id.hex, desired_spec(replica))
    except redis.RedisError as error:  # restored from the rows
        log.warning("replica.order_delayed", replica=replica_id.hex, error=type(error).__name__)
    log.info("upstream.replica_ordered", replica=replica_id.hex, upstream=upstream.id.hex, role=upstream.role)


def _tokenizers(deployment: Deployment) -> list[str]:
    """Where the tokenizer of the deployment's model may lie on this computer."""
    version = deployment.model_version
    if version.source_kind == ModelSource.TOY:
        return ["toy"]
    found = [f"{settings.AUTOSCALER.model_cache}/{version.digest}/tokenizer.json"]
    if version.source_kind == ModelSource.DIRECTORY:
        found.insert(0, f"{version.source_uri.removeprefix('file://')}/tokenizer.json")
    return found


def external_house(house: House) -> House:
    """The same cell with the machine of the endpoints."""
    config = replace(
        house.config,
        provider=PROVIDER,
        engine="upstream",
        max_machines=1,
        replicas_per_machine=MAX_REPLICAS,
        spot=False,
    )
    provider = ExternalProvider(settings.ENV.var / DIRECTORY, capacity=1)
    return House(config=config, provider=provider, cell=house.cell)
