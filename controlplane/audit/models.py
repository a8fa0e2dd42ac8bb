"""What was changed, by whom: entries that triggers write, and the chain that seals them.

No code of ours writes an entry: a trigger on every audited table does, in the transaction of the change, so that bulk
updates and raw SQL are in the log too (migrations/0001). Nobody changes or deletes an entry: triggers refuse, whatever
the role. Whoever takes the triggers away breaks the chain (sealing.py). One exception: when an organization is erased
its entries are redacted, and keep the digest of what they said.
"""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.db.models.functions import Now

from controlplane.tenants.models import Organization


class Entry(models.Model):
    """One change of one row. `changes` maps a field to [before, after]; secrets and their digests are left out."""

    id = models.BigAutoField(primary_key=True)
    organization = models.ForeignKey(
        Organization, on_delete=models.PROTECT, related_name="+", db_constraint=False
    )
    at = models.DateTimeField(db_default=Now())
    actor = models.CharField(max_length=64, help_text="tok_…, usr_…, or the database role")
    action = models.CharField(max_length=8, help_text="create, update or delete")
    kind = models.CharField(max_length=40, help_text="what was changed, for example project")
    thing = models.UUIDField(help_text="its id")
    changes = models.JSONField()
    salt = models.UUIDField(
        null=True, editable=False, help_text="random, in the digest; taken away by a redaction"
    )
    redacted = models.BinaryField(
        max_length=32,
        null=True,
        help_text="digest of what it said, once that was erased (lifecycle/erasure.py)",
    )

    class Meta:
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["organization", "-id"], name="auditentry_newest"),
        ]

    def __str__(self) -> str:
        return f"{self.action} {self.kind} {self.thing.hex}"


class Seal(models.Model):
    """Link `n` of an organization's chain: the hash of the link before and of one entry."""

    id = models.BigAutoField(primary_key=True)
    organization = models.ForeignKey(
        Organization, on_delete=models.PROTECT, related_name="+", db_constraint=False
    )
    n = models.PositiveBigIntegerField()
    entry = models.OneToOneField(Entry, on_delete=models.PROTECT, db_constraint=False, related_name="seal")
    hash = models.BinaryField(max_length=32)
    sealed_at = models.DateTimeField(db_default=Now())

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["organization", "n"], name="auditseal_unique"),
        ]

    def __str__(self) -> str:
        return f"{self.organization_id.hex}:{self.n}"
