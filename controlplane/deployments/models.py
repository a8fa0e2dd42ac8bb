"""What is served: model versions, service classes and deployments.

A deployment's name is the model id that programs send to /v1. Fields, constraints and derived properties
only; writes are in services.py, reads in selectors.py.
"""

import re
from typing import Any, ClassVar

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import models
from django.db.models import F, Q

from controlplane import ids
from controlplane.policy.ordering import QueueOrder
from controlplane.tenants.models import Organization, Project

MAX_WINDOW_TOKENS = 1_000_000
NAME_SHAPE = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,63}$"


def check_name(name: str) -> None:
    """Refuse what programs could not send as a model id."""
    if not re.fullmatch(NAME_SHAPE, name):
        raise ValidationError(
            "use 1 to 64 letters, digits, dots, dashes, slashes and underscores, a letter or digit first"
        )


class ModelSource(models.TextChoices):
    """Where the weights of a model version come from."""

    DIRECTORY = "directory"  # a local directory in the Hugging Face layout
    PACKAGE = "package"  # a file inside an installed Python package
    OBJECT_STORE = "s3"
    TOY = "toy"  # no weights: the deterministic test engine


class ModelVersion(models.Model):
    """One exact set of weights, named by the digest of its contents. A tenant's own, changed by nothing but being
    retired."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="model_versions")
    digest = models.CharField(max_length=64, help_text="SHA-256 of the manifest, lower-case hex")
    name = models.CharField(max_length=120)
    source_kind = models.CharField(max_length=16, choices=ModelSource.choices)
    source_uri = models.CharField(max_length=500, blank=True)
    size_bytes = models.BigIntegerField()
    n_params = models.BigIntegerField(null=True, blank=True)
    max_model_len = models.PositiveIntegerField(help_text="longest prompt plus completion, tokens")
    licence = models.CharField(max_length=64, blank=True, help_text="SPDX identifier")
    manifest = models.JSONField(default=dict, blank=True, help_text="file name -> {sha256, size_bytes}")
    config = models.JSONField(null=True, blank=True, help_text="its config.json: layers, heads, context")
    created_at = models.DateTimeField(auto_now_add=True)
    retired_at = models.DateTimeField(null=True, blank=True, help_text="nothing new is served from it")

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["organization", "digest"], name="modelversion_digest_unique"),
            models.UniqueConstraint(fields=["organization", "id"], name="modelversion_tenant_unique"),
            models.CheckConstraint(
                condition=Q(digest__regex=r"^[0-9a-f]{64}$"), name="modelversion_digest_shape"
            ),
            models.CheckConstraint(condition=Q(size_bytes__gte=0), name="modelversion_size_not_negative"),
            models.CheckConstraint(condition=Q(max_model_len__gte=1), name="modelversion_len_positive"),
            models.CheckConstraint(
                condition=Q(source_kind__in=ModelSource.values), name="modelversion_source_kind_known"
            ),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.MODEL_VERSION, self.id)


class SloClass(models.Model):
    """A promise of speed that requests are scheduled and replicas counted by. The same for every tenant."""

    name = models.SlugField(primary_key=True, max_length=16)
    band = models.PositiveSmallIntegerField(
        unique=True, help_text="order in the fair queue, 0 is served first"
    )
    ttft_ms = models.PositiveIntegerField(help_text="target time to the first token")
    itl_ms = models.PositiveIntegerField(help_text="target time between tokens")
    deadline_s = models.PositiveIntegerField(help_text="target time to the last token")
    objective_ppm = models.PositiveIntegerField(
        default=990_000,
        db_default=990_000,
        help_text="millionths of the requests that must meet all targets",
    )

    def __str__(self) -> str:
        return self.name


class Admission(models.TextChoices):
    """When a request is refused although its limits allow it."""

    AUTO = "auto"  # as its class: predicted where somebody waits for the first word, else bounded
    PREDICTED = "predicted"  # when its target would probably be missed
    BOUNDED = "bounded"  # when the queue is full


class Phase(models.TextChoices):
    """Where a deployment stands, as its owner sees it. The autoscaler writes it."""

    PENDING = "pending"  # created, nothing decided yet
    IDLE = "idle"  # scaled to zero; a request wakes it
    STARTING = "starting"  # replicas are on their way, none is ready
    READY = "ready"  # at least one replica takes requests
    FAILED = "failed"  # replicas fail to start; last_error says why
    DELETED = "deleted"


def this_cell() -> str:
    """The cell of this control plane."""
    return str(settings.ENV.cell)


class Deployment(models.Model):
    """A model version served under a name, with its engine settings, its scale and its price.

    It lives in one cell, whose autoscaler scales it and whose gateways serve it. The same name in another cell is
    another deployment: a tenant spread over two cells has one in each.
    """

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="deployments")
    project = models.ForeignKey(
        Project, on_delete=models.PROTECT, related_name="deployments", db_constraint=False
    )
    name = models.CharField(
        max_length=64, validators=[check_name], help_text="the `model` that programs send to /v1"
    )
    cell = models.CharField(max_length=16, default=this_cell, help_text="where it is served")
    model_version = models.ForeignKey(
        ModelVersion, on_delete=models.PROTECT, related_name="deployments", db_constraint=False
    )
    engine_profile = models.JSONField(default=dict, help_text="see engine_profile.py")
    min_replicas = models.PositiveSmallIntegerField(default=0)
    max_replicas = models.PositiveSmallIntegerField(default=1)
    idle_timeout_s = models.PositiveIntegerField(
        default=300, help_text="idle this long, scale to min_replicas"
    )
    slo_class = models.ForeignKey(SloClass, on_delete=models.PROTECT, default="interactive")
    queue_order = models.CharField(
        max_length=8,
        choices=[(order.value, order.value) for order in QueueOrder],
        default=QueueOrder.EDF.value,
        db_default=QueueOrder.EDF.value,
        help_text="which request of a key goes first; between keys, projects and organizations fairness decides",
    )
    locality_window_tokens = models.PositiveIntegerField(
        default=2_000,
        db_default=2_000,
        help_text="prompt tokens by which a flow may get ahead so that a request goes where its prompt is cached",
    )
    admission = models.CharField(
        max_length=10,
        choices=Admission.choices,
        default=Admission.AUTO,
        db_default=Admission.AUTO.value,
        help_text="when a request is refused although its limits allow it",
    )
    price_version = models.ForeignKey("billing.PriceVersion", on_delete=models.PROTECT, related_name="+")
    phase = models.CharField(max_length=16, choices=Phase.choices, default=Phase.PENDING)
    last_error = models.CharField(max_length=500, blank=True)
    generation = models.PositiveBigIntegerField(
        default=1, help_text="grows with every change of what is wanted"
    )
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)
    deleted_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(
                fields=["project", "name", "cell"],
                condition=Q(deleted_at__isnull=True),
                name="deployment_name_unique",
            ),
            models.UniqueConstraint(fields=["organization", "id"], name="deployment_tenant_unique"),
            models.CheckConstraint(condition=Q(name__regex=NAME_SHAPE), name="deployment_name_shape"),
            models.CheckConstraint(
                condition=Q(max_replicas__gte=F("min_replicas")) & Q(max_replicas__gte=1),
                name="deployment_replica_range",
            ),
            models.CheckConstraint(condition=Q(generation__gte=1), name="deployment_generation_positive"),
            models.CheckConstraint(condition=Q(phase__in=Phase.values), name="deployment_phase_known"),
            models.CheckConstraint(
                condition=Q(queue_order__in=[order.value for order in QueueOrder]),
                name="deployment_queue_order_known",
            ),
            models.CheckConstraint(
                condition=Q(locality_window_tokens__lte=MAX_WINDOW_TOKENS), name="deployment_window_in_range"
            ),
            models.CheckConstraint(
                condition=Q(admission__in=Admission.values), name="deployment_admission_known"
            ),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(
                fields=["organization", "name"], condition=Q(deleted_at__isnull=True), name="deployment_live"
            ),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.DEPLOYMENT, self.id)

    @property
    def engine(self) -> Any:
        """`vllm` or `toy`."""
        return self.engine_profile["engine"]


class Grant(models.Model):
    """Leave for another project, or for every project of an organization, to call a deployment.

    The tenant is the deployment's owner; who was given leave may read the row. What the callers use counts against
    their own limits and is billed to them, at their own price of that name.
    """

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="grants_given")
    deployment = models.ForeignKey(
        Deployment, on_delete=models.PROTECT, related_name="grants", db_constraint=False
    )
    grantee = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="grants_held")
    project = models.ForeignKey(
        Project,
        null=True,
        blank=True,
        on_delete=models.PROTECT,
        related_name="+",
        db_constraint=False,
        help_text="only this project of the grantee; NULL: all of them",
    )
    name = models.CharField(
        max_length=64, validators=[check_name], help_text="the `model` that the grantee's programs send"
    )
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(
                fields=["deployment", "grantee", "project"], nulls_distinct=False, name="grant_unique"
            ),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["organization", "deployment"], name="grant_by_deployment"),
        ]

    def __str__(self) -> str:
        return self.name
