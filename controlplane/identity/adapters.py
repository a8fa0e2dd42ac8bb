"""What allauth asks us: how accounts, second factors and identity providers work here.

allauth owns the flows (stages of a sign-in, reset links, TOTP, OAuth, SAML); it calls these classes at the points where
the answer is ours. Views and pages are the console's.
"""

from __future__ import annotations

import time
from smtplib import SMTPException
from typing import Any, Final

import structlog
from allauth.account.adapter import DefaultAccountAdapter
from allauth.account.internal.flows.login import get_authentication_records
from allauth.core import context
from allauth.mfa.adapter import DefaultMFAAdapter
from allauth.mfa.base.forms import AuthenticateForm, ReauthenticateForm
from allauth.mfa.models import Authenticator
from django.conf import settings
from django.contrib import messages
from django.core.cache import cache
from django.http import HttpRequest, HttpResponse
from django.urls import reverse

from controlplane import secretbox
from controlplane.identity import sessions
from controlplane.tenants import selectors, signed_in
from controlplane.tenants.models import User

log = structlog.get_logger("corral.identity")

FRESH_S: Final = 300  # who signed in just now is not asked again before a change of the account
CODE_USED_S: Final = 120  # longer than a code is good for: one period either side
SECOND_FACTOR: Final = "second factor"
FACTORS: Final = (Authenticator.Type.TOTP, Authenticator.Type.WEBAUTHN)
_SAID: Final = {
    "account/messages/password_changed.txt": "Your password is changed. All your other sessions are signed out.",
    "mfa/messages/webauthn_added.txt": "The security key is added.",
    "mfa/messages/webauthn_removed.txt": "The security key is removed.",
    "mfa/messages/totp_deactivated.txt": "Two-factor authentication is off.",
    "mfa/messages/recovery_codes_generated.txt": "These are your new recovery codes; the earlier ones are void.",
}


class AccountAdapter(DefaultAccountAdapter):  # type: ignore[misc]
    """Nobody signs up (people are invited); mail that cannot be sent breaks no page."""

    def is_open_for_signup(self, request: HttpRequest) -> bool:
        return False

    def add_message(
        self, request: HttpRequest, level: int, message_template: str | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """In our words; most of allauth's ("signed in as …") would only be in the way."""
        if sentence := _SAID.get(message_template or ""):
            messages.success(request, sentence)

    def get_password_change_redirect_url(self, request: HttpRequest) -> str:
        return reverse("account")

    def send_mail(self, template_prefix: str, email: str, context: dict[str, Any]) -> None:
        try:
            super().send_mail(template_prefix, email, context)
        except (OSError, SMTPException) as error:
            log.warning("mail.not_sent", template=template_prefix, error=type(error).__name__)

    def send_notification_mail(
        self,
        template_prefix: str,
        user: User,
        context: dict[str, Any] | None = None,
        email: str | None = None,
    ) -> None:
        super().send_notification_mail(template_prefix, user, context, email or user.email)

    def get_reset_password_from_key_url(self, key: str) -> str:
        """On the console's own address, whatever Host header the asker sent."""
        path = reverse("account_reset_password_from_key", kwargs={"uidb36": "UID", "key": "KEY"})
        return settings.ENV.console_url.rstrip("/") + path.replace("UID-KEY", key)

    def is_reauthentication_required(self, *, app: str, **kwargs: Any) -> bool:
        request = context.request
        records = get_authentication_records(request, request.user)
        if records and time.time() - records[-1]["at"] < FRESH_S:
            return False
        return bool(super().is_reauthentication_required(app=app, **kwargs))

    def get_login_stages(self) -> list[str]:
        return ["controlplane.identity.vouching.SecondFactorStage"]

    def post_login(self, request: HttpRequest, user: User, **kwargs: Any) -> HttpResponse:
        """Bind the session to the organization whose provider vouched for it, if one did."""
        login = (kwargs.get("signal_kwargs") or {}).get("sociallogin")
        if login is None:
            request.session.pop(signed_in.VOUCHED_BY, None)
        else:
            request.session[signed_in.VOUCHED_BY] = login.organization_id.hex
        response: HttpResponse = super().post_login(request, user, **kwargs)
        if login is not None:
            sessions.note_vouched(request.session.session_key or "", login.organization_id)
        log.info("user.signed_in", user=user.id.hex, sso=login is not None)
        return response


class MfaAdapter(DefaultMFAAdapter):  # type: ignore[misc]
    """Seeds are sealed; who must have a second factor cannot take it away."""

    def encrypt(self, text: str) -> str:
        return secretbox.seal(text, purpose=SECOND_FACTOR).hex()

    def decrypt(self, encrypted_text: str) -> str:
        return secretbox.unseal(bytes.fromhex(encrypted_text), purpose=SECOND_FACTOR)

    def generate_authenticator_name(self, user: User, type: Any) -> str:
        n = Authenticator.objects.filter(user=user, type=type).count()
        return "Security key" if n == 0 else f"Security key {n + 1}"

    def can_delete_authenticator(self, authenticator: Authenticator) -> bool:
        """The last factor stays where an organization requires one."""
        others = factors_of(authenticator.user_id).exclude(pk=authenticator.pk)
        if authenticator.type in FACTORS and others.exists():
            return True
        return not any(each.require_mfa for each in selectors.memberships_of(user_id=authenticator.user_id))


def factors_of(user_id: Any) -> Any:
    """Authenticators of a user by which a sign-in can be completed; recovery codes only stand in for them."""
    return Authenticator.objects.filter(user_id=user_id, type__in=FACTORS)


class _OnceMixin:
    """A code is good once. allauth forgets a used one after a period; with tolerance it is good for three."""

    user: User
    authenticator: Authenticator

    def clean_code(self) -> str:
        code: str = super().clean_code()  # type: ignore[misc]
        is_totp = self.authenticator.type == Authenticator.Type.TOTP
        if is_totp and not cache.add(f"totp:{self.user.pk}:{code}", True, timeout=CODE_USED_S):
            raise MfaAdapter().validation_error("incorrect_code")
        return code


class OnceForm(_OnceMixin, AuthenticateForm):  # type: ignore[misc]
    """The second step of a sign-in."""


class OnceAgainForm(_OnceMixin, ReauthenticateForm):  # type: ignore[misc]
    """Before a change of the account."""
