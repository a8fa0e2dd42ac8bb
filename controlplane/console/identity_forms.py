"""Forms of the sign-in page: domains, identity providers, the policy, SCIM tokens. Services check the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

from django import forms

from controlplane.errors import InvalidInputError
from controlplane.identity.models import ProviderKind, SignInPolicy
from controlplane.identity.policies import MAX_GROUPS
from controlplane.tenants.models import Role

TOKEN_EXPIRES_IN_DAYS: Final = (("", "Never"), ("90", "In 90 days"), ("365", "In a year"))


def _text(label: str, placeholder: str = "", *, max_length: int = 500, **kwargs: Any) -> forms.CharField:
    widget = forms.TextInput(attrs={"placeholder": placeholder, "autocomplete": "off", "spellcheck": "false"})
    return forms.CharField(label=label, max_length=max_length, widget=widget, **kwargs)


class DomainForm(forms.Form):
    name = _text("Domain", "example.org", max_length=253)


class OidcForm(forms.Form):
    """An OpenID Connect provider."""

    prefix = "oidc"
    kind = ProviderKind.OIDC
    name = _text("Name", "e.g. Okta", max_length=40)
    issuer = _text(
        "Issuer", "https://example.okta.com", help_text="Its URL, as its discovery document says it"
    )
    client_id = _text("Client ID", max_length=191)
    client_secret = forms.CharField(
        label="Client secret",
        max_length=500,
        required=False,
        strip=False,
        help_text="Sealed, and never shown again",
        widget=forms.PasswordInput(attrs={"autocomplete": "off"}),
    )
    groups_claim = _text("Claim with groups", max_length=200, initial="groups")


class SamlForm(forms.Form):
    """A SAML identity provider."""

    prefix = "saml"
    kind = ProviderKind.SAML
    name = _text("Name", "e.g. Entra ID", max_length=40)
    issuer = _text("Entity ID", "https://sts.windows.net/…")
    sso_url = _text("Sign-in URL", "https://login.microsoftonline.com/…/saml2")
    certificate = forms.CharField(
        label="Certificate",
        max_length=20_000,
        help_text="What it signs with: PEM or base64",
        widget=forms.Textarea(
            attrs={"rows": 4, "spellcheck": "false", "placeholder": "-----BEGIN CERTIFICATE-----"}
        ),
    )
    groups_claim = _text("Attribute with groups", max_length=200, initial="groups")


class PolicyForm(forms.Form):
    """What a sign-in must bring, and what people become."""

    require_mfa = forms.BooleanField(label="A second factor after a password", required=False)
    require_sso = forms.BooleanField(
        label="Single sign-on alone (owners also with password and second factor)", required=False
    )
    just_in_time = forms.BooleanField(
        label="Whom the identity provider vouches for becomes a member", required=False
    )
    revoke_keys_of_leavers = forms.BooleanField(
        label="Whom the directory deactivates loses the API keys they made", required=False
    )
    default_role = forms.ChoiceField(label="Role of who is in no group below")
    group_roles = forms.CharField(
        label="Roles of groups",
        required=False,
        max_length=60_000,
        help_text="One per line, name or id of the group, then the role. The highest counts. Empty: groups give none.",
        widget=forms.Textarea(
            attrs={"rows": 5, "spellcheck": "false", "placeholder": "ops = admin\nengineering = developer"}
        ),
    )
    CHECKS: Final = ("require_mfa", "require_sso", "just_in_time", "revoke_keys_of_leavers")

    def __init__(self, *args: Any, roles: Sequence[Role], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        field = cast(forms.ChoiceField, self.fields["default_role"])
        field.choices = [(role.value, role.label) for role in roles]

    @classmethod
    def of(cls, policy: SignInPolicy, roles: Sequence[Role]) -> PolicyForm:
        shown = [role for role in Role if role in roles or role == policy.default_role]
        mapped = "\n".join(f"{name} = {role}" for name, role in sorted(policy.group_roles.items()))
        initial = {name: getattr(policy, name) for name in (*cls.CHECKS, "default_role")}
        return cls(roles=shown, initial={**initial, "group_roles": mapped})

    def checks(self) -> list[forms.BoundField]:
        return [self[name] for name in self.CHECKS]

    def group_mapping(self) -> dict[str, Role]:
        """Raises InvalidInputError naming the line."""
        found: dict[str, Role] = {}
        for line in filter(None, (line.strip() for line in self.cleaned_data["group_roles"].splitlines())):
            name, sign, role = (part.strip() for part in line.rpartition("="))
            if not sign or not name or role not in Role.values:
                raise InvalidInputError(
                    f"“{line[:60]}” is not GROUP = ROLE, with one of {', '.join(Role.values)}",
                    field="group_roles",
                )
            found[name] = Role(role)
        if len(found) > MAX_GROUPS:
            raise InvalidInputError(f"at most {MAX_GROUPS} groups", field="group_roles")
        return found


class ScimTokenForm(forms.Form):
    prefix = "scim"
    name = _text("Name", "e.g. Entra provisioning", max_length=120)
    expires = forms.ChoiceField(label="Expires", choices=TOKEN_EXPIRES_IN_DAYS, required=False)
