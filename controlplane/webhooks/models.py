"""Who is told of what happens: endpoints, events (the outbox), and one delivery per event and receiver.

An event's row is written in the transaction of what happened (services.emit), so either both are there or neither.
Secrets are sealed (secretbox.py): they must be read again to sign.
"""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.db.models import Q

from controlplane import ids
from controlplane.tenants.models import Organization


class State(models.TextChoices):
    """How far a delivery is."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"  # given up


class Endpoint(models.Model):
    """A URL that is told of some kinds of events."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    url = models.CharField(max_length=2000)
    description = models.CharField(max_length=200, blank=True)
    events = models.JSONField(default=list, blank=True, help_text="names of kinds; empty = all")
    rotated_at = models.DateTimeField(null=True, blank=True, help_text="when its secret was replaced")
    disabled_at = models.DateTimeField(null=True, blank=True)
    disabled_reason = models.CharField(max_length=300, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["organization", "id"], name="webhookendpoint_tenant_unique"),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.WEBHOOK, self.id)


class EndpointState(models.Model):
    """What is no configuration of an endpoint, and so not in the audit log: its sealed secrets, and its health."""

    endpoint = models.OneToOneField(
        Endpoint, primary_key=True, on_delete=models.CASCADE, related_name="kept", db_constraint=False
    )
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    sealed_secret = models.BinaryField()
    sealed_secret_before = models.BinaryField(null=True)
    secret_before_until = models.DateTimeField(null=True, help_text="both secrets sign until then")
    failing_since = models.DateTimeField(null=True, help_text="first failure since something was delivered")

    def __str__(self) -> str:
        return str(self.endpoint_id)


class Event(models.Model):
    """Something that happened. `fence` keeps what may be noticed twice from being told twice."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    kind = models.CharField(max_length=40)
    data = models.JSONField()
    fence = models.CharField(max_length=120, null=True, blank=True)
    at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["organization", "id"], name="event_tenant_unique"),
            models.UniqueConstraint(
                fields=["organization", "fence"], name="event_once", condition=Q(fence__isnull=False)
            ),
        ]
        indexes: ClassVar[list[models.Index]] = [models.Index(fields=["at"], name="event_oldest")]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.EVENT, self.id)


class Delivery(models.Model):
    """One event for one receiver: an endpoint, or (endpoint NULL) an e-mail address."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    event = models.ForeignKey(Event, on_delete=models.CASCADE, related_name="deliveries", db_constraint=False)
    endpoint = models.ForeignKey(
        Endpoint, null=True, on_delete=models.CASCADE, related_name="deliveries", db_constraint=False
    )
    email = models.EmailField(blank=True)
    state = models.CharField(max_length=10, choices=State.choices, default=State.PENDING)
    n_attempts = models.PositiveIntegerField(default=0)
    next_at = models.DateTimeField(help_text="when to try, or until when somebody is at it")
    last_status = models.PositiveSmallIntegerField(null=True, help_text="of the latest answer")
    last_error = models.CharField(max_length=300, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    delivered_at = models.DateTimeField(null=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(
                fields=["event", "endpoint"], name="delivery_once", condition=Q(email="")
            ),
            models.UniqueConstraint(
                fields=["event", "email"], name="delivery_mail_once", condition=~Q(email="")
            ),
            models.CheckConstraint(
                condition=Q(endpoint__isnull=False, email="") | (Q(endpoint__isnull=True) & ~Q(email="")),
                name="delivery_one_receiver",
            ),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["next_at"], name="delivery_due", condition=Q(state="pending")),
            models.Index(fields=["endpoint", "-id"], name="delivery_of_endpoint"),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.DELIVERY, self.id)
