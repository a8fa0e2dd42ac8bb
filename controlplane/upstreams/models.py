"""Endpoints elsewhere that serve a deployment: how they are called, what they cost, what they were used for.

Written by services.py; the replica that stands for an endpoint is a row of the autoscaler's (autoscaler/external.py).
Credentials lie sealed beside it (secretbox.py), never in the audit log, an export or an answer.
"""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.db.models import Q

from controlplane import ids
from controlplane.deployments.models import Deployment, check_name
from controlplane.tenants.models import Organization

MAX_SLOTS = 4096


class UpstreamRole(models.TextChoices):
    """What an endpoint is to its deployment; as workers.contract.UpstreamRole."""

    REPLICA = "replica"  # takes requests beside the others, or alone
    OVERFLOW = "overflow"  # takes what would wait too long for the others
    SHADOW = "shadow"  # is sent copies; what it answers is compared and dropped


class TokenLimitField(models.TextChoices):
    """How an endpoint calls the bound of an answer."""

    MAX_TOKENS = "max_tokens"
    MAX_COMPLETION_TOKENS = "max_completion_tokens"


class Rates(models.Model):
    """What an endpoint takes for its tokens, nano-dollars per million."""

    input_nano_per_million = models.BigIntegerField(default=0)
    cached_nano_per_million = models.BigIntegerField(default=0)
    output_nano_per_million = models.BigIntegerField(default=0)

    class Meta:
        abstract = True


class Upstream(Rates):
    """An OpenAI-compatible endpoint attached to a deployment. Times in milliseconds."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="upstreams")
    deployment = models.ForeignKey(
        Deployment, on_delete=models.PROTECT, related_name="upstreams", db_constraint=False
    )
    name = models.CharField(max_length=64, validators=[check_name])
    role = models.CharField(max_length=10, choices=UpstreamRole.choices)
    # Of a shadow: a deployment of ours that answers the copies, in place of an address.
    target = models.ForeignKey(
        Deployment, null=True, blank=True, on_delete=models.PROTECT, related_name="+", db_constraint=False
    )
    base_url = models.CharField(max_length=2000, blank=True, help_text="up to and with /v1")
    model = models.CharField(max_length=200, blank=True, help_text="what the endpoint calls it")
    slots = models.PositiveIntegerField(help_text="requests it is sent at once")
    overflow_after_ms = models.PositiveIntegerField(
        default=1_000, help_text="of an overflow: a request waits so long before it goes there"
    )
    shadow_ppm = models.PositiveIntegerField(
        default=10_000, help_text="of a shadow: millionths of the requests that are copied"
    )
    shadow_rpm = models.PositiveIntegerField(default=60, help_text="of a shadow: most copies a minute")
    shadow_budget_nano = models.BigIntegerField(
        default=1_000_000_000, help_text="of a shadow: most that copies may cost in a UTC day, nano-dollars"
    )
    connect_ms = models.PositiveIntegerField(default=5_000)
    first_token_ms = models.PositiveIntegerField(default=30_000)
    between_tokens_ms = models.PositiveIntegerField(default=15_000)
    n_retries = models.PositiveSmallIntegerField(default=2, help_text="before the first token only")
    breaker_failures = models.PositiveSmallIntegerField(
        default=5, help_text="in a row, then it is left alone"
    )
    breaker_pause_ms = models.PositiveIntegerField(default=5_000, help_text="at first; doubled each time")
    extensions = models.BooleanField(
        default=False, help_text="takes top_k, min_p, repetition_penalty, ignore_eos"
    )
    stream_usage = models.BooleanField(
        default=True, help_text="takes stream_options, which asks it for its counts"
    )
    max_tokens_field = models.CharField(
        max_length=24, choices=TokenLimitField.choices, default=TokenLimitField.MAX_TOKENS
    )
    header_names = models.JSONField(
        default=list, blank=True, help_text="of the headers that are sent with each request"
    )
    has_api_key = models.BooleanField(default=False)
    secrets_version = models.PositiveIntegerField(default=1, help_text="grows with the key and the headers")
    disabled_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["organization", "id"], name="upstream_tenant_unique"),
            models.UniqueConstraint(fields=["organization", "name"], name="upstream_name_unique"),
            models.CheckConstraint(condition=Q(role__in=UpstreamRole.values), name="upstream_role_known"),
            models.CheckConstraint(
                condition=Q(slots__gte=1, slots__lte=MAX_SLOTS), name="upstream_slots_in_range"
            ),
            models.CheckConstraint(condition=Q(shadow_ppm__lte=1_000_000), name="upstream_ppm_in_range"),
            models.CheckConstraint(
                condition=Q(shadow_budget_nano__gte=0), name="upstream_budget_not_negative"
            ),
            models.CheckConstraint(
                condition=Q(target=None) & ~Q(base_url="")
                | Q(target__isnull=False, base_url="", role="shadow"),
                name="upstream_one_destination",
            ),
            models.CheckConstraint(
                condition=Q(
                    input_nano_per_million__gte=0,
                    cached_nano_per_million__gte=0,
                    output_nano_per_million__gte=0,
                ),
                name="upstream_rates_not_negative",
            ),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.UPSTREAM, self.id)


class UpstreamSecrets(models.Model):
    """What an endpoint is called with, sealed: workers.contract.UpstreamSecret as JSON."""

    upstream = models.OneToOneField(
        Upstream, primary_key=True, on_delete=models.CASCADE, related_name="kept", db_constraint=False
    )
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    sealed_secret = models.BinaryField()

    def __str__(self) -> str:
        return str(self.upstream_id)


class UpstreamReplica(Rates):
    """Which endpoint a replica stands for, and at which rates: what usage is costed by, also after either has gone."""

    replica_id = models.UUIDField(primary_key=True)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    upstream_id = models.UUIDField()
    deployment_id = models.UUIDField()

    class Meta:
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["upstream_id"], name="upstreamreplica_of"),
        ]

    def __str__(self) -> str:
        return str(self.replica_id)


class UpstreamDay(models.Model):
    """What an endpoint served in a UTC day, what it cost and what it earned. Sums, written as usage is booked."""

    pk = models.CompositePrimaryKey("organization_id", "upstream_id", "day")
    organization = models.ForeignKey(
        Organization, on_delete=models.DO_NOTHING, db_constraint=False, db_index=False, related_name="+"
    )
    upstream_id = models.UUIDField()
    day = models.DateField()
    n_requests = models.BigIntegerField(default=0)
    n_failed = models.BigIntegerField(default=0)
    n_counted_here = models.BigIntegerField(
        default=0, help_text="requests without counts of the endpoint's own"
    )
    n_prompt_tokens = models.BigIntegerField(default=0)
    n_cached_tokens = models.BigIntegerField(default=0)
    n_completion_tokens = models.BigIntegerField(default=0)
    cost_nano = models.BigIntegerField(default=0)
    revenue_nano = models.BigIntegerField(default=0)

    def __str__(self) -> str:
        return f"{self.upstream_id} {self.day}"


class OutsideConsent(models.Model):
    """An organization agrees that its requests are copied to shadows, and that its prompts go to endpoints that others
    attached. No row: no."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.OneToOneField(Organization, on_delete=models.PROTECT, related_name="+")
    agreed_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return str(self.organization_id)


class ShadowResult(models.Model):
    """What a shadow made of one request, beside what the request's own answer was: counts, times and how alike the
    texts are, never a text. Written from what gateways tell (intake.py); kept for a month, bounded per shadow."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    upstream_id = models.UUIDField()
    request_id = models.UUIDField()
    at = models.DateTimeField()
    status = models.PositiveSmallIntegerField(help_text="200, or as a client would have been told")
    code = models.CharField(max_length=40, blank=True)
    finish_reason = models.CharField(max_length=12, blank=True)
    first_token_ms = models.PositiveIntegerField(null=True, help_text="NULL where the caller did not stream")
    itl_us = models.PositiveIntegerField(null=True, help_text="mean gap between tokens, microseconds")
    duration_ms = models.PositiveIntegerField()
    n_prompt_tokens = models.PositiveIntegerField()
    n_completion_tokens = models.PositiveIntegerField()
    cost_nano = models.BigIntegerField()
    own_finish_reason = models.CharField(max_length=12, blank=True)
    own_first_token_ms = models.PositiveIntegerField(null=True)
    own_itl_us = models.PositiveIntegerField(null=True)
    own_duration_ms = models.PositiveIntegerField(null=True)
    own_n_completion_tokens = models.PositiveIntegerField(null=True)
    is_same = models.BooleanField(
        null=True, help_text="letter for letter; NULL unless the request was greedy"
    )
    similarity_ppm = models.PositiveIntegerField(null=True, help_text="of the words' triples (Jaccard)")

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["upstream_id", "request_id"], name="shadowresult_once"),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["organization", "upstream_id", "-at"], name="shadowresult_newest"),
            models.Index(fields=["at"], name="shadowresult_oldest"),
        ]

    def __str__(self) -> str:
        return str(self.request_id)


class ShadowSkip(models.Model):
    """Requests of a UTC day that were chosen and not copied, by reason: without them shares would mislead."""

    pk = models.CompositePrimaryKey("organization_id", "upstream_id", "day", "reason")
    organization = models.ForeignKey(
        Organization, on_delete=models.DO_NOTHING, db_constraint=False, db_index=False, related_name="+"
    )
    upstream_id = models.UUIDField()
    day = models.DateField()
    reason = models.CharField(max_length=12, help_text="controlplane/upstreams/wire.py: Skipped")
    n = models.BigIntegerField(default=0)

    def __str__(self) -> str:
        return f"{self.upstream_id} {self.day} {self.reason}"
