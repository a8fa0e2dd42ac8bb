"""What things cost and what was used: price versions and usage events.

A price version never changes: a new price is a new row, and a request keeps the one it was admitted under.
A usage event is one finished request, written once by intake and never changed.
"""

from typing import ClassVar

from django.db import models
from django.db.models import Q

from controlplane import ids
from controlplane.tenants.models import ApiKey, Organization, Project


class PriceVersion(models.Model):
    """Token rates from a moment on, for everybody (organization NULL) or agreed with one tenant."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(
        Organization, null=True, blank=True, on_delete=models.PROTECT, related_name="+"
    )
    name = models.SlugField(max_length=60)
    input_nano_per_million = models.BigIntegerField(help_text="prompt tokens not served from cache")
    cached_nano_per_million = models.BigIntegerField(help_text="prompt tokens served from the prefix cache")
    output_nano_per_million = models.BigIntegerField(help_text="completion tokens")
    valid_from = models.DateTimeField()

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(
                fields=["organization", "name", "valid_from"],
                nulls_distinct=False,
                name="priceversion_unique",
            ),
            models.CheckConstraint(
                condition=Q(
                    input_nano_per_million__gte=0,
                    cached_nano_per_million__gte=0,
                    output_nano_per_million__gte=0,
                ),
                name="priceversion_rates_not_negative",
            ),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.PRICE_VERSION, self.id)


class Witness(models.TextChoices):
    """Which of the two accounts of a request's end arrived first."""

    STREAM = "stream"  # the usage stream in Redis
    SPOOL = "spool"  # the worker's disk spool


class UsageEvent(models.Model):
    """What one request used and cost. The table is partitioned by day.

    `day` is the UTC day inside `request_id` (a UUIDv7), enforced by a check constraint, so (day, request_id)
    is unique exactly if request_id is, over all partitions. No foreign keys: an event outlives what it names.
    """

    pk = models.CompositePrimaryKey("day", "request_id")
    day = models.DateField()
    request_id = models.UUIDField()
    organization = models.ForeignKey(
        Organization, on_delete=models.DO_NOTHING, db_constraint=False, db_index=False, related_name="+"
    )
    project = models.ForeignKey(
        Project, on_delete=models.DO_NOTHING, db_constraint=False, db_index=False, related_name="+"
    )
    api_key = models.ForeignKey(
        ApiKey, on_delete=models.DO_NOTHING, db_constraint=False, db_index=False, related_name="+"
    )
    deployment_id = models.UUIDField()
    replica_id = models.UUIDField(null=True, help_text="the last replica; NULL where it never got one")
    machine_id = models.UUIDField(null=True)
    model = models.CharField(max_length=64, help_text="deployment name as the request gave it")
    n_prompt_tokens = models.PositiveIntegerField()
    n_cached_tokens = models.PositiveIntegerField(help_text="part of n_prompt_tokens")
    n_completion_tokens = models.PositiveIntegerField()
    attempts = models.PositiveSmallIntegerField(help_text="replicas it was handed to")
    finish_reason = models.CharField(max_length=32)
    status = models.PositiveSmallIntegerField(
        help_text="HTTP status the client was (or would have been) given"
    )
    admitted_at = models.DateTimeField()
    first_token_ms = models.PositiveIntegerField(null=True, help_text="from admission to the first token")
    duration_ms = models.PositiveIntegerField(help_text="from admission to the end")
    price_version_id = models.UUIDField()
    cost_nano = models.BigIntegerField()
    end_customer = models.CharField(
        max_length=24,
        blank=True,
        default="",
        db_default="",
        help_text="pseudonym of the tenant's own customer",
    )
    counted_by = models.CharField(
        max_length=10,
        blank=True,
        default="",
        db_default="",
        help_text="who counted the tokens where no engine of ours did: upstream, tokenizer or estimate",
    )
    witness = models.CharField(max_length=8, choices=Witness.choices)
    received_at = models.DateTimeField()

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.CheckConstraint(
                condition=Q(n_cached_tokens__lte=models.F("n_prompt_tokens")),
                name="usageevent_cached_within_prompt",
            ),
            models.CheckConstraint(condition=Q(cost_nano__gte=0), name="usageevent_cost_not_negative"),
            models.CheckConstraint(condition=Q(witness__in=Witness.values), name="usageevent_witness_known"),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["organization", "-admitted_at"], name="usageevent_newest"),
            models.Index(
                fields=["organization", "deployment_id", "-admitted_at"], name="usageevent_by_deployment"
            ),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.REQUEST, self.request_id)


class Spend(models.Model):
    """What was booked per key, model, cell and quarter of an hour of admission: sums that budgets are read from.

    Written by a trigger on usage events in their own transaction, so that it is always their exact sum.
    """

    pk = models.CompositePrimaryKey("organization_id", "project_id", "api_key_id", "model", "cell", "quarter")
    organization = models.ForeignKey(
        Organization, on_delete=models.DO_NOTHING, db_constraint=False, db_index=False, related_name="+"
    )
    project_id = models.UUIDField()
    api_key_id = models.UUIDField()
    model = models.CharField(max_length=64)
    cell = models.CharField(max_length=32, help_text="empty where the machine is not known")
    quarter = models.DateTimeField(help_text="its start")
    cost_nano = models.BigIntegerField()
    n_requests = models.BigIntegerField()

    class Meta:
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["api_key_id", "quarter"], name="spend_of_key"),
            models.Index(fields=["quarter"], name="spend_latest"),
        ]

    def __str__(self) -> str:
        return f"{self.api_key_id} {self.quarter.isoformat()}"
