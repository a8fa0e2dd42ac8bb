"""What happens to a tenant as a whole: it is suspended, its data is exported, its data is erased.

Fields and constraints only; the work is in suspension.py, exports.py and erasure.py.
"""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.db.models import Q
from django.db.models.functions import Now

from controlplane import ids
from controlplane.tenants.models import Organization


class Suspension(models.Model):
    """A time in which an organization may use nothing. The house begins and ends it; its members may read why."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    reason = models.CharField(max_length=300, help_text="told to its members")
    began_at = models.DateTimeField(db_default=Now())
    lifted_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(
                fields=["organization"], condition=Q(lifted_at__isnull=True), name="suspension_one_at_a_time"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.organization_id.hex} since {self.began_at:%Y-%m-%d}"


class Export(models.Model):
    """A copy of everything that belongs to an organization, in parts of JSON lines, kept for its owners for a while."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    operation_id = models.UUIDField(null=True, help_text="the long operation that writes it")
    position = models.JSONField(default=dict, help_text="where the next part goes on")
    n_parts = models.PositiveIntegerField(default=0)
    n_rows = models.PositiveBigIntegerField(default=0)
    created_at = models.DateTimeField(db_default=Now())
    expires_at = models.DateTimeField()

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["organization", "id"], name="export_tenant_unique"),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.EXPORT, self.id)


class ExportPart(models.Model):
    """Part `n` of an export, from 0: JSON lines, gzipped."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    export = models.ForeignKey(Export, on_delete=models.CASCADE, db_constraint=False, related_name="parts")
    n = models.PositiveIntegerField()
    data = models.BinaryField()

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["export", "n"], name="exportpart_unique"),
        ]

    def __str__(self) -> str:
        return f"{self.export_id.hex}:{self.n}"


class ErasureState(models.TextChoices):
    """Life of an erasure. Until `erasing` it can be cancelled; then nothing brings the data back."""

    REQUESTED = "requested"
    CANCELLED = "cancelled"
    ERASING = "erasing"
    ERASED = "erased"


class Erasure(models.Model):
    """An owner's wish, or the house's, that everything of an organization be forgotten. Outlives what it erased."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    state = models.CharField(max_length=12, choices=ErasureState.choices, default=ErasureState.REQUESTED)
    requested_by = models.CharField(max_length=64, help_text="tok_…, usr_…, or the database role")
    requested_at = models.DateTimeField(db_default=Now())
    due_at = models.DateTimeField(help_text="until then it can be cancelled")
    quiet_until = models.DateTimeField(null=True, help_text="suspended, waiting for what still runs")
    ended_at = models.DateTimeField(null=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(
                fields=["organization"], condition=~Q(state="cancelled"), name="erasure_one_at_a_time"
            ),
            models.CheckConstraint(condition=Q(state__in=ErasureState.values), name="erasure_state_known"),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.ERASURE, self.id)
