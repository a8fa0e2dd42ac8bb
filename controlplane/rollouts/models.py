"""Engine profiles as they were compiled, and rollouts of new ones.

Fields and constraints only. A profile is written once, by profiles.py; a rollout by services.py and, step by step, by
the control worker (autoscaler/canary.py), each write a compare-and-set on `version`.
"""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.db.models import Q

from controlplane import ids
from controlplane.deployments.models import Deployment, ModelVersion
from controlplane.tenants.models import Organization

PPM = 1_000_000


class EngineProfile(models.Model):
    """What replicas of a deployment are started with, and why: one row per set of settings and weights.

    `digest` is SHA-256 of the weights' digest and the settings: the same as a replica's `spec_digest`.
    """

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    deployment = models.ForeignKey(
        Deployment, on_delete=models.PROTECT, related_name="profiles", db_constraint=False
    )
    number = models.PositiveIntegerField(help_text="1 for the deployment's first")
    digest = models.CharField(max_length=64)
    model_version = models.ForeignKey(
        ModelVersion, on_delete=models.PROTECT, related_name="+", db_constraint=False
    )
    slo_class = models.CharField(max_length=16, help_text="whose pace it was compiled for")
    hardware = models.CharField(max_length=40, help_text="cpu, l4, 4xl4, …")
    settings = models.JSONField(help_text="every knob, as the worker takes it")
    chosen = models.JSONField(help_text="[{name, value, reason, inputs, overridden}]")
    forecast = models.JSONField(
        default=dict, blank=True, help_text="what the performance model expects of it"
    )
    warnings = models.JSONField(default=list, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["deployment", "digest"], name="engineprofile_digest_unique"),
            models.UniqueConstraint(fields=["deployment", "number"], name="engineprofile_number_unique"),
            models.UniqueConstraint(fields=["organization", "id"], name="engineprofile_tenant_unique"),
            models.CheckConstraint(
                condition=Q(digest__regex=r"^[0-9a-f]{64}$"), name="engineprofile_digest_shape"
            ),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.ENGINE_PROFILE, self.id)


class RolloutState(models.TextChoices):
    """Life of a rollout. The last three are final."""

    STARTING = "starting"  # the canary comes up; nobody is sent to it
    OBSERVING = "observing"  # it has its share of the traffic
    PROMOTING = "promoting"  # it is what the deployment wants now; the former replicas go
    ROLLING_BACK = "rolling_back"  # it gets nothing new and goes
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled_back"
    SUPERSEDED = "superseded"  # the deployment was changed otherwise meanwhile


OPEN_STATES = (
    RolloutState.STARTING,
    RolloutState.OBSERVING,
    RolloutState.PROMOTING,
    RolloutState.ROLLING_BACK,
)
# While one of these holds, replicas of the candidate are given a share of the requests and no more.
HELD_BACK_STATES = (RolloutState.STARTING, RolloutState.OBSERVING, RolloutState.ROLLING_BACK)
# While one of these holds, replicas of the candidate are wanted beside the stable ones.
CANARY_STATES = (RolloutState.STARTING, RolloutState.OBSERVING)


class Wanted(models.TextChoices):
    """What an operator wants of an open rollout, whatever the evidence."""

    NONE = ""
    PROMOTE = "promote"
    ABORT = "abort"


class Rollout(models.Model):
    """A new profile or model version of a deployment on its way to all of its traffic, or back."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    deployment = models.ForeignKey(
        Deployment, on_delete=models.PROTECT, related_name="rollouts", db_constraint=False
    )
    candidate = models.ForeignKey(
        EngineProfile, on_delete=models.PROTECT, related_name="rollouts", db_constraint=False
    )
    generation = models.PositiveBigIntegerField(help_text="of the deployment when it began")
    base_digest = models.CharField(
        max_length=64, default="", help_text="of what the deployment ran when it began"
    )
    reason = models.CharField(max_length=300, blank=True)
    state = models.CharField(max_length=16, choices=RolloutState.choices, default=RolloutState.STARTING)
    steps_ppm = models.JSONField(help_text="shares of the traffic, one per step, in millionths")
    step = models.PositiveSmallIntegerField(default=0)
    share_ppm = models.PositiveIntegerField(default=0, help_text="of the requests, now")
    step_at = models.DateTimeField(help_text="when this step began: evidence counts from here")
    limits = models.JSONField(default=dict, blank=True, help_text="see controlplane/policy/canary.py: Limits")
    paused = models.BooleanField(default=False, help_text="the share stays; only regressions still decide")
    wanted = models.CharField(max_length=8, choices=Wanted.choices, default=Wanted.NONE, blank=True)
    verdict = models.CharField(max_length=300, blank=True, help_text="why it is in this state")
    evidence = models.JSONField(
        default=list, blank=True, help_text="one entry per step and per final decision"
    )
    operation_id = models.UUIDField(null=True, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    finished_at = models.DateTimeField(null=True, blank=True)
    version = models.PositiveBigIntegerField(default=0)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.CheckConstraint(condition=Q(state__in=RolloutState.values), name="rollout_state_known"),
            models.CheckConstraint(condition=Q(wanted__in=Wanted.values), name="rollout_wanted_known"),
            models.CheckConstraint(condition=Q(share_ppm__lte=PPM), name="rollout_share_in_range"),
            # Two canaries at once could not be told apart in what clients saw.
            models.UniqueConstraint(
                fields=["deployment"], condition=Q(state__in=OPEN_STATES), name="rollout_one_open"
            ),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["organization", "deployment", "-created_at"], name="rollout_newest"),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.ROLLOUT, self.id)

    @property
    def is_open(self) -> bool:
        return self.state in OPEN_STATES
