"""Routes of the console, and the pages Django shows for errors (handlers are read from the root URLconf)."""

from django.urls import path

from controlplane.console.views import (
    budgets,
    deployments,
    identity,
    invitation,
    keys,
    overview,
    people,
    playground,
    session,
    slo,
    usage,
)

app_name = "console"

urlpatterns = [
    path("", overview.overview, name="overview"),
    path("live", overview.overview_live, name="overview_live"),
    path("login", session.sign_in, name="sign_in"),
    path("logout", session.sign_out, name="sign_out"),
    path("organization", session.switch_organization, name="switch_organization"),
    path("deployments", deployments.deployment_list, name="deployments"),
    path("deployments/<str:deployment>", deployments.deployment_detail, name="deployment"),
    path("deployments/<str:deployment>/live", deployments.deployment_live, name="deployment_live"),
    path("keys", keys.key_list, name="keys"),
    path("keys/create", keys.create_key, name="create_key"),
    path("keys/<str:key>", keys.key_detail, name="key"),
    path("keys/<str:key>/scopes", keys.bind_key, name="bind_key"),
    path("keys/<str:key>/limits", keys.limit_key, name="limit_key"),
    path("keys/<str:key>/rotate", keys.rotate_key, name="rotate_key"),
    path("keys/<str:key>/revoke", keys.revoke_key, name="revoke_key"),
    path("playground", playground.playground, name="playground"),
    path("playground/key", playground.playground_key, name="playground_key"),
    path("people", people.people, name="people"),
    path("people/invite", people.invite, name="invite"),
    path("people/invitations/<str:invitation>/resend", people.resend, name="resend_invitation"),
    path("people/invitations/<str:invitation>/revoke", people.revoke, name="revoke_invitation"),
    path("sign-in", identity.identity, name="identity"),
    path("sign-in/domains", identity.claim_domain, name="claim_domain"),
    path("sign-in/domains/<str:domain>", identity.change_domain, name="change_domain"),
    path("sign-in/providers", identity.connect_provider, name="connect_provider"),
    path("sign-in/providers/<str:provider>", identity.change_provider, name="change_provider"),
    path("sign-in/policy", identity.change_policy, name="change_policy"),
    path("sign-in/scim-tokens", identity.create_scim_token, name="create_scim_token"),
    path("sign-in/scim-tokens/<str:scim_token>", identity.revoke_scim_token, name="revoke_scim_token"),
    path("invitations/<str:token>", invitation.accept, name="accept_invitation"),
    path("slo", slo.slo_page, name="slo"),
    path("requests/<str:request_id>", slo.request_page, name="request"),
    path("budgets", budgets.budget_list, name="budgets"),
    path("budgets/create", budgets.create_budget, name="create_budget"),
    path("budgets/<str:budget>", budgets.change_budget, name="change_budget"),
    path("usage", usage.usage_page, name="usage"),
    path("usage.csv", usage.usage_csv, name="usage_csv"),
]
