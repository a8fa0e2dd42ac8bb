"""Names of commands: equal inputs, equal name, so that an order given twice is carried out once. Pure."""

from uuid import UUID, uuid5

_NAMESPACE = UUID("0199c3f5-5d5a-7c1e-9a52-6f0d2c1b7e44")  # any fixed value; changing it forgets past orders


def command_id(*parts: object) -> str:
    """32 hex digits that depend on the parts alone."""
    return uuid5(_NAMESPACE, "/".join(map(str, parts))).hex
