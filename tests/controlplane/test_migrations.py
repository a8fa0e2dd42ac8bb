"""Migrations let the version before go on: it writes rows without new columns, and reads the old ones.

Rules for every migration since the last release (docs/operations.md, "Another version"): tables and columns are only
added; a new column is nullable or has a default in the database, since the version before inserts without it.
"""

from __future__ import annotations

import json
from pathlib import Path

from django.db import models
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.operations import (
    AddField,
    CreateModel,
    DeleteModel,
    RemoveField,
    RenameField,
    RenameModel,
)
from django.db.migrations.operations.base import Operation

RELEASED = Path(__file__).with_name("migrations_before.json")
ROOMS = {"autoscaler", "billing", "controlplane"}


def test_migrations_since_the_last_release_only_add() -> None:
    before = {tuple(name) for name in json.loads(RELEASED.read_text())}
    known = MigrationLoader(None).disk_migrations.items()
    ours = {key: found for key, found in known if found.__module__.split(".")[0] in ROOMS}
    assert before <= set(ours), f"migrations of the last release are gone: {before - set(ours)}"
    new = {key: ours[key] for key in sorted(set(ours) - before)}
    tables = {
        (key[0], operation.name_lower)
        for key, migration in new.items()
        for operation in migration.operations
        if isinstance(operation, CreateModel)
    }
    wrong = [
        f"{'.'.join(key)}: {complaint}"
        for key, migration in new.items()
        for operation in migration.operations
        if (key[0], getattr(operation, "model_name_lower", "")) not in tables  # nobody else knows these yet
        and (complaint := complaint_about(operation))
    ]
    assert not wrong, "\n".join(wrong)


def complaint_about(operation: Operation) -> str:
    """What the version before would trip over; '' where it would not. SQL of our own is not looked into."""
    if isinstance(operation, RemoveField | RenameField | DeleteModel | RenameModel):
        return f"{type(operation).__name__}: the version before still uses it; do it one release later"
    if isinstance(operation, AddField):
        field = operation.field
        if not (field.null or field.many_to_many or field.has_db_default()):
            name = f"{operation.model_name}.{operation.name}"
            return f"AddField {name}: null=True or db_default=, or the version before cannot insert"
    return ""


def test_the_rule_finds_what_breaks_the_version_before() -> None:
    assert "db_default" in complaint_about(AddField("m", "f", models.TextField(default="")))
    assert complaint_about(AddField("m", "f", models.TextField(default="", db_default=""))) == ""
    assert complaint_about(AddField("m", "f", models.TextField(null=True))) == ""
    assert "one release later" in complaint_about(RemoveField("m", "f"))
