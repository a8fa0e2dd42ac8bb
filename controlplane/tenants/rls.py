"""Migration operations for row-level security, grants and same-tenant foreign keys.

Used by the migrations of every app. The rules: a table with a tenant column gets EnableRLS; any other table
that a serving role needs gets Grant; a reference from one tenant table to another gets SameTenant, because
the check of an ordinary foreign key ignores row-level security and would accept another tenant's row. Row
security is not forced on the owner: migrations and SECURITY DEFINER functions run as corral_owner.
"""

from typing import Any

from django.db.backends.base.schema import BaseDatabaseSchemaEditor
from django.db.migrations.operations.base import Operation
from django.db.migrations.state import ProjectState

APP, OPERATOR = "corral_app", "corral_operator"
ALL = "SELECT, INSERT, UPDATE, DELETE"
# The tenant of the transaction, set by context.tenant(); NULL without one, and NULL equals nothing.
TENANT = "nullif(current_setting('corral.organization_id', true), '')::uuid"


def _grants(table: str, app: str, operator: str) -> list[str]:
    pairs = ((APP, app), (OPERATOR, operator))
    return [f'GRANT {rights} ON "{table}" TO {role}' for role, rights in pairs if rights]


class _TableOperation(Operation):
    """SQL about the table of one model; changes no model state."""

    reduces_to_sql = True
    reversible = True

    def state_forwards(self, app_label: str, state: ProjectState) -> None:
        pass

    @staticmethod
    def _model(app_label: str, name: str, state: ProjectState) -> Any:
        return state.apps.get_model(app_label, name)

    def statements(self, model: Any) -> list[str]:
        raise NotImplementedError

    def undo_statements(self, model: Any) -> list[str]:
        raise NotImplementedError

    model_name: str
    app_label: str | None = None

    def database_forwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        for statement in self.statements(self._model(self.app_label or app_label, self.model_name, to_state)):
            schema_editor.execute(statement, params=None)

    def database_backwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        for statement in self.undo_statements(
            self._model(self.app_label or app_label, self.model_name, from_state)
        ):
            schema_editor.execute(statement, params=None)


class EnableRLS(_TableOperation):
    """Tenant table: the app role sees the rows of the transaction's tenant, the operator role sees all.

    `app` and `operator` are the rights granted. `shared_rows` lets the app role also read rows whose tenant
    is NULL (a global catalogue with tenants' own entries beside it).
    """

    def __init__(
        self,
        model_name: str,
        *,
        column: str = "organization_id",
        app: str = ALL,
        operator: str = ALL,
        shared_rows: bool = False,
    ) -> None:
        self.model_name = model_name
        self.column = column
        self.app = app
        self.operator = operator
        self.shared_rows = shared_rows

    def statements(self, model: Any) -> list[str]:
        table = model._meta.db_table
        mine = f'"{self.column}" = {TENANT}'
        statements = [
            f'ALTER TABLE "{table}" ENABLE ROW LEVEL SECURITY',
            f'CREATE POLICY tenant ON "{table}" TO {APP} USING ({mine}) WITH CHECK ({mine})',
            f'CREATE POLICY operator ON "{table}" TO {OPERATOR} USING (true) WITH CHECK (true)',
        ]
        if self.shared_rows:
            statements.append(
                f'CREATE POLICY shared ON "{table}" FOR SELECT TO {APP} USING ("{self.column}" IS NULL)'
            )
        return statements + _grants(table, self.app, self.operator)

    def undo_statements(self, model: Any) -> list[str]:
        table = model._meta.db_table
        policies = ["tenant", "operator", *(["shared"] if self.shared_rows else [])]
        return [
            *(f'DROP POLICY {policy} ON "{table}"' for policy in policies),
            f'ALTER TABLE "{table}" DISABLE ROW LEVEL SECURITY',
            f'REVOKE ALL ON "{table}" FROM {APP}, {OPERATOR}',
        ]

    def describe(self) -> str:
        return f"Isolate the tenants in {self.model_name}"


class Grant(_TableOperation):
    """Table without a tenant column: the rights of each role, none by default."""

    def __init__(
        self, model_name: str, *, app_label: str | None = None, app: str = "", operator: str = ""
    ) -> None:
        self.model_name = model_name
        self.app_label = app_label  # where it is not the app of the migration
        self.app = app
        self.operator = operator

    def statements(self, model: Any) -> list[str]:
        return _grants(model._meta.db_table, self.app, self.operator)

    def undo_statements(self, model: Any) -> list[str]:
        return [f'REVOKE ALL ON "{model._meta.db_table}" FROM {APP}, {OPERATOR}']

    def describe(self) -> str:
        return (
            f"Grant {self.model_name} to app: {self.app or 'nothing'}; operator: {self.operator or 'nothing'}"
        )


class SameTenant(_TableOperation):
    """`field` must point at a row of the same tenant: a composite foreign key (organization_id, field).

    The Django field has db_constraint=False, this constraint replaces its own; the target needs a unique
    constraint over (organization, id). Deferred to commit, like Django's foreign keys.
    """

    def __init__(self, model_name: str, field: str) -> None:
        self.model_name = model_name
        self.field = field

    def statements(self, model: Any) -> list[str]:
        field = model._meta.get_field(self.field)
        target = field.related_model._meta.db_table
        return [
            f'ALTER TABLE "{model._meta.db_table}" ADD CONSTRAINT "{self._constraint(model)}" '
            f'FOREIGN KEY (organization_id, "{field.column}") REFERENCES "{target}" (organization_id, id) '
            "DEFERRABLE INITIALLY DEFERRED"
        ]

    def undo_statements(self, model: Any) -> list[str]:
        return [f'ALTER TABLE "{model._meta.db_table}" DROP CONSTRAINT "{self._constraint(model)}"']

    def _constraint(self, model: Any) -> str:
        return f"{model._meta.db_table}_{self.field}_same_tenant"

    def describe(self) -> str:
        return f"Keep {self.model_name} and its {self.field} in one tenant"


class RunStatements(Operation):
    """Raw SQL that may hold several statements and `%` signs (functions, triggers)."""

    reduces_to_sql = True
    reversible = True

    def __init__(self, forwards: str, backwards: str, *, what: str) -> None:
        self.forwards = forwards
        self.backwards = backwards
        self.what = what

    def state_forwards(self, app_label: str, state: ProjectState) -> None:
        pass

    def database_forwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        schema_editor.execute(self.forwards, params=None)

    def database_backwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        schema_editor.execute(self.backwards, params=None)

    def describe(self) -> str:
        return self.what


class EditFunction(Operation):
    """Replace a part of a SQL function as it is by then, so that migrations that change different parts of one may come
    in any order. The part must be there exactly once.
    """

    reduces_to_sql = False
    reversible = True

    def __init__(self, signature: str, before: str, after: str, *, what: str) -> None:
        self.signature = signature
        self.before = before
        self.after = after
        self.what = what

    def state_forwards(self, app_label: str, state: ProjectState) -> None:
        pass

    def database_forwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        self._edit(schema_editor, self.before, self.after)

    def database_backwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        self._edit(schema_editor, self.after, self.before)

    def _edit(self, schema_editor: BaseDatabaseSchemaEditor, before: str, after: str) -> None:
        with schema_editor.connection.cursor() as cursor:
            cursor.execute("SELECT pg_get_functiondef(%s::regprocedure)", [self.signature])
            (source,) = cursor.fetchone()
        if source.count(before) != 1:
            raise ValueError(f"{self.signature} has {before!r} {source.count(before)} times, not once")
        schema_editor.execute(source.replace(before, after), params=None)

    def describe(self) -> str:
        return self.what
