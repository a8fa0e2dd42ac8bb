"""What the autoscaler owns: machines, the replicas on them, and every decision with what it was made from.

Fields and constraints only. Rows are written by act.py, reconcile.py and the watcher, each by compare-and-set
on `state`, `phase` or `version`; a decision is never changed.
"""

from typing import ClassVar

from django.db import models
from django.db.models import Q
from django.utils import timezone

from autoscaler.poolmodels import PoolDecision, PoolDecisionKind
from controlplane import ids
from controlplane.deployments.models import Deployment
from controlplane.tenants.models import Organization

__all__ = [
    "AWAKE_PHASES",
    "LIVE_PHASES",
    "Decision",
    "Machine",
    "MachineState",
    "Offer",
    "PoolDecision",
    "PoolDecisionKind",
    "PoolState",
    "Replica",
    "ReplicaPhase",
    "ScalerState",
    "StartTiming",
]


class MachineState(models.TextChoices):
    """Life of a machine, in order. `gone` is final."""

    PENDING = "pending"  # the provider was asked (or is about to be: the row comes first)
    ENROLLED = "enrolled"  # its agent proved itself and has its Redis user
    READY = "ready"  # its agent reports and takes replicas
    DRAINING = "draining"  # takes nothing new
    # The stop/start rung: the row says what is wanted before the provider is asked, so a crash between loses nothing.
    STOPPING = "stopping"
    STOPPED = "stopped"  # its disk is kept, with weights and credentials; it holds no place in the pool
    RESUMING = "resuming"  # told to start again
    GONE = "gone"


class Machine(models.Model):
    """A computer we pay for. The house's, not a tenant's."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    provider = models.CharField(max_length=32)
    provider_ref = models.CharField(max_length=200, blank=True, help_text="the provider's own name for it")
    state = models.CharField(max_length=16, choices=MachineState.choices, default=MachineState.PENDING)
    command_id = models.UUIDField(unique=True, help_text="the Launch command; client token at the provider")
    enroll_proof_digest = models.BinaryField(
        max_length=32, help_text="SHA-256 of the single-use enrolment proof"
    )
    enroll_used_at = models.DateTimeField(null=True, blank=True)
    redis_user = models.CharField(max_length=64, blank=True)
    capabilities = models.JSONField(default=dict, help_text="what its agent reported: cores, memory, GPUs")
    cell = models.CharField(max_length=16)
    created_at = models.DateTimeField(auto_now_add=True)
    launched_at = models.DateTimeField(null=True, blank=True)
    ready_at = models.DateTimeField(null=True, blank=True)
    gone_at = models.DateTimeField(null=True, blank=True)
    reason = models.CharField(max_length=500, blank=True, help_text="why it is draining or gone")
    redis_password_digest = models.CharField(
        max_length=64, blank=True, help_text="SHA-256 (hex) of its Redis password: the user can be made again"
    )
    redis_password_next = models.CharField(
        max_length=64,
        blank=True,
        default="",
        db_default="",
        help_text="digest of the one that is to replace it: both are valid",
    )
    redis_password_at = models.DateTimeField(
        null=True, blank=True, help_text="when its password was last replaced; null: it has its first"
    )
    redis_password_offered_at = models.DateTimeField(null=True, blank=True)
    redis_password_offers = models.PositiveIntegerField(
        default=0, db_default=0, help_text="new ones offered since then"
    )
    pool_slot = models.PositiveIntegerField(
        null=True, help_text="its place among the machines the pool may have; unique while it exists"
    )
    reserve_place = models.PositiveIntegerField(
        null=True,
        blank=True,
        help_text="its place among those that lie stopped to stand in for spot; unique while it exists",
    )
    ends_at = models.DateTimeField(
        null=True,
        blank=True,
        help_text="its provider takes it away then; it holds no place in the pool any more",
    )
    n_restarts = models.PositiveIntegerField(default=0, help_text="times its agent was started again")
    offering = models.CharField(
        max_length=120, blank=True, help_text="what it was bought as, e.g. spot/us-east-1a/g6.xlarge"
    )
    price_nano_per_h = models.BigIntegerField(
        default=0, help_text="nano-dollars per hour when it was bought; 0 for a machine of one's own"
    )
    launched_for = models.UUIDField(
        null=True, blank=True, help_text="the organization whose deployment it was bought for"
    )
    n_gpus = models.PositiveIntegerField(default=0, help_text="of what was bought, or may be")
    n_places = models.PositiveIntegerField(
        default=0,
        db_default=0,
        help_text="replicas that its GPUs hold: the least of what it may be until its provider has said; "
        "0: as many as the house says",
    )
    given_up_at = models.DateTimeField(
        null=True, blank=True, help_text="we move everything off it, of our own accord, to save money"
    )
    replaces = models.UUIDField(
        null=True, blank=True, help_text="the machine that it was bought to stand in for"
    )
    rest_at = models.DateTimeField(
        null=True, blank=True, help_text="when it was last told to stop or to start again"
    )
    launch_plan = models.JSONField(
        default=list,
        help_text="names of the offerings it may be, best first; fixed before the provider is asked",
    )

    @property
    def password_digests(self) -> tuple[str, ...]:
        """What its Redis user is let in by: one, or two while one is being replaced."""
        return tuple(filter(None, (self.redis_password_digest, self.redis_password_next)))

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.CheckConstraint(condition=Q(state__in=MachineState.values), name="machine_state_known"),
            models.CheckConstraint(
                condition=Q(state=MachineState.GONE, gone_at__isnull=False)
                | (~Q(state=MachineState.GONE) & Q(gone_at__isnull=True)),
                name="machine_gone_has_time",
            ),
            models.UniqueConstraint(
                fields=["provider", "provider_ref"],
                condition=~Q(provider_ref="") & ~Q(state=MachineState.GONE),
                name="machine_provider_ref_unique",
            ),
            # Two ticks at once cannot buy more than the pool may have: they would take the same place.
            models.UniqueConstraint(
                fields=["cell", "provider", "pool_slot"],
                condition=~Q(state=MachineState.GONE),
                name="machine_pool_slot_unique",
            ),
            # Nor one for the reserve.
            models.UniqueConstraint(
                fields=["cell", "provider", "reserve_place"],
                condition=~Q(state=MachineState.GONE),
                name="machine_reserve_place_unique",
            ),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["cell", "state"], condition=~Q(state="gone"), name="machine_live"),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.MACHINE, self.id)


class Offer(models.Model):
    """One kind of machine that a provider sells a cell: its price, and whether it has any at present.

    Written by market.py. What a spot offer taught about its losses lies in PoolState, with the policy's memory.
    """

    cell = models.CharField(max_length=16)
    provider = models.CharField(max_length=32)
    name = models.CharField(max_length=120)
    instance_type = models.CharField(max_length=40)
    zone = models.CharField(max_length=40)
    is_spot = models.BooleanField()
    gpu = models.CharField(max_length=40, blank=True)
    n_gpus = models.PositiveIntegerField(default=0)
    price_nano_per_h = models.BigIntegerField()
    priced_at = models.DateTimeField(
        help_text="when the provider last listed it; it is not bought long after"
    )
    n_refusals = models.PositiveIntegerField(default=0, help_text="in a row")
    refused_at = models.DateTimeField(null=True, blank=True)
    refused_until = models.DateTimeField(null=True, blank=True)
    refusal_code = models.CharField(max_length=80, blank=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["cell", "provider", "name"], name="offer_unique"),
            models.CheckConstraint(condition=Q(price_nano_per_h__gte=0), name="offer_price_not_negative"),
        ]

    def __str__(self) -> str:
        return f"{self.provider} {self.name}"


class PoolState(models.Model):
    """What the buying policy remembers of one pool. Writes are compare-and-set on `version`."""

    cell = models.CharField(max_length=16)
    provider = models.CharField(max_length=32)
    memory = models.JSONField(default=dict, help_text="what offers taught: SpotMemory")
    pool_memory = models.JSONField(
        default=dict,
        db_default=models.Value({}, models.JSONField()),
        help_text="of the pool's own turns: PoolMemory",
    )
    version = models.PositiveBigIntegerField(default=0)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["cell", "provider"], name="poolstate_unique"),
        ]

    def __str__(self) -> str:
        return f"{self.cell} {self.provider}"


class ReplicaPhase(models.TextChoices):
    """Life of a replica, in order; `stopped` and `failed` are final."""

    STARTING = "starting"  # wanted; its process may not exist yet
    LOADING = "loading"  # process up, weights loading
    READY = "ready"  # takes requests
    SLEEPING = "sleeping"  # told to sleep: its process and weights stay, it takes no place
    WAKING = "waking"  # told to serve again
    DRAINING = "draining"  # finishes what it has
    STOPPED = "stopped"
    FAILED = "failed"  # reason_code says why


# Those that take a place on their machine.
AWAKE_PHASES = (
    ReplicaPhase.STARTING,
    ReplicaPhase.LOADING,
    ReplicaPhase.READY,
    ReplicaPhase.WAKING,
    ReplicaPhase.DRAINING,
)
LIVE_PHASES = (*AWAKE_PHASES, ReplicaPhase.SLEEPING)


class Replica(models.Model):
    """One engine process serving one deployment on one machine. A restarted replica is a new row."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="replicas")
    deployment = models.ForeignKey(
        Deployment, on_delete=models.PROTECT, related_name="replicas", db_constraint=False
    )
    machine = models.ForeignKey(Machine, on_delete=models.PROTECT, related_name="replicas")
    phase = models.CharField(max_length=16, choices=ReplicaPhase.choices, default=ReplicaPhase.STARTING)
    reason_code = models.CharField(max_length=64, blank=True)
    reason_message = models.CharField(max_length=500, blank=True)
    generation = models.PositiveBigIntegerField(help_text="the deployment's generation it was started for")
    slots = models.PositiveIntegerField(help_text="requests it runs at once")
    created_at = models.DateTimeField(auto_now_add=True)
    ready_at = models.DateTimeField(null=True, blank=True)
    stopped_at = models.DateTimeField(null=True, blank=True)
    command_id = models.UUIDField(unique=True, null=True, help_text="the StartReplica command")
    phase_at = models.DateTimeField(default=timezone.now, help_text="when it entered its phase")
    spec = models.JSONField(default=dict, help_text="ReplicaSpec as the agent is given it, without `drain`")
    spec_digest = models.CharField(max_length=64, blank=True, help_text="SHA-256 of model and engine profile")
    planned_source = models.CharField(
        max_length=16,
        blank=True,
        db_default="",
        default="",
        help_text="where its weights should come from: ram, disk, sibling, store; empty: not weighed",
    )

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.CheckConstraint(condition=Q(phase__in=ReplicaPhase.values), name="replica_phase_known"),
            models.CheckConstraint(condition=Q(slots__gte=1), name="replica_slots_positive"),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(
                fields=["deployment", "phase"],
                condition=~Q(phase__in=("stopped", "failed")),
                name="replica_live",
            ),
            models.Index(fields=["organization", "-created_at"], name="replica_newest"),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.REPLICA, self.id)


class StartTiming(models.Model):
    """How long a stage of starting takes, on average: what waiting clients are told comes from here."""

    provider = models.CharField(max_length=32)
    model_digest = models.CharField(max_length=64, blank=True, help_text="empty for a machine's own start")
    stage = models.CharField(max_length=32)
    average_ms = models.FloatField()
    n = models.PositiveIntegerField(default=1)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["provider", "model_digest", "stage"], name="starttiming_unique"),
            models.CheckConstraint(condition=Q(average_ms__gte=0), name="starttiming_not_negative"),
        ]

    def __str__(self) -> str:
        return f"{self.provider} {self.stage} {self.average_ms:.0f} ms"


class Decision(models.Model):
    """One tick of one deployment, whole: what was seen, wanted, remembered and ordered.

    `decide(observation, spec, memory_in)` gives `commands`, `memory_out` and `reasons` again, at any time.
    """

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="decisions")
    deployment = models.ForeignKey(
        Deployment, on_delete=models.PROTECT, related_name="decisions", db_constraint=False
    )
    tick_id = models.UUIDField(help_text="the tick it belongs to; one decision per tick and deployment")
    observation = models.JSONField()
    spec = models.JSONField()
    memory_in = models.JSONField()
    commands = models.JSONField()
    memory_out = models.JSONField()
    reasons = models.JSONField()
    # Defaults of the database: a control worker of the version before writes neither.
    alternatives = models.JSONField(
        default=list,
        db_default=models.Value([], models.JSONField()),
        help_text="what was passed over, and what spoke against it",
    )
    policy_version = models.CharField(
        max_length=32,
        blank=True,
        db_default="",
        help_text="digest of the policies' sources; empty: before it was kept",
    )
    at = models.DateTimeField(help_text="the now that decide() was given")

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["deployment", "tick_id"], name="decision_once_per_tick"),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["deployment", "-at"], name="decision_newest"),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.DECISION, self.id)


class ScalerState(models.Model):
    """The autoscaler's memory of a deployment and the row lease that lets one worker at a time decide for it.

    Every write is compare-and-set: `filter(pk=…, version=seen).update(version=seen + 1, …)`, exactly 1 row.
    """

    deployment = models.OneToOneField(
        Deployment,
        primary_key=True,
        on_delete=models.PROTECT,
        related_name="scaler_state",
        db_constraint=False,
    )
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    memory = models.JSONField(default=dict)
    lease_owner = models.CharField(max_length=64, blank=True)
    lease_until = models.DateTimeField(null=True, blank=True)
    version = models.PositiveBigIntegerField(default=0)

    def __str__(self) -> str:
        return f"scaler of {ids.to_text(ids.Prefix.DEPLOYMENT, self.deployment_id)}"
