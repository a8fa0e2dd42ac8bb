"""Forms of the console. They check shape; services check the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

from django import forms

from controlplane.tenants.models import Project, Role

EXPIRES_IN_DAYS: Final = (("", "Never"), ("7", "In 7 days"), ("30", "In 30 days"), ("90", "In 90 days"))


class SignInForm(forms.Form):
    email = forms.EmailField(
        label="E-mail",
        max_length=254,
        widget=forms.EmailInput(attrs={"autocomplete": "username", "autofocus": True}),
    )
    password = forms.CharField(
        label="Password",
        max_length=1024,  # hashing takes as long as the text is
        strip=False,
        widget=forms.PasswordInput(attrs={"autocomplete": "current-password"}),
    )


class CreateKeyForm(forms.Form):
    name = forms.CharField(
        label="Name",
        max_length=120,
        widget=forms.TextInput(attrs={"placeholder": "e.g. production backend", "autocomplete": "off"}),
    )
    project = forms.TypedChoiceField(label="Project")
    expires = forms.ChoiceField(label="Expires", choices=EXPIRES_IN_DAYS, required=False)

    def __init__(self, *args: Any, projects: Sequence[Project], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        field = cast(forms.TypedChoiceField, self.fields["project"])
        field.choices = [(project.id.hex, project.name) for project in projects]


class InviteForm(forms.Form):
    email = forms.EmailField(
        label="E-mail",
        max_length=254,
        widget=forms.EmailInput(attrs={"placeholder": "ada@example.org", "autocomplete": "off"}),
    )
    role = forms.ChoiceField(label="Role")

    def __init__(self, *args: Any, roles: Sequence[Role], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        field = cast(forms.ChoiceField, self.fields["role"])
        field.choices = [(role.value, role.label) for role in roles]
        field.initial = Role.DEVELOPER.value


class OpenAccountForm(forms.Form):
    """Of somebody who was invited: the address is the invitation's."""

    name = forms.CharField(
        label="Your name",
        max_length=120,
        widget=forms.TextInput(attrs={"autocomplete": "name", "autofocus": True}),
    )
    password = forms.CharField(
        label="Password",
        max_length=1024,
        strip=False,
        widget=forms.PasswordInput(attrs={"autocomplete": "new-password"}),
        help_text="At least 10 characters",
    )


PERIODS: Final = (
    ("month", "a month"),
    ("week", "a week"),
    ("day", "a day"),
    ("rolling:24", "any 24 hours"),
    ("rolling:720", "any 30 days"),
    ("total", "in all"),
)
BUDGET_KINDS: Final = (("hard", "refuse"), ("soft", "only alert"))


class BudgetForm(forms.Form):
    name = forms.CharField(
        label="Name",
        max_length=120,
        widget=forms.TextInput(attrs={"placeholder": "e.g. team chat", "autocomplete": "off"}),
    )
    limit = forms.CharField(
        label="Limit, dollars",
        max_length=24,
        widget=forms.TextInput(attrs={"placeholder": "50.00", "inputmode": "decimal", "autocomplete": "off"}),
    )
    period = forms.ChoiceField(label="Per", choices=PERIODS)
    project = forms.TypedChoiceField(label="For", required=False)
    kind = forms.ChoiceField(label="When spent", choices=BUDGET_KINDS)

    def __init__(self, *args: Any, projects: Sequence[Project], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        field = cast(forms.TypedChoiceField, self.fields["project"])
        field.choices = [("", "everybody"), *((project.id.hex, project.name) for project in projects)]
