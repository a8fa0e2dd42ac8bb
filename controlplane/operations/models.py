"""What takes longer than a call: rollouts, drains, exports. A row that a client can follow until it ends.

Rows are made by services.py in the tenant's transaction and advanced by the control worker (advance.py), which claims
them by compare-and-set on `version` for the time of a lease. Fields and constraints only.
"""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.db.models import Q
from django.utils import timezone

from controlplane import ids
from controlplane.tenants.models import Organization


class State(models.TextChoices):
    """Life of an operation, in order; the last two are final."""

    PENDING = "pending"  # nobody has begun
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"  # error_code and error_message say why


OPEN = (State.PENDING, State.RUNNING)


class Operation(models.Model):
    """One long operation of a tenant. `kind` names its handler, `subject` what it works on (an id of the API)."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    kind = models.CharField(max_length=40)
    subject = models.CharField(max_length=64, blank=True, help_text="an id as the API shows it")
    params = models.JSONField(default=dict, help_text="for the handler; holds no secret")
    actor = models.CharField(max_length=64, help_text="who asked: tok_…, usr_…, or a name of the house")
    state = models.CharField(max_length=16, choices=State.choices, default=State.PENDING)
    progress = models.PositiveSmallIntegerField(default=0, help_text="percent; 100 exactly when it succeeded")
    message = models.CharField(max_length=500, blank=True, help_text="what it does now, for people")
    result = models.JSONField(null=True)
    error_code = models.CharField(max_length=64, blank=True)
    error_message = models.CharField(max_length=500, blank=True)
    created_at = models.DateTimeField(default=timezone.now)
    started_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)
    deadline_at = models.DateTimeField(help_text="given up then")
    next_at = models.DateTimeField(default=timezone.now, help_text="not looked at before; the end of a claim")
    n_failures = models.PositiveSmallIntegerField(default=0, help_text="of its handler, one after another")
    version = models.PositiveBigIntegerField(default=0, help_text="grows with every claim and every step")

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.CheckConstraint(condition=Q(state__in=State.values), name="operation_state_known"),
            models.CheckConstraint(condition=Q(progress__lte=100), name="operation_progress_in_range"),
            models.CheckConstraint(
                condition=Q(state__in=OPEN, finished_at__isnull=True)
                | (~Q(state__in=OPEN) & Q(finished_at__isnull=False)),
                name="operation_end_has_time",
            ),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["next_at"], condition=Q(state__in=OPEN), name="operation_due"),
            models.Index(fields=["organization", "-id"], name="operation_newest"),
            models.Index(fields=["finished_at"], name="operation_oldest"),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.OPERATION, self.id)
