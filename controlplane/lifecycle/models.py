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
