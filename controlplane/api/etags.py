"""Entity tags: a digest of what a resource looks like, so that a change made meanwhile is noticed (RFC 9110, 13)."""

from __future__ import annotations

import hashlib

from ninja import Schema


def etag_of(resource: Schema) -> str:
    """A strong tag: equal for equal representations, whoever asks.

    A schema's `etag_leaves_out` names fields that move by themselves, such as what was spent: they are no change.
    """
    moving = getattr(type(resource), "etag_leaves_out", None)
    return f'"{hashlib.sha256(resource.model_dump_json(exclude=moving).encode()).hexdigest()[:32]}"'


def matches(header: str, etag: str) -> bool:
    """Whether an If-Match or If-None-Match header names this tag. Weak tags never match, `*` always does."""
    return header.strip() == "*" or etag in (part.strip() for part in header.split(","))
