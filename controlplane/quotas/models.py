"""Quotas on machines: ceilings that the house sets, and lower limits that a tenant sets itself.

What counts against them are the machines bought for a tenant's deployments (autoscaler/quotas.py), whoever else finds
room there. Row security lets tenants read ceilings and write only their own (migrations/0001).
"""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.db.models import Q

from controlplane import ids
from controlplane.policy.periods import Period
from controlplane.tenants.models import Organization


class QuotaKind(models.TextChoices):
    """What is counted. Hours are those of the calendar window in the organization's zone (the house's: UTC)."""

    MACHINES = "machines"  # at once
    SPEND_RATE = "spend_rate"  # nano-dollars an hour, at once
    GPU_HOURS_DAY = "gpu_hours_day"
    GPU_HOURS_WEEK = "gpu_hours_week"
    GPU_HOURS_MONTH = "gpu_hours_month"

    @property
    def period(self) -> Period | None:
        """Of GPU-hours."""
        return Period(self.value.removeprefix("gpu_hours_")) if self.value.startswith("gpu_hours_") else None


class Quota(models.Model):
    """One limit. Without an organization: of the whole house, or of one cell."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(
        Organization, null=True, blank=True, on_delete=models.PROTECT, related_name="+"
    )
    cell = models.CharField(max_length=32, blank=True, help_text="of the house's own; empty = all cells")
    kind = models.CharField(max_length=16, choices=QuotaKind.choices)
    limit = models.BigIntegerField()
    by_house = models.BooleanField(help_text="a ceiling, which the tenant cannot change")
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(
                fields=["organization", "cell", "kind", "by_house"], name="quota_unique", nulls_distinct=False
            ),
            models.CheckConstraint(condition=Q(limit__gte=0), name="quota_not_negative"),
            models.CheckConstraint(condition=Q(kind__in=QuotaKind.values), name="quota_kind_known"),
            models.CheckConstraint(
                condition=Q(organization__isnull=True, by_house=True)
                | Q(organization__isnull=False, cell=""),
                name="quota_level",
            ),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.QUOTA, self.id)
