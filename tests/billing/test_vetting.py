"""What intake believes: tables of lies, and the property that nothing a machine writes raises."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.vetting import (
    Admission,
    Delivery,
    Refusal,
    Usage,
    decode,
    first_per_request,
    vet,
)
from controlplane import ids
from tests.billing.usage import STANDARD, Tenant, altered, event, new_hex
from workers.contract import UsageEvent, encode

MACHINE = new_hex()
TENANT = Tenant()
NOW = datetime.now(tz=UTC)


def admission(usage: UsageEvent, **values: Any) -> Admission:
    defaults: dict[str, Any] = {
        "deployment": usage.deployment,
        "key": usage.key,
        "project": usage.project,
        "org": usage.org,
        "price_version": usage.price_version,
        "n_output_held": 1_000,
    }
    return Admission(**(defaults | values))


def delivery(payload: bytes = b"") -> Delivery:
    return Delivery(machine_id=MACHINE, entry_id="1-0", payload=payload)


def made_at(at: datetime) -> str:
    """A UUIDv7 of that moment."""
    return f"{int(at.timestamp() * 1000):012x}7{new_hex()[13:]}"


def test_a_true_event_is_booked_as_it_says() -> None:
    usage = event(TENANT, MACHINE)
    vetted = vet(delivery(), usage, admission(usage), NOW)
    assert isinstance(vetted, Usage)
    assert (vetted.request_id.hex, vetted.organization_id.hex) == (usage.request_id, TENANT.org)
    assert vetted.day == ids.day_of(vetted.request_id)
    assert (vetted.n_completion, vetted.capped, vetted.unverified) == (20, False, False)


LIES = [
    ({"machine": new_hex()}, Refusal.OTHER_MACHINE),
    ({"org": new_hex()}, Refusal.OTHER_REQUEST),
    ({"project": new_hex()}, Refusal.OTHER_REQUEST),
    ({"key": new_hex()}, Refusal.OTHER_REQUEST),
    ({"deployment": new_hex()}, Refusal.OTHER_REQUEST),
    ({"price_version": new_hex()}, Refusal.OTHER_REQUEST),
    ({"n_prompt": -1}, Refusal.OUT_OF_RANGE),
    ({"n_completion": 1 << 31}, Refusal.OUT_OF_RANGE),
    ({"n_cached": 101}, Refusal.OUT_OF_RANGE),
    ({"attempts": 1 << 15}, Refusal.OUT_OF_RANGE),
    ({"duration_ms": -5}, Refusal.OUT_OF_RANGE),
    ({"status": 0}, Refusal.OUT_OF_RANGE),
    ({"model": ""}, Refusal.OUT_OF_RANGE),
    ({"model": "x" * 65}, Refusal.OUT_OF_RANGE),
    ({"model": "nul\x00"}, Refusal.OUT_OF_RANGE),
    ({"admitted_at_ms": 1}, Refusal.OUT_OF_RANGE),
    ({"admitted_at_ms": 1 << 62}, Refusal.OUT_OF_RANGE),
    ({"replica": "r1"}, Refusal.BAD_ID),
]


@pytest.mark.parametrize(("lie", "refusal"), LIES)
def test_a_lie_is_refused_with_its_reason(lie: dict[str, Any], refusal: Refusal) -> None:
    usage = event(TENANT, MACHINE)
    assert vet(delivery(), altered(usage, **lie), admission(usage), NOW) is refusal


@pytest.mark.parametrize("age", [timedelta(days=36), timedelta(hours=-2)])
def test_an_event_from_another_age_is_refused(age: timedelta) -> None:
    at = NOW - age
    usage = event(TENANT, MACHINE, request_id=made_at(at), admitted_at_ms=int(at.timestamp() * 1000))
    assert vet(delivery(), usage, admission(usage), NOW) is Refusal.OUT_OF_RANGE


def test_a_late_witness_within_the_window_is_booked() -> None:
    at = NOW - timedelta(days=34)
    usage = event(TENANT, MACHINE, request_id=made_at(at), admitted_at_ms=int(at.timestamp() * 1000))
    assert isinstance(vet(delivery(), usage, None, NOW), Usage)


def test_a_tenant_never_pays_for_more_than_was_held() -> None:
    usage = event(TENANT, MACHINE, n_completion=900)
    vetted = vet(delivery(), usage, admission(usage, n_output_held=256), NOW)
    assert isinstance(vetted, Usage)
    assert (vetted.n_completion, vetted.capped) == (256, True)


def test_without_its_record_an_event_is_booked_and_marked() -> None:
    vetted = vet(delivery(), event(TENANT, MACHINE), None, NOW)
    assert isinstance(vetted, Usage)
    assert vetted.unverified


def test_a_request_without_a_replica_has_none() -> None:
    vetted = vet(delivery(), event(TENANT, MACHINE, replica=""), None, NOW)
    assert isinstance(vetted, Usage)
    assert vetted.replica_id is None


def test_an_id_that_is_no_uuid7_is_refused() -> None:
    usage = altered(event(TENANT, MACHINE), request_id="0" * 32)
    assert vet(delivery(), usage, None, NOW) is Refusal.BAD_ID


def test_of_one_request_the_first_delivery_counts() -> None:
    usage = event(TENANT, MACHINE)
    vetted = [vet(delivery(), each, None, NOW) for each in (usage, event(TENANT, MACHINE), usage)]
    assert all(isinstance(item, Usage) for item in vetted)
    first, others = first_per_request(vetted)  # type: ignore[arg-type]
    assert [id(item) for item in first] == [id(vetted[0]), id(vetted[1])]
    assert [id(item) for item in others] == [id(vetted[2])]


@given(st.binary(max_size=300))
def test_any_bytes_get_an_answer(payload: bytes) -> None:
    assert decode(delivery(payload)) in (Refusal.UNDECODABLE, Refusal.BAD_ID)


@given(cut=st.integers(0, 400), flip=st.integers(0, 255))
def test_a_damaged_event_gets_an_answer(cut: int, flip: int) -> None:
    raw = bytearray(encode(event(TENANT, MACHINE)))
    raw[cut % len(raw)] ^= flip
    decoded = decode(delivery(bytes(raw)))
    if isinstance(decoded, UsageEvent):
        assert isinstance(vet(delivery(), decoded, None, NOW), Usage | Refusal)


TEXTS = st.text(max_size=70) | st.sampled_from([new_hex(), "0" * 32, STANDARD, MACHINE])
NUMBERS = st.integers(-(2**63), 2**63 - 1)


@given(
    texts=st.fixed_dictionaries(dict.fromkeys(("request_id", "org", "replica", "machine", "model"), TEXTS)),
    numbers=st.fixed_dictionaries(
        dict.fromkeys(("n_prompt", "n_cached", "n_completion", "status", "admitted_at_ms"), NUMBERS)
    ),
)
def test_whatever_an_event_claims_gets_an_answer(texts: dict[str, str], numbers: dict[str, int]) -> None:
    claimed = altered(event(TENANT, MACHINE), **texts, **numbers)
    verdict = vet(delivery(), claimed, None, NOW)
    assert isinstance(verdict, Usage | Refusal)
    if isinstance(verdict, Usage):
        assert 0 <= verdict.n_completion < 2**31
