"""Forms of the pages about endpoints elsewhere. They check shape; services check the rest."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Final, cast

from django import forms

from controlplane.deployments.models import Deployment
from controlplane.outbound import MAX_URL
from controlplane.upstreams.models import Upstream, UpstreamRole
from controlplane.upstreams.services import MAX_RATE, RANGES, Change

_NANO: Final = 1_000_000_000
RATES: Final = {
    "input_usd": "input_nano_per_million",
    "cached_usd": "cached_nano_per_million",
    "output_usd": "output_nano_per_million",
}
ROLES: Final = (
    (UpstreamRole.REPLICA.value, "beside our replicas"),
    (UpstreamRole.OVERFLOW.value, "for what overflows"),
    (UpstreamRole.SHADOW.value, "for copies, to compare"),
)


def _text(label: str, placeholder: str = "", **kwargs: Any) -> forms.CharField:
    widget = forms.TextInput(attrs={"placeholder": placeholder, "autocomplete": "off", "spellcheck": "false"})
    return forms.CharField(label=label, widget=widget, **kwargs)


def _whole(name: str, label: str, **kwargs: Any) -> forms.IntegerField:
    least, most = RANGES[name]
    return forms.IntegerField(label=label, min_value=least, max_value=most, **kwargs)


def _rate(label: str) -> forms.DecimalField:
    return forms.DecimalField(
        label=label, required=False, min_value=0, max_value=MAX_RATE // _NANO, decimal_places=9
    )


class AttachForm(forms.Form):
    """What an endpoint cannot do without; the rest has good values and is on its page."""

    name = _text("Name", "e.g. their-vllm", max_length=64)
    deployment = forms.TypedChoiceField(label="Deployment")
    role = forms.ChoiceField(label="Use", choices=ROLES, initial=UpstreamRole.OVERFLOW.value)
    base_url = _text("Base URL", "https://inference.example.org/v1", max_length=MAX_URL)
    model = _text("Model there", "what it calls the model", max_length=200)
    api_key = forms.CharField(
        label="API key",
        max_length=4096,
        required=False,
        widget=forms.PasswordInput(attrs={"autocomplete": "off"}),
        help_text="Sealed, and never shown again",
    )
    slots = _whole("slots", "Requests at once", initial=16)
    input_usd = _rate("It takes for a million prompt tokens, dollars")
    output_usd = _rate("… for a million answer tokens")

    def __init__(self, *args: Any, deployments: Sequence[Deployment], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        field = cast(forms.TypedChoiceField, self.fields["deployment"])
        field.choices = [(each.id.hex, each.name) for each in deployments]

    def change(self) -> Change:
        found = self.cleaned_data
        return Change(slots=found["slots"], api_key=found["api_key"] or None, **rates_of(found))


class SettingsForm(forms.Form):
    """What can be changed of an endpoint. An empty key stays as it is."""

    role = forms.ChoiceField(label="Use", choices=ROLES)
    base_url = _text(
        "Base URL", max_length=MAX_URL, required=False
    )  # a deployment that is a shadow has neither
    model = _text("Model there", max_length=200, required=False)
    api_key = forms.CharField(
        label="New API key",
        max_length=4096,
        required=False,
        widget=forms.PasswordInput(attrs={"autocomplete": "off"}),
        help_text="Empty: stays as it is",
    )
    forget_key = forms.BooleanField(label="Take the key away", required=False)
    slots = _whole("slots", "Requests at once")
    input_usd = _rate("Million prompt tokens, dollars")
    cached_usd = _rate("Million cached tokens, dollars")
    output_usd = _rate("Million answer tokens, dollars")
    overflow_after_ms = _whole("overflow_after_ms", "Overflow after, ms")
    connect_ms = _whole("connect_ms", "Connecting may take, ms")
    first_token_ms = _whole("first_token_ms", "First token may take, ms")
    between_tokens_ms = _whole("between_tokens_ms", "Pause in an answer, ms")
    n_retries = _whole("n_retries", "Further tries")
    breaker_failures = _whole("breaker_failures", "Left alone after failures")
    breaker_pause_ms = _whole("breaker_pause_ms", "… for, ms at first")

    @classmethod
    def of(cls, row: Upstream) -> SettingsForm:
        initial = {name: getattr(row, name) for name in cls.base_fields if hasattr(row, name)}
        for name, column in RATES.items():
            initial[name] = format((Decimal(getattr(row, column)) / _NANO).normalize(), "f")
        return cls(initial=initial)

    def change(self) -> Change:
        found = dict(self.cleaned_data)
        named = {n: v for n, v in found.items() if n in Change.__dataclass_fields__ and n != "api_key"}
        api_key = "" if found["forget_key"] else found["api_key"] or None
        return Change(**named, api_key=api_key, **rates_of(found))


def rates_of(found: dict[str, Any]) -> dict[str, Any]:
    """Dollars for a million tokens as nano-dollars, of those that were given."""
    return {RATES[name]: int(found[name] * _NANO) for name in RATES if found.get(name) is not None}
