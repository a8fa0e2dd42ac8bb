"""What a request is promised: classes, rules that change them, and who may name which."""

from __future__ import annotations

import pytest

from controlplane.policy.promises import CLASSES, Promise, Rule, best, promises

INTERACTIVE, STANDARD, BATCH, FLEX = CLASSES


def resolved(own: Promise, *rules: Rule, key: str = "k1") -> tuple[str, dict[str, Promise]]:
    default, allowed = promises(own, "d1", key, CLASSES, rules)
    assert allowed[default.name] is default
    return default.name, allowed


@pytest.mark.parametrize(
    ("own", "allowed"),
    [
        (INTERACTIVE, ["batch", "flex", "interactive", "standard"]),
        (STANDARD, ["batch", "flex", "standard"]),
        (FLEX, ["flex"]),
    ],
)
def test_a_request_may_name_its_deployments_class_and_those_after_it(
    own: Promise, allowed: list[str]
) -> None:
    default, found = resolved(own)
    assert (default, sorted(found)) == (own.name, allowed)
    assert best(found.values()).name == own.name


def test_a_rule_grants_a_class_above() -> None:
    _, found = resolved(BATCH, Rule("interactive", ttft_ms=500))
    assert found["interactive"] == Promise("interactive", 0, 500, 100, 300, 990_000)
    assert best(found.values()).name == "interactive"


@pytest.mark.parametrize(
    "other", [Rule("interactive", deployment="d2"), Rule("interactive", key="k2"), Rule("gold")]
)
def test_rules_of_others_and_of_classes_that_are_no_more_say_nothing(other: Rule) -> None:
    assert resolved(BATCH, other) == resolved(BATCH)


def test_the_narrower_rule_speaks_last_whatever_their_order() -> None:
    """Project, then deployment, then key, then key and deployment; each changes only what it names."""
    rules = [
        Rule("standard", ttft_ms=1, itl_ms=1, deadline_s=1, objective_ppm=510_000, is_default=True),
        Rule("standard", deployment="d1", itl_ms=2, deadline_s=2, objective_ppm=520_000),
        Rule("standard", key="k1", deadline_s=3, objective_ppm=530_000),
        Rule("standard", key="k1", deployment="d1", objective_ppm=540_000),
        Rule("batch", key="k1", is_default=True),
    ]
    for order in (rules, rules[::-1]):
        default, found = resolved(INTERACTIVE, *order)
        assert default == "batch"
        assert found["standard"] == Promise("standard", 1, 1, 2, 3, 540_000)
        assert resolved(INTERACTIVE, *order, key="k9")[0] == "standard"


def test_who_can_wait_is_told_by_the_target() -> None:
    assert [each.can_wait for each in CLASSES] == [False, False, True, True]
