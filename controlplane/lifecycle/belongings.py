"""Everything that belongs to an organization, row by row, as JSON and without secrets: what an export consists of.

Walks the models, so that a table added tomorrow is in it. Called by exports.py and `manage.py export_organization`, as
operator or inside the tenant. Reads only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final
from uuid import UUID

from django.apps import apps
from django.core.serializers.json import DjangoJSONEncoder
from django.db import models

from controlplane.tenants.models import Member, Organization, User

# What lets somebody act, or check a guess. Of binary columns none is told.
_SECRET_WORDS: Final = ("secret", "password", "digest", "lookup", "hash", "proof", "recovery")
# Answers kept sealed for their callers, and exports themselves.
_LEFT_OUT: Final = {"tenants.IdempotentWrite", "lifecycle.Export", "lifecycle.ExportPart"}
_PERSON: Final = ("id", "email", "name", "created_at", "last_login")


def kinds() -> list[type[models.Model]]:
    """Models whose rows belong to an organization, in a fixed order: the organization, its people, then the rest."""
    tenants = [
        model
        for model in apps.get_models()
        if model._meta.managed
        and model._meta.label not in _LEFT_OUT
        and any(
            f.name == "organization" and f.related_model is Organization for f in model._meta.concrete_fields
        )
    ]
    return [Organization, User, *sorted(tenants, key=lambda model: model._meta.label)]


def fields_of(model: type[models.Model]) -> list[str]:
    """Columns that are told, by attribute name."""
    if model is User:
        return list(_PERSON)
    return [
        field.attname
        for field in model._meta.concrete_fields
        if not isinstance(field, (models.BinaryField, models.CompositePrimaryKey))
        and not any(word in field.name for word in _SECRET_WORDS)
    ]


def rows(
    model: type[models.Model], organization_id: UUID, after: list[str] | None = None, limit: int | None = None
) -> Iterator[tuple[list[str], str]]:
    """(where the next call goes on, one JSON line) of one kind, ordered by key."""
    found: Any = model._default_manager.all()
    if model is Organization:
        found = found.filter(id=organization_id)
    elif model is User:
        found = found.filter(id__in=Member.objects.filter(organization_id=organization_id).values("user_id"))
    else:
        found = found.filter(organization_id=organization_id)
    keys = _key_fields(model)
    if after is not None:
        values = tuple(field.to_python(text) for field, text in zip(keys, after, strict=True))
        found = found.filter(pk__gt=values if len(values) > 1 else values[0])
    names = fields_of(model)
    wanted = list(dict.fromkeys([*names, *(field.attname for field in keys)]))
    found = found.order_by(*(field.attname for field in keys)).values(*wanted)
    for row in found[:limit] if limit is not None else found.iterator(chunk_size=1000):
        line = {"table": model._meta.label, "row": {name: row[name] for name in names}}
        position = [str(row[field.attname]) for field in keys]
        yield position, json.dumps(line, cls=DjangoJSONEncoder, ensure_ascii=False)


def _key_fields(model: type[models.Model]) -> list[Any]:
    pk: Any = model._meta.pk
    return list(pk.fields) if isinstance(pk, models.CompositePrimaryKey) else [pk]


def everything(organization_id: UUID) -> Iterator[str]:
    """Every line of every kind."""
    for model in kinds():
        for _, line in rows(model, organization_id):
            yield line
