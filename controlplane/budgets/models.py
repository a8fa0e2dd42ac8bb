"""Budgets: how much a key, a project or an organization may spend per window, and which thresholds were crossed.

Fields and constraints; writes are in services.py, reads in selectors.py, the arithmetic of windows in
controlplane/policy/periods.py. The lifetime budget that is one of the five limits (tenants/limits.py) stands beside
these and is enforced in the same script call.
"""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.db.models import Q

from controlplane import ids
from controlplane.policy.periods import MAX_ROLLING_HOURS, Period
from controlplane.tenants.models import ApiKey, Organization, Project

PERIODS = [(period.value, period.value) for period in Period]


def default_thresholds() -> list[int]:
    return [50, 80, 100]


class Budget(models.Model):
    """A limit on spending. Hard: what does not fit is refused. Soft: only alerts.

    Its subject is the key, else the project, else the whole organization; `model` narrows it to one deployment name.
    Subject and period never change: another window would be another budget.
    """

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="budgets")
    project = models.ForeignKey(
        Project, null=True, blank=True, on_delete=models.PROTECT, related_name="+", db_constraint=False
    )
    api_key = models.ForeignKey(
        ApiKey, null=True, blank=True, on_delete=models.PROTECT, related_name="+", db_constraint=False
    )
    model = models.CharField(max_length=64, blank=True, help_text="deployment name; empty = all")
    name = models.CharField(max_length=120)
    limit_nano = models.BigIntegerField(help_text="money per window, nano-dollars")
    hard = models.BooleanField(default=True, help_text="refuses; a soft budget only alerts")
    period = models.CharField(max_length=8, choices=PERIODS)
    rolling_hours = models.PositiveIntegerField(null=True, blank=True, help_text="length of a rolling window")
    thresholds = models.JSONField(
        default=default_thresholds, blank=True, help_text="percent of the limit, ascending"
    )
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["organization", "id"], name="budget_tenant_unique"),
            models.CheckConstraint(condition=Q(limit_nano__gte=0), name="budget_limit_not_negative"),
            models.CheckConstraint(
                condition=Q(project__isnull=True) | Q(api_key__isnull=True), name="budget_one_subject"
            ),
            models.CheckConstraint(
                condition=Q(period__in=[period.value for period in Period]), name="budget_period_known"
            ),
            models.CheckConstraint(
                condition=Q(period="rolling", rolling_hours__gte=1, rolling_hours__lte=MAX_ROLLING_HOURS)
                | (~Q(period="rolling") & Q(rolling_hours__isnull=True)),
                name="budget_rolling_has_hours",
            ),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["api_key"], name="budget_of_key", condition=Q(api_key__isnull=False)),
            models.Index(fields=["project"], name="budget_of_project", condition=Q(project__isnull=False)),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.BUDGET, self.id)

    @property
    def scope(self) -> str:
        """`key`, `prj` or `org`, as in Redis."""
        return "key" if self.api_key_id else "prj" if self.project_id else "org"


class BudgetAlert(models.Model):
    """A threshold was crossed in a window. The row is the fence: whoever inserts it tells, and nobody else."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    budget = models.ForeignKey(Budget, on_delete=models.CASCADE, related_name="alerts", db_constraint=False)
    window_start = models.DateTimeField(help_text="of a rolling budget: the day it was crossed on")
    threshold = models.PositiveSmallIntegerField(help_text="percent of the limit")
    spent_nano = models.BigIntegerField(help_text="when it was noticed")
    limit_nano = models.BigIntegerField()
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["budget", "window_start", "threshold"], name="budgetalert_once"),
        ]

    def __str__(self) -> str:
        return f"{self.budget_id} {self.threshold} %"
