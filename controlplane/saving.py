"""Saving a model instance with its rules turned into errors a caller can act on.

Used by services. Field rules become InvalidInputError naming the field; a violated uniqueness constraint
becomes ConflictError. Anything else the database refuses is a bug of ours and passes through.
"""

from collections.abc import Mapping

from django.core.exceptions import NON_FIELD_ERRORS, ValidationError
from django.db import IntegrityError, models, transaction

from controlplane.errors import ConflictError, InvalidInputError


def check_fields(instance: models.Model) -> None:
    """Raise InvalidInputError for the first field that breaks a rule of its own (length, choices, shape)."""
    relations = {field.name for field in instance._meta.fields if field.is_relation}
    try:
        instance.full_clean(exclude=relations, validate_unique=False, validate_constraints=False)
    except ValidationError as error:
        name, messages = next(iter(error.message_dict.items()))
        field = None if name == NON_FIELD_ERRORS else name
        raise InvalidInputError(f"{name}: {' '.join(messages)}", field=field) from error


def insert(instance: models.Model, *, taken: Mapping[str, tuple[str, str]]) -> None:
    """Check and insert. `taken` maps a uniqueness constraint to the (field, sentence) of the conflict."""
    _save(instance, taken, is_new=True)


def update(instance: models.Model, *, taken: Mapping[str, tuple[str, str]]) -> None:
    """Check and write all fields of a row that exists; conflicts as `insert` has them."""
    _save(instance, taken, is_new=False)


def _save(instance: models.Model, taken: Mapping[str, tuple[str, str]], *, is_new: bool) -> None:
    check_fields(instance)
    try:
        with transaction.atomic():  # a savepoint: the caller's transaction survives the conflict
            instance.save(force_insert=is_new, force_update=not is_new)
    except IntegrityError as error:
        diagnosis = getattr(error.__cause__, "diag", None)
        conflict = taken.get(getattr(diagnosis, "constraint_name", None) or "")
        if conflict is None:
            raise
        field, message = conflict
        raise ConflictError(message, field=field) from error
