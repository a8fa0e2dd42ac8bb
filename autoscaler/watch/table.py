"""What the watcher has to watch: live replicas, machines and deployments, as read from Postgres by the recorder.

The watcher goes on with the last table when Postgres is away.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from uuid import UUID

from django.db.models import F

from autoscaler.models import LIVE_PHASES, Machine, MachineState, Replica, ReplicaPhase
from autoscaler.watch import paces
from controlplane.deployments.models import Deployment
from controlplane.policy.canary import threshold
from controlplane.policy.upstream import price_factor
from controlplane.rollouts.models import HELD_BACK_STATES, Rollout
from controlplane.upstreams.models import Upstream, UpstreamReplica
from infra.providers.external import ExternalProvider
from workers.contract import UpstreamRole


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Of a replica that stands for an endpoint: what it is to its deployment. `price`: what a token there costs to
    routing, as a factor."""

    role: UpstreamRole
    after_ms: int = 0
    price: float = 1.0
    # Of a shadow: the endpoint's id, under which gateways find it, as if it were a deployment. Empty: it is detached.
    upstream: str = ""


@dataclass(frozen=True, slots=True)
class KnownReplica:
    """A live replica's row, ids as on the wire. `slots`: what its engine batches. `itl_ms`: the gap between tokens
    that its deployment's service class promises, 0 for none.
    """

    id: str
    machine: str
    deployment: str
    slots: int
    phase: ReplicaPhase
    itl_ms: int = 0
    elsewhere: Elsewhere | None = None
    # Of a canary: its share of the requests (policy/canary.py: threshold). None: as much as any replica.
    share: int | None = None
    # How fast it should be, as gateways are told (watch/paces.py). '': nobody can tell.
    pace: str = ""

    @property
    def serves(self) -> str:
        """The deployment whose requests it takes; a shadow stands under its endpoint's id and takes copies only."""
        if self.elsewhere is not None and self.elsewhere.role is UpstreamRole.SHADOW:
            return self.elsewhere.upstream
        return self.deployment


@dataclass(frozen=True, slots=True)
class Table:
    """One reading. `version` grows with every reading."""

    version: int = 0
    replicas: dict[str, KnownReplica] = field(default_factory=dict)
    machines: dict[str, MachineState] = field(default_factory=dict)
    # Of the machines' Redis passwords: enough to make their users again in a Redis that lost them.
    digests: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    deployments: tuple[str, ...] = ()


def canary_shares(cell: str) -> dict[tuple[UUID, str], int]:
    """(deployment, what a canary of it runs) -> its share."""
    rows = Rollout.objects.filter(state__in=HELD_BACK_STATES, deployment__cell=cell).values_list(
        "deployment_id", "candidate__digest", "share_ppm"
    )
    return {(deployment, digest): threshold(share_ppm) for deployment, digest, share_ppm in rows}


def read(cell: str, version: int) -> Table:
    """Four queries, one more where endpoints are attached, and some for what was never seen before. Raises
    django.db errors when Postgres is away."""
    replicas = (
        Replica.objects.filter(phase__in=LIVE_PHASES, machine__cell=cell)
        .annotate(itl_ms=F("deployment__slo_class__itl_ms"))
        .only("id", "machine_id", "deployment_id", "slots", "phase", "spec_digest")
    )
    shares = canary_shares(cell)
    away = (MachineState.GONE, MachineState.STOPPING, MachineState.STOPPED)
    pool = Machine.objects.filter(cell=cell).exclude(state__in=away)
    fields = ("id", "state", "redis_password_digest", "redis_password_next", "provider", "offering")
    machines = list(pool.only(*fields))
    bought = {row.id: (row.offering, cell, row.provider) for row in machines}
    rows = list(replicas)
    external = {row.id.hex for row in machines if row.provider == ExternalProvider.name}
    elsewhere = _elsewhere([row.id for row in rows if row.machine_id.hex in external])
    deployments = (
        Deployment.objects.filter(cell=cell, deleted_at=None).order_by("id").values_list("id", flat=True)
    )
    return Table(
        version=version,
        replicas={
            row.id.hex: KnownReplica(
                id=row.id.hex,
                machine=row.machine_id.hex,
                deployment=row.deployment_id.hex,
                slots=row.slots,
                phase=ReplicaPhase(row.phase),
                itl_ms=row.itl_ms or 0,
                elsewhere=elsewhere.get(row.id),
                share=shares.get((row.deployment_id, row.spec_digest)),
                pace=paces.told(row.spec_digest, *bought[row.machine_id]) if row.machine_id in bought else "",
            )
            for row in rows
        },
        machines={row.id.hex: MachineState(row.state) for row in machines},
        digests={row.id.hex: row.password_digests for row in machines if row.redis_password_digest},
        deployments=tuple(did.hex for did in deployments),
    )


def _elsewhere(replica_ids: list[UUID]) -> dict[UUID, Elsewhere]:
    """Of replicas on a machine for endpoints. One whose endpoint was detached a moment ago takes nothing: a shadow."""
    found = dict.fromkeys(replica_ids, Elsewhere(UpstreamRole.SHADOW))
    if not replica_ids:
        return found
    of = dict(
        UpstreamReplica.objects.filter(replica_id__in=replica_ids).values_list("replica_id", "upstream_id")
    )
    attached = Upstream.objects.filter(id__in=of.values()).select_related("deployment__price_version")
    upstreams = {row.id: row for row in attached}
    for replica_id, upstream_id in of.items():
        row = upstreams.get(upstream_id)
        if row is not None:
            sale_nano = row.deployment.price_version.output_nano_per_million
            found[replica_id] = Elsewhere(
                UpstreamRole(row.role),
                row.overflow_after_ms,
                price_factor(row.output_nano_per_million, sale_nano),
                row.id.hex,
            )
    return found
