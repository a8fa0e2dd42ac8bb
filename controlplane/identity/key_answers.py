"""Forms that take a security key's answer: what is none is refused like a wrong one.

The library that reads answers raises what it happens to stumble over (a missing field, a length, no CBOR) and its forms
let that through, as a 500. Named in settings.MFA_FORMS.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import wraps
from typing import Any, Final

from allauth.mfa.adapter import get_adapter
from allauth.mfa.webauthn.forms import AddWebAuthnForm, AuthenticateWebAuthnForm, ReauthenticateWebAuthnForm

_STUMBLES: Final = (
    KeyError,
    IndexError,
    TypeError,
    ValueError,  # of base64, UTF-8 and points that are not on the curve, too
    AttributeError,
    NotImplementedError,
    struct.error,
)


def _or_refused(read: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(read)
    def reading(self: Any) -> Any:
        try:
            return read(self)
        except _STUMBLES as error:
            raise get_adapter().validation_error("incorrect_code") from error

    return reading


class AddKeyForm(AddWebAuthnForm):  # type: ignore[misc]
    clean = _or_refused(AddWebAuthnForm.clean)


class UseKeyForm(AuthenticateWebAuthnForm):  # type: ignore[misc]
    clean_credential = _or_refused(AuthenticateWebAuthnForm.clean_credential)


class UseKeyAgainForm(ReauthenticateWebAuthnForm):  # type: ignore[misc]
    clean_credential = _or_refused(ReauthenticateWebAuthnForm.clean_credential)
