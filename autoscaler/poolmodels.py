"""What was decided for a whole pool of machines: rows of `PoolDecision`. Imported by models.py, for Django's sake."""

from typing import ClassVar, Final

from django.db import models

from controlplane import ids

# Reason of a machine that leaves, where nobody gave another one.
TAKEN_AWAY: Final = "its provider takes it away"


class PoolDecisionKind(models.TextChoices):
    """What was decided."""

    PURCHASE = "purchase"  # what the machine of one order may be: policy/market.py
    HEALTH = "health"  # which machines are given up because a GPU is sick: policy/gpuhealth.py
    OPERATOR = "operator"  # a machine quarantined by hand, or left in after all: quarantine.py
    POOL = "pool"  # what else to buy and what to give up: policy/poolplan.py


class PoolDecision(models.Model):
    """One decision about the machines of a pool, whole: the house's, no tenant's. Never changed."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    cell = models.CharField(max_length=16)
    provider = models.CharField(max_length=32)
    kind = models.CharField(max_length=16, choices=PoolDecisionKind.choices)
    command_id = models.UUIDField(
        null=True, blank=True, help_text="the LaunchMachine command that a purchase is about"
    )
    inputs = models.JSONField()
    outcome = models.JSONField()
    alternatives = models.JSONField(default=list)
    reasons = models.JSONField(default=list)
    policy_version = models.CharField(max_length=32)
    at = models.DateTimeField(help_text="the now that the policy was given")

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.CheckConstraint(
                condition=models.Q(kind__in=PoolDecisionKind.values), name="pooldecision_kind_known"
            ),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["cell", "provider", "-at"], name="pooldecision_newest"),
            models.Index(
                fields=["command_id"],
                condition=models.Q(command_id__isnull=False),
                name="pooldecision_command",
            ),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.DECISION, self.id)
