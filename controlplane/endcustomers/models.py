"""Limits on a tenant's own customers: of all of a project's, or of one of them, by its pseudonym.

Written by services.py, read by gateways with a key (migrations/0001), taken by the admission script as a level below
the key. Who a pseudonym stands for is written nowhere (tenants/end_customers.py).
"""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.db.models import Q

from controlplane import ids
from controlplane.tenants.end_customers import LENGTH
from controlplane.tenants.limits import Limits
from controlplane.tenants.models import Organization, Project


class EndCustomerLimits(models.Model):
    """Limits of one customer, or, where `customer` is empty, of each that has none of its own. NULL = no limit."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    project = models.ForeignKey(Project, on_delete=models.PROTECT, related_name="+", db_constraint=False)
    customer = models.CharField(max_length=LENGTH, blank=True, help_text="pseudonym; empty = every customer")
    rpm = models.PositiveIntegerField(null=True, blank=True, help_text="requests per minute")
    input_tpm = models.PositiveIntegerField(null=True, blank=True, help_text="prompt tokens per minute")
    output_tpm = models.PositiveIntegerField(null=True, blank=True, help_text="completion tokens per minute")
    max_concurrency = models.PositiveIntegerField(null=True, blank=True, help_text="requests in flight")
    budget_nano = models.BigIntegerField(null=True, blank=True, help_text="money to spend, nano-dollars")
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["project", "customer"], name="endcustomerlimits_unique"),
            models.CheckConstraint(
                condition=Q(budget_nano__isnull=True) | Q(budget_nano__gte=0),
                name="endcustomerlimits_budget_not_negative",
            ),
            models.CheckConstraint(
                condition=Q(customer__regex=rf"^([0-9a-f]{{{LENGTH}}})?$"), name="endcustomerlimits_pseudonym"
            ),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.END_CUSTOMER_LIMITS, self.id)

    @property
    def limits(self) -> Limits:
        return Limits(self.rpm, self.input_tpm, self.output_tpm, self.max_concurrency, self.budget_nano)


class EndCustomerLease(models.Model):
    """What one cell may spend of a customer's money, while there are several cells. Granted by corral_lease_end
    (migrations/0002), when a request asks; given back by leases.py, when none has for a while."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="+")
    project_id = models.UUIDField()
    customer = models.CharField(max_length=LENGTH, help_text="pseudonym")
    cell = models.CharField(max_length=32)
    granted = models.BigIntegerField(help_text="nano-dollars, those spent in the cell included")
    expires_at = models.DateTimeField(help_text="the cell admits nothing under it from then on")
    counts_until = models.DateTimeField(
        help_text="what was admitted under it has ended and is booked by then"
    )
    returned_at = models.DateTimeField(null=True, help_text="only what was spent counts since then")

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(
                fields=["project_id", "customer", "cell"], name="endcustomerlease_unique"
            ),
            models.CheckConstraint(condition=Q(granted__gte=0), name="endcustomerlease_not_negative"),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["cell", "expires_at"], name="endcustomerlease_lapsed")
        ]

    def __str__(self) -> str:
        return f"{self.customer} in {self.cell}"
