"""Routes of a person's account, under the names by which allauth finds them; only those that we use are here."""

from allauth.account import views as account_views
from allauth.mfa.base import views as mfa_views
from allauth.mfa.recovery_codes import views as code_views
from allauth.mfa.webauthn import views as key_views
from django.urls import path, re_path
from django.views.generic import RedirectView

from controlplane.console.pages import inactive
from controlplane.console.views import account, session, sso

urlpatterns = [
    path("login", session.sign_in, name="account_login"),
    path("logout", session.sign_out, name="account_logout"),
    path("account", account.account, name="account"),
    path("account/inactive", inactive, name="account_inactive"),
    path("account/missing", account.missing, name="account_missing"),
    path("account/sessions/end", account.end_sessions, name="end_sessions"),
    path("account/reauthenticate", account.own(account_views.reauthenticate), name="account_reauthenticate"),
    path("account/password", account.own(account_views.password_change), name="account_change_password"),
    path("account/password/set", account.own(account_views.password_set), name="account_set_password"),
    path("account/password/reset", account_views.password_reset, name="account_reset_password"),
    path(
        "account/password/reset/sent", account_views.password_reset_done, name="account_reset_password_done"
    ),
    re_path(
        r"^account/password/reset/key/(?P<uidb36>[0-9A-Za-z]+)-(?P<key>.+)/$",
        account_views.password_reset_from_key,
        name="account_reset_password_from_key",
    ),
    path(
        "account/password/reset/done",
        account_views.password_reset_from_key_done,
        name="account_reset_password_from_key_done",
    ),
    path("sso", sso.choose, name="sso"),
    path("sso/<str:provider>", sso.start, name="sso_start"),
    path("sso/<str:provider_id>/callback", sso.oidc_callback, name="openid_connect_callback"),
    path("sso/<str:organization_slug>/acs", sso.saml_acs, name="saml_acs"),
    path("sso/<str:organization_slug>/acs/finish", sso.saml_finish, name="saml_finish_acs"),
    path("sso/<str:organization_slug>/metadata", sso.saml_metadata, name="saml_metadata"),
    path("sso/<str:organization_slug>/logout", sso.saml_logout, name="saml_sls"),
    path("account/2fa", RedirectView.as_view(pattern_name="account"), name="mfa_index"),
    path("account/2fa/authenticate", account.Authenticate.as_view(), name="mfa_authenticate"),
    path("account/2fa/reauthenticate", account.own(mfa_views.reauthenticate), name="mfa_reauthenticate"),
    path("account/2fa/activate", account.own(account.Enrol.as_view()), name="mfa_activate_totp"),
    path("account/2fa/deactivate", account.own(account.Withdraw.as_view()), name="mfa_deactivate_totp"),
    path("account/2fa/keys", RedirectView.as_view(pattern_name="account"), name="mfa_list_webauthn"),
    path("account/2fa/keys/add", account.own(account.AddKey.as_view()), name="mfa_add_webauthn"),
    path(
        "account/2fa/keys/use",
        account.own(key_views.reauthenticate_webauthn),
        name="mfa_reauthenticate_webauthn",
    ),
    path(
        "account/2fa/keys/<int:pk>/remove",
        account.own(account.RemoveKey.as_view()),
        name="mfa_remove_webauthn",
    ),
    path("account/2fa/codes", account.own(code_views.view_recovery_codes), name="mfa_view_recovery_codes"),
    path(
        "account/2fa/codes/new",
        account.own(code_views.generate_recovery_codes),
        name="mfa_generate_recovery_codes",
    ),
]
