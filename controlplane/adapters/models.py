"""LoRA adapters: a tenant's own small weights on top of a deployment's model, served as `deployment:adapter`.

Fields and constraints; writes are in services.py, reads in selectors.py, how files come in is in receiving.py. An
adapter belongs to one project and one deployment of it, and to the very model version that it was checked against:
gateways do not see it while the deployment serves another one (migrations/0001_initial.py).
"""

from __future__ import annotations

import re
from typing import ClassVar, Final

from django.core.exceptions import ValidationError
from django.db import models
from django.db.models import Q

from controlplane import ids
from controlplane.deployments.models import Deployment
from controlplane.tenants.models import Organization, Project

NAME_SHAPE: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,47}$"
SEPARATOR: Final = ":"  # no deployment's name has one
MAX_MODEL_NAME: Final = 64  # of both names together: what usage is booked under


def check_name(name: str) -> None:
    """Refuse what programs could not send as the second half of a model id."""
    if not re.fullmatch(NAME_SHAPE, name):
        raise ValidationError(
            "use 1 to 48 letters, digits, dots, dashes and underscores, a letter or digit first"
        )


class AdapterState(models.TextChoices):
    """Where an adapter stands."""

    AWAITING = "awaiting_upload"  # registered; its files are not here yet
    CHECKING = "checking"
    READY = "ready"  # served
    REFUSED = "refused"  # its files are not what can be served; error says why
    RETIRED = "retired"


OPEN: Final = (AdapterState.AWAITING, AdapterState.CHECKING, AdapterState.READY)


class Adapter(models.Model):
    """One set of LoRA weights under a name. Its files never change: other files are another adapter."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="adapters")
    project = models.ForeignKey(
        Project, on_delete=models.PROTECT, related_name="adapters", db_constraint=False
    )
    deployment = models.ForeignKey(
        Deployment, on_delete=models.PROTECT, related_name="adapters", db_constraint=False
    )
    name = models.CharField(max_length=48, validators=[check_name])
    state = models.CharField(max_length=16, choices=AdapterState.choices, default=AdapterState.AWAITING)
    error_code = models.CharField(max_length=64, blank=True)
    error_message = models.CharField(max_length=500, blank=True)
    base_digest = models.CharField(max_length=64, help_text="of the model version it was made for")
    digest = models.CharField(max_length=64, blank=True, help_text="SHA-256 of its manifest, lower-case hex")
    source_uri = models.CharField(max_length=500, blank=True, help_text="where machines fetch it from")
    size_bytes = models.BigIntegerField(default=0)
    rank = models.PositiveSmallIntegerField(null=True, blank=True)
    modules = models.JSONField(default=list, blank=True, help_text="kinds of layers it changes")
    n_params = models.BigIntegerField(null=True, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    ready_at = models.DateTimeField(null=True, blank=True)
    retired_at = models.DateTimeField(null=True, blank=True)
    purged_at = models.DateTimeField(null=True, blank=True, help_text="its files are gone since")

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(
                fields=["deployment", "name"],
                condition=Q(state__in=[state.value for state in OPEN]),
                name="adapter_name_unique",
            ),
            models.UniqueConstraint(fields=["organization", "id"], name="adapter_tenant_unique"),
            models.CheckConstraint(condition=Q(name__regex=NAME_SHAPE), name="adapter_name_shape"),
            models.CheckConstraint(condition=Q(state__in=AdapterState.values), name="adapter_state_known"),
            models.CheckConstraint(
                condition=~Q(state="ready") | Q(digest__regex=r"^[0-9a-f]{64}$", rank__gte=1),
                name="adapter_ready_is_whole",
            ),
            models.CheckConstraint(condition=Q(size_bytes__gte=0), name="adapter_size_not_negative"),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["project"], condition=Q(state="ready"), name="adapter_served"),
            models.Index(fields=["digest"], name="adapter_digest"),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.ADAPTER, self.id)

    @property
    def model(self) -> str:
        """What programs send as `model`."""
        return f"{self.deployment.name}{SEPARATOR}{self.name}"
