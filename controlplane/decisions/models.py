"""What gateways decided about requests, and why: always where they refused, sampled where they admitted.

Written by intake.py, pruned by age and per tenant. Never holds a prompt, an answer or a key.
"""

from typing import ClassVar

from django.db import models

from controlplane import ids
from controlplane.tenants.models import Organization


class Outcome(models.TextChoices):
    """What became of a request at admission."""

    BOUND = "bound"  # a replica had a free slot
    QUEUED = "queued"  # it waits for one
    REFUSED = "refused"


class RequestDecision(models.Model):
    """One decision about one request. No foreign keys: it outlives what it names."""

    id = models.BigAutoField(primary_key=True)
    organization = models.ForeignKey(
        Organization, on_delete=models.DO_NOTHING, db_constraint=False, db_index=False, related_name="+"
    )
    request_id = models.UUIDField()
    project_id = models.UUIDField()
    api_key_id = models.UUIDField()
    deployment_id = models.UUIDField(null=True)
    model = models.CharField(max_length=64, blank=True)
    outcome = models.CharField(max_length=8, choices=Outcome.choices)
    code = models.CharField(max_length=40, blank=True, help_text="of the refusal")
    status = models.PositiveSmallIntegerField(help_text="HTTP status; 0 where it was admitted")
    slo_class = models.CharField(max_length=16, blank=True)
    at = models.DateTimeField()
    facts = models.JSONField(default=dict, help_text="inputs, predictions, alternatives: see facts.py")

    class Meta:
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["organization", "-id"], name="requestdecision_newest"),
            models.Index(fields=["organization", "request_id"], name="requestdecision_by_request"),
            models.Index(fields=["at"], name="requestdecision_oldest"),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.REQUEST, self.request_id)


class DecisionMark(models.Model):
    """How far a cell's stream of decisions is read: written with what was read, so that nothing counts twice."""

    cell = models.CharField(primary_key=True, max_length=16)
    entry_id = models.CharField(max_length=40)
