"""What a project promises its own requests, where that differs from the service class itself.

Fields and constraints only; writes are in services.py. How rules combine is controlplane/policy/promises.py.
"""

from typing import ClassVar, Final

from django.db import models
from django.db.models import Q

from controlplane import ids
from controlplane.deployments.models import Deployment, SloClass
from controlplane.tenants.models import ApiKey, Organization, Project

MAX_TTFT_MS: Final = 24 * 3600 * 1000
MAX_ITL_MS: Final = 60_000
MAX_DEADLINE_S: Final = 7 * 24 * 3600
MIN_OBJECTIVE_PPM: Final = 500_000
MAX_OBJECTIVE_PPM: Final = 999_999  # all of them would leave no budget, and no burn rate


class SloRule(models.Model):
    """Targets of a class for a project's requests, narrowed to a key or a deployment; and which class is the
    default."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="slo_rules")
    project = models.ForeignKey(
        Project, on_delete=models.PROTECT, related_name="slo_rules", db_constraint=False
    )
    api_key = models.ForeignKey(
        ApiKey, null=True, blank=True, on_delete=models.PROTECT, related_name="+", db_constraint=False
    )
    deployment = models.ForeignKey(
        Deployment, null=True, blank=True, on_delete=models.PROTECT, related_name="+", db_constraint=False
    )
    slo_class = models.ForeignKey(SloClass, on_delete=models.PROTECT)
    is_default = models.BooleanField(default=False, help_text="requests that name no class get this one")
    ttft_ms = models.PositiveIntegerField(null=True, blank=True, help_text="NULL: as the class")
    itl_ms = models.PositiveIntegerField(null=True, blank=True)
    deadline_s = models.PositiveIntegerField(null=True, blank=True)
    objective_ppm = models.PositiveIntegerField(
        null=True, blank=True, help_text="millionths of the requests that must meet all targets"
    )
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(
                fields=["project", "api_key", "deployment", "slo_class"],
                nulls_distinct=False,
                name="slorule_unique",
            ),
            models.UniqueConstraint(
                fields=["project", "api_key", "deployment"],
                condition=Q(is_default=True),
                nulls_distinct=False,
                name="slorule_one_default",
            ),
            models.CheckConstraint(
                condition=Q(objective_ppm__isnull=True)
                | Q(objective_ppm__gte=MIN_OBJECTIVE_PPM, objective_ppm__lte=MAX_OBJECTIVE_PPM),
                name="slorule_objective_in_range",
            ),
            models.CheckConstraint(
                condition=(Q(ttft_ms__isnull=True) | Q(ttft_ms__gte=1, ttft_ms__lte=MAX_TTFT_MS))
                & (Q(itl_ms__isnull=True) | Q(itl_ms__gte=1, itl_ms__lte=MAX_ITL_MS))
                & (Q(deadline_s__isnull=True) | Q(deadline_s__gte=1, deadline_s__lte=MAX_DEADLINE_S)),
                name="slorule_targets_in_range",
            ),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.SLO_RULE, self.id)


class SloWindow(models.Model):
    """Requests of one class that ended in one minute or hour, and how many kept their promise. Made by intake, in the
    transaction that books them, so that each counts once."""

    id = models.BigAutoField(primary_key=True)
    organization = models.ForeignKey(
        Organization, on_delete=models.DO_NOTHING, db_constraint=False, related_name="+", db_index=False
    )
    project = models.ForeignKey(
        Project, on_delete=models.DO_NOTHING, db_constraint=False, related_name="+", db_index=False
    )
    deployment_id = models.UUIDField()
    slo_class = models.CharField(max_length=16)
    width_s = models.PositiveIntegerField(help_text="60 or 3600")
    at = models.DateTimeField(help_text="its begin")
    n = models.PositiveIntegerField()
    n_good = models.PositiveIntegerField()
    n_failed = models.PositiveIntegerField()
    n_ttft = models.PositiveIntegerField()
    n_itl = models.PositiveIntegerField()
    n_deadline = models.PositiveIntegerField()
    n_refused = models.PositiveIntegerField()
    allowed_ppm = models.BigIntegerField(
        help_text="misses that the objectives allow, millionths of a request"
    )

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(
                fields=["organization", "width_s", "at", "slo_class", "project", "deployment_id"],
                name="slowindow_unique",
            ),
            models.CheckConstraint(condition=Q(width_s__in=[60, 3600]), name="slowindow_width_known"),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["width_s", "at"], name="slowindow_oldest"),
        ]


class SloAlert(models.Model):
    """A budget that burns too fast, from when to when. Open while `ended_at` is NULL."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="slo_alerts")
    project = models.ForeignKey(
        Project, on_delete=models.PROTECT, related_name="slo_alerts", db_constraint=False
    )
    slo_class = models.CharField(max_length=16)
    severity = models.CharField(max_length=8, help_text="page or ticket")
    burn_rate = models.FloatField(help_text="in its long window, when it began")
    window_s = models.PositiveIntegerField(help_text="the long window")
    started_at = models.DateTimeField()
    ended_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(
                fields=["project", "slo_class"], condition=Q(ended_at__isnull=True), name="sloalert_one_open"
            ),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["organization", "-started_at"], name="sloalert_newest"),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.SLO_ALERT, self.id)
