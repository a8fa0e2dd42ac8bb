"""The chain of each organization's audit entries: sealed by a task, verified by a command.

Link n holds SHA-256(link n-1 || SHA-256(entry)). Entries are sealed once their transaction can have no earlier sibling
still running, so writers never wait for each other or for the chain. What was changed, deleted or slipped in afterwards
is found by verifying; a chain rewritten as a whole is found by whoever kept an earlier head.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC
from typing import Final
from uuid import UUID

from django.db import connection, transaction

from controlplane.audit.models import Entry, Seal

GENESIS: Final = bytes(32)
BATCH: Final = 1000  # entries sealed a run and organization
ERASURE: Final = "erasure"  # kind of the entries that tell of an erasure


@dataclass(frozen=True, slots=True)
class Verdict:
    """What verifying a chain found. `problem` empty: the log is whole up to `n_sealed`."""

    organization_id: UUID
    n_sealed: int
    n_unsealed: int
    head: str
    problem: str
    n_redacted: int = 0


def digest_of(entry: Entry) -> bytes:
    """Over every column, in a form that does not depend on who reads it. Of a redacted entry: as it was before."""
    if entry.redacted is not None:
        return bytes(entry.redacted)
    facts: dict[str, object] = {
        "id": entry.pk,
        "organization": entry.organization_id.hex,
        "at": entry.at.astimezone(UTC).isoformat(),
        "actor": entry.actor,
        "action": entry.action,
        "kind": entry.kind,
        "thing": entry.thing.hex,
        "changes": entry.changes,
    }
    if entry.salt is not None:  # so that nobody can check a guess of what a redacted entry said
        facts["salt"] = entry.salt.hex
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).digest()


def link(before: bytes, entry: Entry) -> bytes:
    return hashlib.sha256(before + digest_of(entry)).digest()


def seal(organization_id: UUID) -> int:
    """Seal what is not sealed yet, at most BATCH entries; how many were. One sealer of an organization at a time."""
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT pg_try_advisory_xact_lock(hashtextextended('audit' || %s, 0))", [organization_id.hex]
            )
            if not cursor.fetchone()[0]:
                return 0
        last = Seal.objects.filter(organization_id=organization_id).order_by("-n").first()
        n, head = (last.n, bytes(last.hash)) if last else (0, GENESIS)
        links = []
        for entry in _settled(organization_id):
            n, head = n + 1, link(head, entry)
            links.append(Seal(organization_id=organization_id, n=n, entry=entry, hash=head))
        Seal.objects.bulk_create(links)
    return len(links)


def unsealed_organizations(limit: int) -> list[UUID]:
    """Those with something to seal."""
    rows = Entry.objects.filter(seal=None).values_list("organization_id", flat=True).distinct()
    return list(rows[:limit])


def verify(organization_id: UUID) -> Verdict:
    """Walk the whole chain. Needs the operator role, or the tenant."""
    n, head, problem, n_redacted = 0, GENESIS, "", 0
    seals = Seal.objects.filter(organization_id=organization_id).order_by("n")
    for seal_row in seals.iterator(chunk_size=2000):
        entry = Entry.objects.filter(pk=seal_row.entry_id, organization_id=organization_id).first()
        n += 1
        if seal_row.n != n:
            problem = f"link {n} is missing"
        elif entry is None:
            problem = f"entry {seal_row.entry_id} of link {n} was deleted"
        elif link(head, entry) != bytes(seal_row.hash):
            problem = f"entry {entry.pk} of link {n} was changed, or the link was"
        elif entry.redacted is not None and entry.changes:
            problem = f"entry {entry.pk} of link {n} was redacted and says something again"
        if problem:
            break
        n_redacted += entry is not None and entry.redacted is not None
        head = bytes(seal_row.hash)
    if n_redacted and not problem and not _erasure_is_in_it(organization_id):
        problem = f"{n_redacted} entries are redacted, and the log has no erasure"
    n_unsealed = Entry.objects.filter(organization_id=organization_id, seal=None).count()
    return Verdict(organization_id, n, n_unsealed, head.hex(), problem, n_redacted)


def has_unsealed(organization_id: UUID) -> bool:
    return Entry.objects.filter(organization_id=organization_id, seal=None).exists()


def redactable(organization_id: UUID) -> list[Entry]:
    """Sealed entries that still say something, at most BATCH; those of the erasure itself stay."""
    rows = Entry.objects.filter(organization_id=organization_id, redacted=None, seal__isnull=False)
    return list(rows.exclude(kind=ERASURE).order_by("pk")[:BATCH])


def export(organization_id: UUID) -> Iterator[dict[str, object]]:
    """Every entry with its link, oldest first, as JSON."""
    rows = Entry.objects.filter(organization_id=organization_id).select_related("seal").order_by("pk")
    for entry in rows.iterator(chunk_size=2000):
        found: Seal | None = getattr(entry, "seal", None)
        yield {
            "id": entry.pk,
            "at": entry.at.astimezone(UTC).isoformat(),
            "actor": entry.actor,
            "action": entry.action,
            "kind": entry.kind,
            "thing": entry.thing.hex,
            "changes": entry.changes,
            "redacted": entry.redacted is not None,
            "n": found.n if found else None,
            "hash": bytes(found.hash).hex() if found else None,
        }


def _erasure_is_in_it(organization_id: UUID) -> bool:
    return Entry.objects.filter(organization_id=organization_id, kind=ERASURE, redacted=None).exists()


def _settled(organization_id: UUID) -> list[Entry]:
    """Unsealed entries whose transaction is older than every one that still runs, oldest first."""
    return list(
        Entry.objects.raw(
            "SELECT e.* FROM audit_entry e LEFT JOIN audit_seal s ON s.entry_id = e.id "
            "WHERE e.organization_id = %s AND s.id IS NULL AND e.xid < pg_snapshot_xmin(pg_current_snapshot()) "
            "ORDER BY e.id LIMIT %s",
            [organization_id, BATCH],
        )
    )
