"""What can go wrong, with the exit status that says it to scripts (docs/cli.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click


class Failure(click.ClickException):
    """A sentence for people; `exit_code` for scripts. 1: refused, or wrong input."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click declares it for the class

    def show(self, file: Any = None) -> None:
        click.echo(f"{click.style('error:', fg='red', bold=True)} {self.format_message()}", err=True)


class NotReachable(Failure):
    """3: no answer, or an answer that says to come back later."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 3)


class NotSignedIn(Failure):
    """4: no token, or one that is no good."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 4)


class Refused(Failure):
    """A problem of the API (RFC 9457), told as it came. `errors` are the fields at fault."""

    def __init__(
        self, status: int, code: str, detail: str, errors: Sequence[tuple[str, str]], request_id: str
    ) -> None:
        self.status, self.code, self.detail = status, code, detail
        self.errors, self.request_id = errors, request_id
        lines = [detail]
        # The detail often says what the only field at fault says.
        lines += [f"  {field}: {message}" for field, message in errors if message not in detail]
        if status >= 500:
            lines.append(f"  quote {request_id} when you ask for help")
        super().__init__("\n".join(lines), {401: 4, 429: 3}.get(status, 3 if status >= 500 else 1))
