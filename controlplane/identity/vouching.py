"""Sign-in by an organization's identity provider: allauth's OpenID Connect and SAML, with our providers and our checks.

allauth carries the dance (state, PKCE, request ids, signatures of SAML); it finds providers through SocialAdapter, and
before anybody is signed in `pre_social_login` asks admission.py. Beyond allauth, an ID token's signature is always
checked, also when it came straight from the token endpoint, and it must carry our nonce.
"""

from __future__ import annotations

import secrets
from typing import Any, Final
from uuid import UUID

import jwt
import requests
import structlog
from allauth.core.exceptions import ImmediateHttpResponse
from allauth.mfa.stages import AuthenticateStage
from allauth.socialaccount.adapter import DefaultSocialAccountAdapter
from allauth.socialaccount.models import SocialAccount, SocialApp, SocialLogin
from allauth.socialaccount.providers.oauth2.client import OAuth2Error
from allauth.socialaccount.providers.openid_connect.provider import OpenIDConnectProvider
from allauth.socialaccount.providers.openid_connect.views import OpenIDConnectOAuth2Adapter
from allauth.socialaccount.providers.saml.provider import SAMLProvider
from allauth.socialaccount.providers.saml.utils import build_auth as _build_auth
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import reverse
from onelogin.saml2.utils import OneLogin_Saml2_Utils as Utils

from controlplane import ids
from controlplane.errors import CorralError
from controlplane.identity import fetch, providers
from controlplane.identity.admission import Claims, admit
from controlplane.identity.models import IdentityProvider, ProviderKind
from controlplane.tenants.models import User

log = structlog.get_logger("corral.identity")

ALGORITHMS: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
CLOCK_SKEW_S: Final = 60
WELL_KNOWN: Final = "/.well-known/openid-configuration"
_EMAILS: Final = (
    "email",
    "mail",
    "urn:oid:0.9.2342.19200300.100.1.3",
    "http://schemas.xmlsoap.org/ws/2005/05/identity/claims/emailaddress",
)
_MS: Final = "http://schemas.xmlsoap.org/ws/2005/05/identity/claims"
_NAMES: Final = ("name", "displayName", "http://schemas.microsoft.com/identity/claims/displayname")
_GIVEN: Final = ("givenName", "firstName", "urn:oid:2.5.4.42", f"{_MS}/givenname")
_FAMILY: Final = ("sn", "lastName", "surname", "urn:oid:2.5.4.4", f"{_MS}/surname")
_TRANSIENT: Final = "urn:oasis:names:tc:SAML:2.0:nameid-format:transient"


class OidcAdapter(OpenIDConnectOAuth2Adapter):  # type: ignore[misc]
    """The code flow with one of our providers."""

    def get_provider(self) -> OidcProvider:
        if not hasattr(self, "_provider"):
            self._provider: OidcProvider = super().get_provider()
        return self._provider

    @property
    def openid_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().openid_config
        issuer = self.get_provider().row.issuer
        if config.get("issuer") != issuer:
            raise OAuth2Error(f"the provider calls itself {config.get('issuer')!r}, not {issuer!r}")
        return config

    def complete_login(self, request: HttpRequest, app: SocialApp, token: Any, **kwargs: Any) -> SocialLogin:
        id_token = kwargs["response"].get("id_token")
        if not id_token:
            raise OAuth2Error("the provider sent no ID token")
        claims = self._decode_id_token(app, id_token)
        if "email" not in claims and "userinfo_endpoint" in self.openid_config:
            found = self._fetch_user_info(token.token)
            if found.get("sub") != claims["sub"]:
                raise OAuth2Error("userinfo is about somebody else")
            claims = {**found, **claims}
        return self.get_provider().sociallogin_from_response(request, {"id_token": claims})

    def _decode_id_token(self, app: SocialApp, id_token: str) -> dict[str, Any]:
        try:
            claims: dict[str, Any] = jwt.decode(
                id_token,
                key=self._signing_key(id_token),
                algorithms=list(ALGORITHMS),
                audience=app.client_id,
                issuer=self.get_provider().row.issuer,
                leeway=CLOCK_SKEW_S,
                options={"require": ["exp", "iat", "iss", "aud", "sub"]},
            )
        except (jwt.PyJWTError, KeyError, TypeError, ValueError) as error:
            raise OAuth2Error(f"the ID token is not valid: {error}") from error
        if claims.get("azp", app.client_id) != app.client_id:
            raise OAuth2Error("the ID token was made for another client")
        return claims

    def _signing_key(self, id_token: str) -> Any:
        header = jwt.get_unverified_header(id_token)
        with fetch.session() as session:
            response = session.get(self.openid_config["jwks_uri"])
            response.raise_for_status()
        keys = [
            each
            for each in jwt.PyJWKSet.from_dict(response.json()).keys
            if each.public_key_use in (None, "sig")
        ]
        named = [each for each in keys if each.key_id == header.get("kid")]
        if len(named or keys) != 1:
            raise OAuth2Error("the provider has no key with the id that the ID token names")
        return (named or keys)[0]


class OidcProvider(OpenIDConnectProvider):  # type: ignore[misc]
    """An IdentityProvider of kind oidc, as allauth sees it."""

    oauth2_adapter_class = OidcAdapter

    @property
    def row(self) -> IdentityProvider:
        found: IdentityProvider = self.app.row
        return found

    def redirect(self, request: HttpRequest, process: str, **kwargs: Any) -> HttpResponse:
        """With a nonce, and nothing that the caller's query string adds."""
        nonce = secrets.token_urlsafe(24)
        kwargs.update(auth_params={"nonce": nonce}, nonce=nonce)
        response: HttpResponse = super().redirect(request, process, **kwargs)
        return response

    def extract_extra_data(self, data: dict[str, Any]) -> dict[str, Any]:
        return {}  # nothing is kept of what the provider says

    def sociallogin_from_response(self, request: HttpRequest, response: dict[str, Any]) -> SocialLogin:
        login = super().sociallogin_from_response(request, response)
        claims = response["id_token"]
        login.nonce = claims.get("nonce")
        login.claims = Claims(
            subject=login.account.uid,
            email=_text(claims.get("email")),
            is_email_refuted=claims.get("email_verified") in (False, "false"),
            name=_text(claims.get("name")),
            groups=_groups(claims.get(self.row.groups_claim)),
        )
        return login


class SamlProvider(SAMLProvider):  # type: ignore[misc]
    """An IdentityProvider of kind saml, as allauth sees it. Attributes by the names that Okta, Entra, Keycloak use."""

    def extract_extra_data(self, data: Any) -> dict[str, Any]:
        return {}

    def extract_uid(self, data: Any) -> str:
        """The NameID; where it is another one each time, the e-mail address."""
        if data.get_nameid_format() == _TRANSIENT or not data.get_nameid():
            return _first(data.get_attributes(), _EMAILS).lower()
        return str(data.get_nameid())

    def sociallogin_from_response(self, request: HttpRequest, response: Any) -> SocialLogin:
        login = super().sociallogin_from_response(request, response)
        attributes = response.get_attributes()
        parts = (_first(attributes, _GIVEN), _first(attributes, _FAMILY))
        login.claims = Claims(
            subject=login.account.uid,
            email=_first(attributes, _EMAILS) or _text(response.get_nameid()),
            is_email_refuted=False,
            name=_first(attributes, _NAMES) or " ".join(filter(None, parts)),
            groups=_groups(attributes.get(self.app.row.groups_claim)),
        )
        return login


class SocialAdapter(DefaultSocialAccountAdapter):  # type: ignore[misc]
    """Where allauth finds providers, and where it asks whom to let in."""

    def list_apps(
        self, request: HttpRequest, provider: str | None = None, client_id: str | None = None
    ) -> list[SocialApp]:
        """Ours alone, one by its id: nothing is ever listed to strangers."""
        is_saml = provider == SamlProvider.id
        app = find_app(client_id if is_saml else provider)
        return [app] if app is not None and (app.provider == SamlProvider.id) == is_saml else []

    def get_provider(self, request: HttpRequest, provider: str, client_id: str | None = None) -> Any:
        return self.get_app(request, provider=provider, client_id=client_id).get_provider(request)

    def get_requests_session(self) -> requests.Session:
        return fetch.session()

    def authenticate_by_email(self, sociallogin: SocialLogin) -> None:
        return None  # admission.py links, after it has asked whose domain it is

    def is_open_for_signup(self, request: HttpRequest, sociallogin: SocialLogin) -> bool:
        return False

    def on_authentication_error(
        self,
        request: HttpRequest,
        provider: Any,
        error: Any = None,
        exception: Exception | None = None,
        extra_context: dict[str, Any] | None = None,
    ) -> None:
        reason = (extra_context or {}).get("saml_last_error_reason") or exception or error
        log.warning("sso.refused", provider=provider.sub_id, reason=str(reason)[:300])
        raise ImmediateHttpResponse(
            refusal(request, "Your identity provider's answer was not accepted.", 401)
        )

    def pre_social_login(self, request: HttpRequest, sociallogin: SocialLogin) -> None:
        """Let in or refuse; after this allauth finds an account that exists and signs it in."""
        row: IdentityProvider = sociallogin.provider.app.row
        if sociallogin.state.get("process") != "login":
            raise ImmediateHttpResponse(refusal(request, "This sign-in did not begin here.", 401))
        if row.kind == ProviderKind.OIDC and sociallogin.state.get("nonce") != sociallogin.nonce:
            log.warning("sso.refused", provider=str(row), reason="nonce")
            raise ImmediateHttpResponse(
                refusal(request, "Your identity provider's answer was not accepted.", 401)
            )
        try:
            user: User = admit(row, sociallogin.claims)
        except CorralError as error:
            log.warning("sso.refused", provider=str(row), reason=error.message[:300])
            raise ImmediateHttpResponse(refusal(request, error.message, 403)) from error
        sociallogin.user = user
        sociallogin.account = SocialAccount.objects.get(provider=str(row), uid=sociallogin.claims.subject)
        sociallogin.organization_id = row.organization_id


class SecondFactorStage(AuthenticateStage):  # type: ignore[misc]
    """Asked after a password. After an identity provider it is the provider's affair."""

    def _should_handle(self, request: HttpRequest) -> bool:
        if (self.login.signal_kwargs or {}).get("sociallogin") is not None:
            return False
        return bool(super()._should_handle(request))


def find_app(text: str | None) -> SocialApp | None:
    """The enabled provider with this id (idp_…), in allauth's form."""
    try:
        provider_id: UUID = ids.from_text(ids.Prefix.IDENTITY_PROVIDER, text or "")
    except ids.InvalidIdError:
        return None
    row = providers.find(provider_id)
    return None if row is None else app_of(row)


def app_of(row: IdentityProvider) -> SocialApp:
    """A provider in allauth's form, unsaved: its table of them stays empty."""
    app = SocialApp(provider_id=str(row), name=row.name)
    app.row = row
    if row.kind == ProviderKind.OIDC:
        app.provider = OidcProvider.id
        app.client_id, app.secret = row.client_id, providers.secret_of(row)
        app.settings = {"server_url": row.issuer.rstrip("/") + WELL_KNOWN, "oauth_pkce_enabled": True}
        app.get_provider = lambda request: OidcProvider(request, app=app)
    else:
        app.provider, app.client_id = SamlProvider.id, str(row)
        app.settings = {
            "idp": {"entity_id": row.issuer, "sso_url": row.sso_url, "x509cert": row.certificate},
            "next_certificate": row.next_certificate,
            "advanced": {
                "strict": True,
                "reject_idp_initiated_sso": True,
                "reject_deprecated_algorithm": True,
                "want_attribute_statement": False,
                "allow_single_label_domains": True,
            },
        }
        app.get_provider = lambda request: SamlProvider(request, app=app)
    return app


def build_auth(request: HttpRequest, provider: Any) -> Any:
    """allauth's, which knows one certificate of a provider: while it is replaced, both are good."""
    auth = _build_auth(request, provider)
    following = provider.app.settings.get("next_certificate")
    if following:
        idp = auth.get_settings().get_idp_data()
        both = [idp["x509cert"], Utils.format_cert(following)]
        idp["x509certMulti"] = {"signing": both}
    return auth


def callback_path(row: IdentityProvider) -> str:
    """Where the provider sends people back to: the redirect URI of OIDC, the ACS URL of SAML."""
    if row.kind == ProviderKind.OIDC:
        return reverse("openid_connect_callback", kwargs={"provider_id": str(row)})
    return reverse("saml_acs", kwargs={"organization_slug": str(row)})


def refusal(request: HttpRequest, message: str, status: int) -> HttpResponse:
    return render(request, "socialaccount/authentication_error.html", {"message": message}, status=status)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _first(attributes: dict[str, list[str]], names: tuple[str, ...]) -> str:
    return next((_text(attributes[name][0]).strip() for name in names if attributes.get(name)), "")


def _groups(value: object) -> frozenset[str] | None:
    """A list of names, or one name; None where the claim is missing."""
    if isinstance(value, str):
        return frozenset({value})
    if isinstance(value, list):
        return frozenset(each for each in value if isinstance(each, str))
    return None
