"""The page behind the link of an invitation: for somebody who belongs to no organization yet, or not to this one.

Whoever has the link has read the mail. Who has an account signs in with it; who has none opens one here.
"""

from __future__ import annotations

from allauth.account.internal.flows.login import perform_password_login
from allauth.account.models import Login
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods

from controlplane.console.forms import OpenAccountForm
from controlplane.console.pages import error_page
from controlplane.errors import CorralError
from controlplane.identity import invitations
from controlplane.identity.invitations import Offer
from controlplane.tenants.middleware import TenantRequest, choose_organization
from controlplane.tenants.models import User


@never_cache
@require_http_methods(["GET", "POST"])
def accept(request: TenantRequest, token: str) -> HttpResponse:
    """GET shows the offer and asks, POST takes it."""
    offer = invitations.find_offer(token)
    if offer is None:
        return error_page(
            request,
            status=404,
            title="No such invitation",
            message="The link is incomplete, or was replaced by a newer one.",
        )
    if offer.status != "open":
        return error_page(
            request,
            status=410,
            title=f"This invitation is {offer.status}",
            message=f"Ask somebody at {offer.organization_name} for a new one, or sign in.",
        )
    user = request.user
    try:
        if isinstance(user, User):
            return _as_user(request, token, offer, user)
        return _as_nobody(request, token, offer)
    except CorralError as error:
        return error_page(request, status=error.status, message=error.message, code=error.code)


def _as_user(request: TenantRequest, token: str, offer: Offer, user: User) -> HttpResponse:
    if request.method == "POST" and user.email == offer.email:
        invitations.accept(token=token, user=user)
        choose_organization(request, offer.organization_id)
        return redirect("console:overview")
    context = {"offer": offer, "is_other": user.email != offer.email}
    return render(request, "console/invitation.html", context)


def _as_nobody(request: TenantRequest, token: str, offer: Offer) -> HttpResponse:
    if User.objects.filter(email=offer.email).exists():
        return render(request, "console/invitation.html", {"offer": offer, "has_account": True})
    form = OpenAccountForm(request.POST or None)
    status = 200
    if request.method == "POST":
        status = 400
        if form.is_valid():
            try:
                _, user = invitations.accept_as_new(
                    token=token, name=form.cleaned_data["name"], password=form.cleaned_data["password"]
                )
            except CorralError as error:
                if error.field not in form.fields:
                    raise
                form.add_error(error.field, error.message)
            else:
                response: HttpResponse = perform_password_login(
                    request, {"email": user.email}, Login(user=user, redirect_url="/")
                )
                choose_organization(request, offer.organization_id)
                return response
    return render(request, "console/invitation.html", {"offer": offer, "form": form}, status=status)
