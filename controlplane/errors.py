"""Errors a caller can act on: each has a code, a sentence and a status, and names the field at fault.

Services raise them, surfaces (API, console) render them. Nothing here knows HTTP beyond the status number.
"""


class CorralError(Exception):
    """Base of every refusal. `code` is stable and machine-readable, `message` is for people."""

    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        if code is not None:
            self.code = code


class InvalidInputError(CorralError):
    """A value is out of range or of the wrong kind; `field` names it and the message says the remedy."""

    status = 400
    code = "invalid_input"


class NotPermittedError(CorralError):
    """The caller is known but its role does not allow this."""

    status = 403
    code = "not_permitted"


class SuspendedError(CorralError):
    """The organization is suspended: it may look (in the console), and change nothing."""

    status = 403
    code = "organization_suspended"


class NotFoundError(CorralError):
    """No such thing in this tenant. A thing of another tenant looks exactly like one that never was."""

    status = 404
    code = "not_found"


class ConflictError(CorralError):
    """The name is taken, or the thing changed since it was read."""

    status = 409
    code = "conflict"
