"""`manage.py explain decision`: what was seen and passed over, why, and whether it would be decided again."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from autoscaler import explaining
from autoscaler.models import Decision, PoolDecision
from autoscaler.policyversion import policy_version
from infra.providers.base import Offering
from tests.autoscaler.conftest import Scaling

SPOT = Offering(instance_type="g6.xlarge", zone="z-a", is_spot=True, price_nano_per_h=300_000_000)
OTHER = replace(SPOT, zone="z-b", price_nano_per_h=350_000_000)
COVER = replace(SPOT, is_spot=False, price_nano_per_h=805_000_000)


def _run(*args: str) -> str:
    out = StringIO()
    call_command("explain", *args, stdout=out)
    return out.getvalue()


@pytest.fixture
def bought(scaling: Scaling) -> Scaling:
    """A machine was bought from a market and a replica ordered on it."""
    scaling.provider.kinds = [OTHER, COVER, SPOT]
    scaling.provider.exhausted = {SPOT.name: "InsufficientInstanceCapacity"}
    scaling.configure(max_machines=2)
    scaling.queue("a")
    scaling.tick()
    return scaling


def test_a_decision_tells_what_was_seen_passed_over_ordered_and_that_it_replays(bought: Scaling) -> None:
    launch = Decision.objects.earliest("at", "id")
    said = _run("decision", str(launch))
    assert "1 request waiting" in said
    assert "* a new one  one machine more: 0 of 2 exist" in said
    assert "* 1 " in said
    assert "because nothing serves 1 waiting requests" in said
    assert "order   launch machine" in said
    assert f"policy {policy_version()}" in said
    assert "decided again on the stored inputs by the same policy: the same result" in said
    purchase = PoolDecision.objects.get()
    assert f"manage.py explain decision {purchase}" in said


def test_a_purchase_tells_every_offer_and_what_it_would_have_cost(bought: Scaling) -> None:
    purchase = PoolDecision.objects.get()
    told = json.loads(_run(str(purchase), "--json"))
    assert told["kind"] == "purchase"
    assert [(a["subject"], a["chosen"]) for a in told["alternatives"]] == [
        (SPOT.name, True),
        (OTHER.name, True),
        (COVER.name, True),
    ]
    assert "0.3000 $/h" in told["alternatives"][0]["why"]
    assert told["replay"] == {
        "same": True,
        "differences": [],
        "policy_version": policy_version(),
        "words": "decided again on the stored inputs by the same policy: the same result",
    }
    assert f"ask for {SPOT.name}, then {OTHER.name}" in _run(str(purchase))
    # The next purchase leaves out what has refused, and says so.
    from autoscaler import market
    from controlplane import ids

    market.plan(bought.provider, bought.house.config, "c0", command_id=ids.new_id())
    later = PoolDecision.objects.latest("at")
    refused = next(a for a in later.alternatives if a["subject"] == SPOT.name)
    assert not refused["chosen"]
    assert "it refused, and is asked again in" in refused["why"]


def _changed(row: Decision, **fields: object) -> Decision:
    from controlplane import ids

    copy = Decision(**{f.name: getattr(row, f.name) for f in Decision._meta.fields if f.name != "id"})
    for name, value in {"tick_id": ids.new_id(), **fields}.items():
        setattr(copy, name, value)
    copy.save(force_insert=True)
    return copy


def test_a_decision_that_would_be_another_today_is_told_and_why(scaling: Scaling) -> None:
    scaling.queue("a")
    scaling.tick()
    row = Decision.objects.earliest("at", "id")
    with pytest.raises(CommandError, match=r"the same policy decides otherwise: orders\. That is a defect"):
        _run(str(_changed(row, commands=[])))
    with pytest.raises(
        CommandError, match="the policy has changed since, and decides otherwise today: reasons"
    ):
        _run(str(_changed(row, reasons=["because"], policy_version="0" * 16)))
    old = _changed(row, memory_out={"n_commands": 3}, policy_version="", alternatives=[])
    assert explaining.replay(old).words.startswith("the present policy decides otherwise (memory)")
    unread = _changed(row, observation={"now_s": "soon"})
    assert explaining.replay(unread).differences[0].startswith("its inputs cannot be read any more")


def test_a_later_policy_that_agrees_is_said_to(scaling: Scaling) -> None:
    scaling.queue("a")
    scaling.tick()
    row = _changed(Decision.objects.earliest("at", "id"), policy_version="0" * 16)
    assert "by a later policy: the same result" in _run(str(row))


def test_giving_up_tells_which_replicas_were_weighed(scaling: Scaling) -> None:
    scaling.serving()
    scaling.change(deleted_at=timezone.now())
    scaling.tick()
    row = Decision.objects.latest("at", "id")
    assert [c["kind"] for c in row.commands] == ["drain_replica"]
    said = _run(str(row))
    assert "which to give up" in said
    assert f"* rep_{scaling.replica().id.hex}  ready" in said


@pytest.mark.parametrize(
    "words", [("decision", "dec_1"), ("dec_" + "0" * 32,), ("both", "dec_1"), ("a", "b", "c")]
)
def test_wrong_ids_are_explained(scaling: Scaling, words: tuple[str, ...]) -> None:
    with pytest.raises(CommandError, match=r"dec_<32 hex digits>|kept for some days|give one id"):
        _run(*words)
