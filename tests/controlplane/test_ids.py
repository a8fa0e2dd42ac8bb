"""Ids in their three forms."""

from datetime import UTC, date, datetime
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane import ids


@given(st.uuids(), st.sampled_from(ids.Prefix))
def test_text_form_round_trips(value: UUID, prefix: ids.Prefix) -> None:
    text = ids.to_text(prefix, value)
    assert text.startswith(f"{prefix}_") and len(text) == len(prefix) + 33
    assert ids.from_text(prefix, text) == value
    assert ids.from_wire(value.hex) == value


@pytest.mark.parametrize(
    "text",
    ["", "dep_", "org_" + "a" * 32, "dep_" + "A" * 32, "dep_" + "a" * 31, "dep_" + "a" * 32 + "\n", "a" * 32],
)
def test_another_kind_or_shape_is_refused_with_the_shape_that_was_expected(text: str) -> None:
    with pytest.raises(ids.InvalidIdError, match="dep_<32 hex digits>"):
        ids.from_text(ids.Prefix.DEPLOYMENT, text)


def test_ids_sort_by_the_time_of_their_making() -> None:
    made = [ids.new_id() for _ in range(1000)]
    assert made == sorted(made)
    assert len(set(made)) == 1000


def test_the_day_is_the_one_in_utc() -> None:
    last_ms = int(datetime(2026, 11, 20, 23, 59, 59, 999_000, tzinfo=UTC).timestamp() * 1000)
    assert ids.day_of(_uuid7_at(last_ms)) == date(2026, 11, 20)
    assert ids.day_of(_uuid7_at(last_ms + 1)) == date(2026, 11, 21)


def test_an_id_without_a_time_has_no_day() -> None:
    with pytest.raises(ids.InvalidIdError, match="UUIDv7"):
        ids.day_of(uuid4())


def _uuid7_at(ms: int) -> UUID:
    return UUID(int=(ms << 80) | (7 << 76) | (2 << 62) | 1)
