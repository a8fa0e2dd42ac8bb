"""What LiteLLM's limits, budgets, lists of models and configuration mean here, without a database."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from controlplane.litellm import proxyconfig
from controlplane.litellm.reach import both, models_of, scopes_of
from controlplane.litellm.source import SourceError, _array, _unescaped
from controlplane.litellm.spending import nano, spending_of, window_of
from controlplane.policy.periods import Period


@pytest.mark.parametrize(
    ("duration", "window"),
    [
        ("1d", (Period.DAY, None)),
        ("24h", (Period.DAY, None)),
        ("daily", (Period.DAY, None)),
        ("7d", (Period.WEEK, None)),
        ("1w", (Period.WEEK, None)),
        ("30d", (Period.MONTH, None)),
        ("1mo", (Period.MONTH, None)),
        ("monthly", (Period.MONTH, None)),
        ("12h", (Period.ROLLING, 12)),
        ("14d", (Period.ROLLING, 336)),
        ("90d", (Period.ROLLING, 2160)),
        ("30m", (Period.ROLLING, 1)),
        ("365d", (Period.TOTAL, None)),
        ("0d", (Period.TOTAL, None)),
        ("soon", (Period.TOTAL, None)),
    ],
)
def test_a_duration_is_the_window_it_is_there(duration: str, window: tuple[Period, int | None]) -> None:
    assert window_of(duration) == window


def told_of(row: Any, shared: Any = None, spent: str = "0", counts: str = "total") -> tuple[Any, list[str]]:
    told: list[str] = []
    found = spending_of(row, shared, Decimal(spent), counts, lambda what, remedy: told.append(what))
    return found, told


def test_dollars_are_exact_and_never_negative_or_endless() -> None:
    assert nano(0.1) == 100_000_000 and nano(Decimal("25.123456789")) == 25_123_456_789
    assert nano("1e-10") == 0 and nano(-5) == 0 and nano("NaN") == 0
    assert nano("Infinity") == nano(1e30) == (1 << 63) - 1


def test_a_budget_for_good_is_less_what_was_spent() -> None:
    found, _ = told_of(SimpleNamespace(max_budget=10), spent="12.5")
    assert found.limits.budget_nano == 0
    assert told_of(SimpleNamespace(max_budget=10), spent="2.5")[0].limits.budget_nano == 7_500_000_000
    found, told = told_of(SimpleNamespace(max_budget=10, budget_duration="365d"), spent="4")
    assert found.limits.budget_nano == 6_000_000_000 and "for good" in told[0]


def test_own_limits_come_before_shared_ones() -> None:
    shared = SimpleNamespace(max_budget=4, rpm_limit=7, budget_duration="1d")
    found, _ = told_of(SimpleNamespace(rpm_limit=5), shared)
    assert (found.limits.rpm, found.limits.budget_nano) == (5, None)
    assert [(b.limit_nano, b.period) for b in found.budgets] == [(4_000_000_000, Period.DAY)]


def test_several_windows_and_budgets_of_models_are_budgets_each() -> None:
    row = SimpleNamespace(
        budget_limits=[
            {"budget_duration": "1d", "max_budget": 1},
            {"budget_duration": "30d", "max_budget": 9},
        ],
        model_max_budget={"a": {"budget_limit": 2, "time_period": "7d"}, "b": 3},
    )
    found, _ = told_of(row)
    assert [(b.period, b.model, b.limit_nano // 10**9) for b in found.budgets] == [
        (Period.DAY, "", 1), (Period.MONTH, "", 9), (Period.WEEK, "a", 2), (Period.TOTAL, "b", 3),
    ]  # fmt: skip
    assert found.limits.budget_nano is None


@pytest.mark.parametrize(
    ("counts", "limits"), [("total", (9, 9)), ("input", (9, None)), ("output", (None, 9))]
)
def test_tokens_per_minute_are_those_that_are_counted(counts: str, limits: tuple[Any, Any]) -> None:
    found, told = told_of(SimpleNamespace(tpm_limit=9), counts=counts)
    assert (found.limits.input_tpm, found.limits.output_tpm) == limits
    assert bool(told) == (counts == "total")
    huge, told = told_of(SimpleNamespace(rpm_limit=10**12))
    assert huge.limits.rpm == 2**31 - 1 and "became" in told[0]


def test_allowed_models_are_those_that_all_levels_allow() -> None:
    def no_group(_: str) -> tuple[str, ...]:
        return ()

    assert models_of([], no_group) is None
    assert models_of(["all-team-models", "x"], no_group) is None
    assert models_of(["no-default-models"], no_group) == ()
    assert models_of(["big", "x"], lambda name: ("a", "b") if name == "big" else ()) == ("a", "b", "x")
    assert both(None, ("a",)) == both(("a",), None) == ("a",)
    assert both(("a", "x/*"), ("a", "x/1", "y")) == ("a", "x/1")
    assert both(("x/1/*",), ("x/*",)) == ("x/1/*",)
    assert both(("a",), ("b",)) == (), "nothing, and not everything"


@pytest.mark.parametrize(
    ("routes", "expected"),
    [
        ([], None),
        (["llm_api_routes"], None),
        (["/chat/completions", "/v1/models"], ("chat", "models", "requests")),
        (["info_routes"], ("models",)),
        (["/v1/embeddings"], ()),
    ],
)
def test_routes_are_those_of_v1(routes: list[str], expected: tuple[str, ...] | None) -> None:
    told: list[str] = []
    found = scopes_of(("good", "not good"), routes, lambda what, remedy: told.append(what))
    assert found.routes == expected
    assert found.models == ("good",) and "not good" in told[0], "less, never more"
    assert not list(found.problems())


def test_cells_of_a_dump_are_read_as_postgres_wrote_them() -> None:
    assert _unescaped(r"a\tb\\n\nc") == "a\tb\\n\nc"
    assert _array("{}") == []
    assert _array('{a,"b,c","d\\"e",NULL,"NULL"}') == ["a", "b,c", 'd"e', "NULL"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "must hold a mapping"),
        ("model_list: [", "is no YAML in line"),
        ("model_list: [{model_name: x}]", r"model_list\[0\] needs model_name and litellm_params.model"),
        ("router_settings: 3", "router_settings must be a mapping"),
    ],
)
def test_a_configuration_that_is_none_is_told(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(SourceError, match=message):
        proxyconfig.read(path)
    with pytest.raises(SourceError, match="cannot be read"):
        proxyconfig.read(tmp_path / "none.yaml")


def test_an_empty_configuration_is_one(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("general_settings: {}\nmodel_list:\n")
    assert proxyconfig.read(path).models == ()
