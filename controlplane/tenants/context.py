"""The tenant of a transaction: everything inside `tenant(organization_id)` sees that organization's rows
only.

The setting is transaction-local, so it works behind a pooler in transaction mode and cannot leak to whoever
gets the connection next. Used by services, selectors' callers, tasks and TenantMiddleware.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from django.db import DEFAULT_DB_ALIAS, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

_ATTRIBUTE = "corral_tenant"


class TenantMismatchError(RuntimeError):
    """Code of one tenant tried to enter another one: a bug of ours, never the caller's input."""


@contextmanager
def tenant(organization_id: UUID, using: str = DEFAULT_DB_ALIAS) -> Iterator[None]:
    """A transaction in which row-level security shows the rows of this organization.

    Nesting the same tenant is fine and opens a savepoint, as `atomic` does; another tenant raises
    TenantMismatchError, because the setting could not be true of both halves of one transaction.
    """
    connection = connections[using]
    entered: UUID | None = getattr(connection, _ATTRIBUTE, None)
    if entered is not None and entered != organization_id:
        raise TenantMismatchError(f"in tenant {entered}, asked to enter {organization_id}")
    inside_callers_transaction = connection.in_atomic_block
    with transaction.atomic(using=using):
        if entered is not None:
            yield
            return
        _set(connection, str(organization_id))
        setattr(connection, _ATTRIBUTE, organization_id)
        try:
            yield
            if inside_callers_transaction and not connection.needs_rollback:
                # That transaction goes on, so the setting must end here. In our own it ends with the commit,
                # and after an error with the rollback, to the savepoint or of everything.
                _set(connection, "")
        finally:
            setattr(connection, _ATTRIBUTE, None)


def current_tenant(using: str = DEFAULT_DB_ALIAS) -> UUID | None:
    """The organization whose block we are in, or None."""
    return getattr(connections[using], _ATTRIBUTE, None)


def _set(connection: BaseDatabaseWrapper, value: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT set_config('corral.organization_id', %s, true)", [value])
