"""`manage.py permissions`: which role may do what, as Markdown. docs/permissions.md is its output."""

from typing import Any

from django.core.management.base import BaseCommand

from controlplane.tenants.models import Role
from controlplane.tenants.rights import Permission, may


def table() -> str:
    """The whole page."""
    roles = list(Role)
    lines = [
        "# Permissions",
        "",
        "Written by `manage.py permissions`. A member or service account has a role; a management token can be bound "
        "to fewer permissions (its scopes). The same words stand in refusals and in the OpenAPI document "
        "(`x-corral-permission`).",
        "",
        "| permission | allows to | " + " | ".join(role.value for role in roles) + " |",
        "|---|---|" + ":-:|" * len(roles),
    ]
    for permission in Permission:
        marks = ["yes" if may(role, permission) else "" for role in roles]
        lines.append(f"| `{permission.value}` | {permission.sentence} | " + " | ".join(marks) + " |")
    return "\n".join(lines) + "\n"


class Command(BaseCommand):
    help = "Prints which role may do what, as Markdown."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def handle(self, *args: Any, **options: Any) -> None:
        self.stdout.write(table(), ending="")
