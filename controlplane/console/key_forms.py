"""Forms of a key's page: what it is bound to, and its limits. Services check the rest."""

from __future__ import annotations

from decimal import Decimal
from typing import Final

from django import forms

from controlplane.tenants.key_scopes import KeyScopes, Route
from controlplane.tenants.limits import Limits
from controlplane.tenants.models import ApiKey

NANO_PER_DOLLAR: Final = 1_000_000_000
MAX_DOLLARS: Final = (2**63 - 1) // NANO_PER_DOLLAR
ROUTES: Final = (
    (Route.CHAT.value, "Chat"),
    (Route.COMPLETIONS.value, "Completions"),
    (Route.MODELS.value, "List of models"),
    (Route.REQUESTS.value, "Reading an answer again"),
)


class ScopesForm(forms.Form):
    """What a key is bound to. Nothing given: not bound in that respect."""

    routes = forms.MultipleChoiceField(
        label="Routes", choices=ROUTES, required=False, widget=forms.CheckboxSelectMultiple
    )
    models = forms.CharField(
        label="Models",
        required=False,
        max_length=20_000,
        help_text="One per line; acme/* means every name that begins so. Empty: all models.",
        widget=forms.Textarea(attrs={"rows": 3, "spellcheck": "false", "placeholder": "llama-70b\nacme/*"}),
    )
    ip_ranges = forms.CharField(
        label="Networks",
        required=False,
        max_length=4_000,
        help_text="Addresses or CIDR ranges, one per line. Empty: anywhere.",
        widget=forms.Textarea(attrs={"rows": 3, "spellcheck": "false", "placeholder": "203.0.113.0/24"}),
    )

    @classmethod
    def of(cls, key: ApiKey) -> ScopesForm:
        bound = key.bound_to
        return cls(
            initial={
                "routes": bound.routes or (),
                "models": "\n".join(bound.models or ()),
                "ip_ranges": "\n".join(bound.ip_ranges or ()),
            }
        )

    def scopes(self, before: KeyScopes) -> KeyScopes:
        """As the form says. What allowed nothing before and is left empty goes on to allow nothing: saving must not
        open a key that was shut."""
        found = self.cleaned_data
        given = {
            "routes": tuple(found["routes"]),
            "models": tuple(found["models"].split()),
            "ip_ranges": tuple(found["ip_ranges"].replace(",", " ").split()),
        }
        return KeyScopes(
            **{
                name: values or (() if getattr(before, name) == () else None)
                for name, values in given.items()
            }
        )


class LimitsForm(forms.Form):
    """The limits of a key or an end customer. Empty: no limit at this level."""

    rpm = forms.IntegerField(label="Requests per minute", required=False, min_value=0, max_value=2**31 - 1)
    input_tpm = forms.IntegerField(
        label="Prompt tokens per minute", required=False, min_value=0, max_value=2**31 - 1
    )
    output_tpm = forms.IntegerField(
        label="Answer tokens per minute", required=False, min_value=0, max_value=2**31 - 1
    )
    max_concurrency = forms.IntegerField(
        label="Requests at once", required=False, min_value=0, max_value=2**31 - 1
    )
    budget = forms.DecimalField(
        label="Budget, dollars", required=False, min_value=0, max_value=MAX_DOLLARS, decimal_places=9
    )

    @classmethod
    def of(cls, limits: Limits) -> LimitsForm:
        budget = limits.budget_nano
        shown = None if budget is None else (Decimal(budget) / NANO_PER_DOLLAR).normalize()
        return cls(
            initial={
                "rpm": limits.rpm,
                "input_tpm": limits.input_tpm,
                "output_tpm": limits.output_tpm,
                "max_concurrency": limits.max_concurrency,
                "budget": None if shown is None else format(shown, "f"),
            }
        )

    def limits(self) -> Limits:
        found = dict(self.cleaned_data)
        budget = found.pop("budget")
        return Limits(**found, budget_nano=None if budget is None else int(budget * NANO_PER_DOLLAR))
