"""Lists in pages: newest first, from a cursor on. Ids are UUIDv7 or counted, so their order is that of creation."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Annotated, Final, Generic, TypeVar

from django.core.exceptions import ValidationError
from django.db.models import Model, QuerySet
from ninja import Field, Schema

from controlplane.errors import InvalidInputError

DEFAULT_LIMIT: Final = 50
MAX_LIMIT: Final = 200
MAX_DIGITS: Final = 18  # of a counted id: what the database can hold

T = TypeVar("T")
Row = TypeVar("Row", bound=Model)


class Page(Schema, Generic[T]):
    """One page of a list."""

    data: list[T]
    next_cursor: str | None = Field(description="Pass it as `cursor` for the next page; null on the last")


class PageQuery(Schema):
    """Which page."""

    limit: Annotated[int, Field(ge=1, le=MAX_LIMIT)] = DEFAULT_LIMIT
    cursor: str | None = Field(None, max_length=64, description="`next_cursor` of the page before")


def matching(rows: QuerySet[Row], **wanted: object) -> QuerySet[Row]:
    """Those whose fields are as a query wants them; None wants nothing of a field."""
    return rows.filter(**{field: value for field, value in wanted.items() if value is not None})


def page(rows: QuerySet[Row], query: PageQuery, out: Callable[[Row], T]) -> Page[T]:
    """The rows after the cursor. `rows` are scoped by their tenant already. Raises InvalidInputError (cursor)."""
    if query.cursor is not None:
        rows = rows.filter(pk__lt=_decode(query.cursor, rows.model))
    found = list(rows.order_by("-pk")[: query.limit + 1])
    shown = found[: query.limit]
    cursor = _encode(shown[-1].pk) if len(found) > query.limit else None
    return Page[T](data=[out(row) for row in shown], next_cursor=cursor)


def _encode(last: object) -> str:
    return base64.urlsafe_b64encode(str(last).encode()).decode().rstrip("=")


def _decode(cursor: str, model: type[Model]) -> object:
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
        if text.isdigit() and len(text) > MAX_DIGITS:
            raise ValueError("no id has so many digits")
        return model._meta.pk.to_python(text)
    except (ValueError, binascii.Error, ValidationError):
        raise InvalidInputError("cursor: not one that a page gave", field="cursor") from None
