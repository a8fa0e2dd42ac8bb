"""Which models' licences may be served: what forbids commercial use may not, unless the house says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured

from controlplane.deployments.licences import refusal
from controlplane.settings import Environment


@pytest.mark.parametrize(
    "licence", ["Apache-2.0", "mit", "llama3.1", "see LICENSE", "unknown", "", "openrail"]
)
def test_others_are_served_where_the_house_has_no_list(licence: str) -> None:
    assert refusal(licence, ()) is None


@pytest.mark.parametrize(
    "licence", ["cc-by-nc-4.0", "CC-BY-NC-SA-4.0", "non-commercial", "qwen-research", "x Noncommercial"]
)
def test_what_is_not_for_money_needs_the_house_s_word(licence: str) -> None:
    why = refusal(licence, ())
    assert why is not None and "CORRAL_MODEL_LICENCES" in why
    assert refusal(licence, (f" {licence.upper()}",)) is None


def test_a_list_is_all_that_is_served() -> None:
    assert refusal("MIT", ("apache-2.0", "mit")) is None
    for licence in ("gpl-3.0", "", "unknown"):
        why = refusal(licence, ("apache-2.0", "mit"))
        assert why is not None and "apache-2.0, mit" in why


def test_the_list_is_checked_at_the_start() -> None:
    assert Environment.read({"CORRAL_MODEL_LICENCES": "apache-2.0, mit"}).model_licences == (
        "apache-2.0",
        "mit",
    )
    assert Environment.read({}).model_licences == ()
    with pytest.raises(ImproperlyConfigured, match="CORRAL_MODEL_LICENCES"):
        Environment.read({"CORRAL_MODEL_LICENCES": "apache-2.0,;drop"})


@pytest.mark.django_db
def test_a_version_under_another_licence_is_not_registered(settings: Any) -> None:
    from controlplane.deployments import versions
    from controlplane.deployments.models import ModelSource, ModelVersion
    from controlplane.errors import InvalidInputError
    from tests.world import build_world

    world = build_world()
    version: dict[str, Any] = {
        "organization_id": world.organization.id,
        "digest": "cd" * 32,
        "name": "n",
        "source_kind": ModelSource.DIRECTORY,
        "source_uri": "/x",
        "size_bytes": 1,
        "max_model_len": 8,
        "licence": "cc-by-nc-4.0",
    }
    with pytest.raises(InvalidInputError, match="commercial") as caught:
        versions.register(**version)
    assert caught.value.field == "licence"
    assert not ModelVersion.objects.filter(digest="cd" * 32).exists()
    settings.ENV = replace(settings.ENV, model_licences=("cc-by-nc-4.0",))
    assert versions.register(**version).licence == "cc-by-nc-4.0"
