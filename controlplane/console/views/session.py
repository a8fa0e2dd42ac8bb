"""Signing in and out."""

from __future__ import annotations

from allauth.account.internal.flows.login import perform_password_login
from allauth.account.models import Login
from django.contrib.auth import authenticate, logout
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from django.utils.http import url_has_allowed_host_and_scheme
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST

from controlplane.console import throttle
from controlplane.console.access import MemberRequest, member_page
from controlplane.console.forms import SignInForm
from controlplane.tenants.middleware import choose_organization


@never_cache
@require_http_methods(["GET", "POST"])
def sign_in(request: HttpRequest) -> HttpResponse:
    """The form; on success the page that was asked for. Wrong e-mail and wrong password look the same."""
    if request.user.is_authenticated:
        return redirect(_next(request))
    form = SignInForm(request.POST or None)
    status = 200
    if request.method == "POST":
        found = _try(request, form)
        if isinstance(found, HttpResponse):
            return found
        status = found
    context = {"form": form, "next": request.POST.get("next") or request.GET.get("next", "")}
    return render(request, "console/sign_in.html", context, status=status)


@require_POST
def sign_out(request: HttpRequest) -> HttpResponse:
    logout(request)
    return redirect("console:sign_in")


@require_POST
@member_page(while_suspended=True, while_waiting=True)
def switch_organization(request: MemberRequest) -> HttpResponse:
    """Work for another of the user's organizations from the next request on; other choices are ignored."""
    for membership in request.memberships:
        if membership.organization_id.hex == request.POST.get("organization"):
            choose_organization(request, membership.organization_id)
    return redirect("console:overview")


def _try(request: HttpRequest, form: SignInForm) -> HttpResponse | int:
    """The way on when the password is right, else the status under which to show the form, which has an error then.

    allauth takes over after the password: it asks for the second factor, if there is one, and signs in.
    """
    if not form.is_valid():
        return 400
    email, password = form.cleaned_data["email"].strip().lower(), form.cleaned_data["password"]
    address, now = request.META.get("REMOTE_ADDR", ""), timezone.now()
    wait_s = throttle.wait_s(email=email, address=address, now=now)
    if wait_s:
        minutes = -(-wait_s // 60)
        form.add_error(None, f"Too many failed attempts. Try again in {minutes} minute{'s' * (minutes > 1)}.")
        return 429
    user = authenticate(request, email=email, password=password)
    if user is None:
        throttle.count_failure(email=email, address=address, now=now)
        form.add_error(None, "E-mail or password is wrong.")
        return 401
    throttle.forget(email=email, address=address)
    login = Login(user=user, redirect_url=_next(request))
    response: HttpResponse = perform_password_login(request, {"email": email}, login)
    return response


def _next(request: HttpRequest) -> str:
    target = request.POST.get("next") or request.GET.get("next", "")
    if url_has_allowed_host_and_scheme(target, {request.get_host()}, require_https=request.is_secure()):
        return target
    return "/"
