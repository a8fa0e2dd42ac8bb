"""A person's own account: what it is protected with, where it is signed in. The forms behind it are allauth's.

Not for sessions that an identity provider vouched for: whoever runs it could otherwise set a password here and reach
the person's other organizations with that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from allauth.account.internal.flows.login import record_authentication
from allauth.mfa.base.views import AuthenticateView
from allauth.mfa.models import Authenticator
from allauth.mfa.totp.views import ActivateTOTPView, DeactivateTOTPView
from allauth.mfa.webauthn.views import AddWebAuthnView, RemoveWebAuthnView
from allauth.usersessions.internal.flows.sessions import end_other_sessions
from allauth.usersessions.models import UserSession
from django.contrib import messages
from django.contrib.auth.views import redirect_to_login
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render, resolve_url
from django.urls import reverse_lazy
from django.utils.http import url_has_allowed_host_and_scheme
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET, require_POST

from controlplane.console.pages import error_page
from controlplane.identity.adapters import MfaAdapter, factors_of
from controlplane.tenants import signed_in
from controlplane.tenants.middleware import TenantRequest
from controlplane.tenants.models import User

MAX_SESSIONS = 50


def own(view: Callable[..., HttpResponse]) -> Callable[..., HttpResponse]:
    """Only for people who signed in with their own password; never cached."""

    @wraps(view)
    def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        if not request.user.is_authenticated:
            return redirect_to_login(request.get_full_path(), resolve_url("console:sign_in"))
        if signed_in.vouched_by(request.session) is not None:
            return error_page(
                request,
                status=403,
                title="Your identity provider keeps this",
                message="You signed in through your organization. Password and second factor are set there.",
            )
        return never_cache(view)(request, *args, **kwargs)

    return guarded


@require_GET
@own
def account(request: TenantRequest) -> HttpResponse:
    user = request.user
    assert isinstance(user, User)
    rows = list(Authenticator.objects.filter(user=user).order_by("created_at", "pk"))
    kinds = {row.type: row for row in rows}
    keys = [row for row in rows if row.type == Authenticator.Type.WEBAUTHN]
    has_totp = Authenticator.Type.TOTP in kinds
    codes = kinds.get(Authenticator.Type.RECOVERY_CODES)
    sessions = sorted(
        UserSession.objects.purge_and_list(user), key=lambda row: row.last_seen_at, reverse=True
    )
    context = {
        "has_totp": has_totp,
        "keys": [(row, row.wrap().name) for row in keys],
        "is_last": len(keys) + has_totp == 1,
        "n_codes": len(codes.wrap().get_unused_codes()) if codes else 0,
        "sessions": [(row, row.is_current(), browser(row.user_agent)) for row in sessions[:MAX_SESSIONS]],
        "is_required": any(each.require_mfa for each in request.memberships),
    }
    return render(request, "console/account.html", context)


@require_POST
@own
def end_sessions(request: HttpRequest) -> HttpResponse:
    """One of the person's sessions, by its row, or all others."""
    assert isinstance(request.user, User)
    text = request.POST.get("session", "")
    if text.isdigit() and len(text) < 19:
        row = UserSession.objects.filter(user=request.user, pk=int(text)).first()
        if row is not None and not row.is_current():
            row.end()
    elif text == "others":
        end_other_sessions(request, request.user)
    messages.success(request, "Signed out there.")
    return redirect("account")


@require_GET
def missing(request: TenantRequest) -> HttpResponse:
    """Where members go whose organization asks more of their sign-in."""
    user, target = request.user, _next(request)
    if request.missing is None or not isinstance(user, User):
        return redirect(target)
    if request.missing is signed_in.Missing.MFA:
        kinds = set(factors_of(user.pk).values_list("type", flat=True))
        step = "mfa_activate_totp"
        if kinds:
            is_key = Authenticator.Type.TOTP not in kinds
            step = "mfa_reauthenticate_webauthn" if is_key else "mfa_reauthenticate"
        return redirect_to_login(target, resolve_url(step))
    context = {"organization": request.waiting, "next": target, "others": request.memberships}
    return render(request, "console/sso_required.html", context, status=403)


class Enrol(ActivateTOTPView):  # type: ignore[misc]
    """Counts as a second factor in this session, and ends the others: they were signed in without one."""

    def form_valid(self, form: Any) -> HttpResponse:
        response: HttpResponse = super().form_valid(form)
        assert isinstance(self.request.user, User)
        record_authentication(self.request, self.request.user, method="mfa", type="totp")
        end_other_sessions(self.request, self.request.user)
        return response


class Withdraw(DeactivateTOTPView):  # type: ignore[misc]
    """After it this session has no second factor any more."""

    def form_valid(self, form: Any) -> HttpResponse:
        response: HttpResponse = super().form_valid(form)
        _forget_factor(self.request)
        return response


class Authenticate(AuthenticateView):  # type: ignore[misc]
    """The second step of a sign-in, with what this person has."""

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        kinds = set(factors_of(self.stage.login.user.pk).values_list("type", flat=True))
        return {
            **super().get_context_data(**kwargs),
            "has_keys": Authenticator.Type.WEBAUTHN in kinds,
            "has_totp": Authenticator.Type.TOTP in kinds,
        }


class AddKey(AddWebAuthnView):  # type: ignore[misc]
    """As Enrol, with a security key."""

    def form_valid(self, form: Any) -> HttpResponse:
        response: HttpResponse = super().form_valid(form)
        assert isinstance(self.request.user, User)
        record_authentication(self.request, self.request.user, method="mfa", type="webauthn")
        end_other_sessions(self.request, self.request.user)
        return response


class RemoveKey(RemoveWebAuthnView):  # type: ignore[misc]
    """After the last one this session has no second factor any more."""

    success_url = reverse_lazy("account")

    def form_valid(self, form: Any) -> HttpResponse:
        if not MfaAdapter().can_delete_authenticator(self.get_object()):
            return error_page(
                self.request,
                status=403,
                title="Your organization requires it",
                message="Add another security key or an authenticator app first.",
            )
        response: HttpResponse = super().form_valid(form)
        _forget_factor(self.request)
        return response


def _forget_factor(request: HttpRequest) -> None:
    """Unless another one is left."""
    if not factors_of(request.user.pk).exists():
        methods = request.session.get(signed_in.METHODS, [])
        request.session[signed_in.METHODS] = [each for each in methods if each.get("method") != "mfa"]


def browser(user_agent: str) -> str:
    """A few words for people: which browser, on what."""
    names = (("Edg/", "Edge"), ("Firefox/", "Firefox"), ("Chrome/", "Chrome"), ("Safari/", "Safari"))
    systems = (
        ("Android", "Android"),
        ("iPhone", "iPhone"),
        ("iPad", "iPad"),
        ("Windows", "Windows"),
        ("Mac OS", "macOS"),
        ("Linux", "Linux"),
    )
    name = next((word for mark, word in names if mark in user_agent), "Another program")
    system = next((f" on {word}" for mark, word in systems if mark in user_agent), "")
    return name + system


def _next(request: HttpRequest) -> str:
    target = request.GET.get("next", "")
    if url_has_allowed_host_and_scheme(target, {request.get_host()}, require_https=request.is_secure()):
        return target
    return "/"
