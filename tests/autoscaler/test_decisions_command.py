"""`manage.py decisions` shows reasons and replays."""

from io import StringIO

import pytest
from django.core.management import CommandError, call_command

from autoscaler.models import Decision
from tests.autoscaler.conftest import Scaling


def _run(*args: str) -> str:
    out = StringIO()
    call_command("decisions", *args, stdout=out)
    return out.getvalue()


def test_it_lists_decisions_with_reasons_and_orders(scaling: Scaling) -> None:
    scaling.queue("a")
    scaling.tick()
    said = _run("toy")
    assert "because nothing serves 1 waiting requests" in said
    assert said.index("launch_machine") < said.index("start_replica")
    assert _run("no-such-deployment") == ""


def test_it_replays_one(scaling: Scaling) -> None:
    scaling.queue("a")
    scaling.tick()
    assert "the same orders" in _run("--replay", str(Decision.objects.latest("at")))


def test_a_policy_that_would_decide_otherwise_is_found_out(scaling: Scaling) -> None:
    from autoscaler.management.commands.decisions import Command

    scaling.queue("a")
    scaling.tick()
    row = Decision.objects.earliest("at")
    changed = Decision(**{f.name: getattr(row, f.name) for f in Decision._meta.fields if f.name != "id"})
    changed.commands = []
    changed.tick_id = changed.id
    changed.save(force_insert=True)
    with pytest.raises(CommandError, match="orders something else"):
        Command()._replay(str(changed))


@pytest.mark.parametrize("text", ["dec_1", "rep_" + "0" * 32])
def test_wrong_ids_are_explained(scaling: Scaling, text: str) -> None:
    with pytest.raises(CommandError, match="dec_<32 hex digits>"):
        _run("--replay", text)
    with pytest.raises(CommandError, match="kept for some days"):
        _run("--replay", "dec_" + "0" * 32)
