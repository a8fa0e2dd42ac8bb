"""A machine that is replaced leaves as one whose provider takes it away, and whoever orders its successor is woken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from django.utils import timezone

from autoscaler import launch, replacing
from autoscaler.models import Machine, MachineState
from autoscaler.replacing import NotReplacedError, replace_all
from tests.autoscaler.conftest import Scaling
from workers.agent.notice import read_notice


def test_it_drains_its_deployment_is_ticked_and_a_local_one_makes_room(
    scaling: Scaling, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    scaling.serving()
    Machine.objects.update(provider="local")
    cell, machine = scaling.house.cell, scaling.machine()
    (tmp_path / "machines" / machine.id.hex).mkdir(parents=True)
    with cell.redis.pubsub(ignore_subscribe_messages=True) as heard:
        heard.subscribe(cell.keys.invalidate_channel)
        heard.get_message(timeout=1)
        replacing.leave(machine, cell, tmp_path, 30.0)
        said: list[bytes] = []
        eventually(lambda: (m := heard.get_message(timeout=0.1)) and not said.append(m["data"]), "it is told")
    assert said == [f"dep:{scaling.deployment.id.hex}".encode()]
    leaving = scaling.machine()
    assert (leaving.state, leaving.reason) == (MachineState.DRAINING, "it is replaced")
    assert leaving.ends_at is not None and 25 < (leaving.ends_at - timezone.now()).total_seconds() <= 30
    notice = read_notice(tmp_path / "machines" / machine.id.hex / "notice.json")
    assert notice is not None
    Machine.objects.update(provider="fake")
    scaling.beat(scaling.replica(), 1)
    scaling.tick()
    assert Machine.objects.exclude(state=MachineState.GONE).count() == 2, "its successor is ordered"


def test_all_are_replaced_in_turn_and_one_that_stays_is_named(
    scaling: Scaling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling.serving()
    machine, said = scaling.machine(), list[str]()
    monkeypatch.setattr(replacing, "_AFTERWARDS_S", 0.0)
    with pytest.raises(NotReplacedError, match=machine.id.hex):
        replace_all(scaling.house.cell, "fake", tmp_path, within_s=0.3, say=said.append)
    Machine.objects.update(state=MachineState.READY, ends_at=None)
    monkeypatch.setattr(replacing, "leave", lambda m, *_: launch.gone(m.id, "given back", scaling.house.cell))
    assert replace_all(scaling.house.cell, "fake", tmp_path, within_s=5.0, say=said.append) == 1
    assert "1 of 1" in said[0]
