"""The doors of single sign-on: which provider it is, on the way there, and on the way back."""

from __future__ import annotations

import requests
from allauth.socialaccount.models import SocialApp
from allauth.socialaccount.providers.oauth2.client import OAuth2Error
from allauth.socialaccount.providers.oauth2.views import OAuth2CallbackView
from allauth.socialaccount.providers.saml import views as saml_views
from django import forms
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.utils.http import url_has_allowed_host_and_scheme, urlencode
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET, require_http_methods
from onelogin.saml2.errors import OneLogin_Saml2_Error

from controlplane.identity import domains, providers, vouching


class SsoForm(forms.Form):
    email = forms.EmailField(
        label="E-mail at work",
        max_length=254,
        widget=forms.EmailInput(attrs={"autocomplete": "username", "autofocus": True}),
    )


@never_cache
@require_http_methods(["GET", "POST"])
def choose(request: HttpRequest) -> HttpResponse:
    """From an address to its organization's provider. Says the same of every domain that has none."""
    form = SsoForm(request.POST or None)
    found, status = [], 200
    if request.method == "POST":
        status = 400
        if form.is_valid():
            found = providers.of_domain(domains.of_address(form.cleaned_data["email"]))
            if len(found) == 1:
                return redirect(f"/sso/idp_{found[0][0].hex}?{urlencode({'next': _next(request)})}")
            if not found:
                form.add_error("email", "No organization signs in with this domain.")
                status = 404
            else:
                status = 200
    context = {
        "form": form,
        "found": [(f"idp_{each.hex}", name) for each, name in found],
        "next": _next(request),
    }
    return render(request, "console/sso.html", context, status=status)


@never_cache
@require_GET
def start(request: HttpRequest, provider: str) -> HttpResponse:
    """Off to the provider."""
    app = vouching.find_app(provider)
    if app is None:
        raise Http404
    try:
        response: HttpResponse = app.get_provider(request).redirect(request, "login", next_url=_next(request))
    except (requests.RequestException, OAuth2Error, KeyError, TypeError, ValueError):
        return vouching.refusal(
            request, "Your identity provider cannot be reached, or is set up wrongly.", 502
        )
    return response


@never_cache
@require_GET
def oidc_callback(request: HttpRequest, provider_id: str) -> HttpResponse:
    """Back from an OpenID Connect provider."""
    try:
        view = OAuth2CallbackView.adapter_view(vouching.OidcAdapter(request, provider_id))
        response: HttpResponse = view(request)
    except SocialApp.DoesNotExist as error:
        raise Http404 from error
    except (KeyError, TypeError, ValueError):
        return vouching.refusal(request, "Your identity provider's answer was not accepted.", 401)
    return response


@never_cache
@require_GET
def saml_finish(request: HttpRequest, organization_slug: str) -> HttpResponse:
    """Back from a SAML provider, second step: now with the session of who set out."""
    try:
        response: HttpResponse = saml_views.finish_acs(request, organization_slug=organization_slug)
    except (
        SyntaxError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OneLogin_Saml2_Error,
    ):  # not XML, not SAML
        return vouching.refusal(request, "Your identity provider's answer was not accepted.", 401)
    return response


saml_views.build_auth = vouching.build_auth  # what its views call; both certificates of a provider are good
saml_acs = saml_views.acs
saml_metadata = saml_views.metadata
saml_logout = saml_views.sls


def _next(request: HttpRequest) -> str:
    target = request.POST.get("next") or request.GET.get("next", "")
    if url_has_allowed_host_and_scheme(target, {request.get_host()}, require_https=request.is_secure()):
        return target
    return "/"
