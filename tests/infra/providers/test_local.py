"""Machines as processes: one per token, found again, ended whole, no secret where others can read it."""

import json
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.local.process import find_marked, identity_of, is_alive
from infra.providers.base import CapacityError, LaunchSpec, ProviderState
from infra.providers.local import KEEP_TERMINATED, MARK, LocalProvider, give_notice, read_agent_pid

DUMMY = Path(__file__).with_name("dummy_agent.py")
SECRETS = {"CORRAL_SECRET_KEY": "s3cret", "CORRAL_REDIS_URL": "redis://u:s3cret@h/0", "AWS_SECRET": "s3cret"}


def _spec(machine_id: str = "a1" * 16, proof: str = "the-proof") -> LaunchSpec:
    return LaunchSpec(
        machine_id=machine_id,
        cell="c0",
        enrol_url="http://127.0.0.1:1/internal/enrol",
        engine="toy",
        proof=proof,
    )


@pytest.fixture
def provide(tmp_path: Path) -> Iterator[Callable[..., LocalProvider]]:
    """Providers over one directory, whose machines are ended after the test."""
    made: list[LocalProvider] = []

    def make(mode: str = "obedient", **options: Any) -> LocalProvider:
        options = {"capacity": 2, "grace_s": 0.5, "environ": {**os.environ, **SECRETS}, **options}
        command = (sys.executable, str(DUMMY), mode)
        made.append(LocalProvider(tmp_path / "machines", command=command, **options))
        return made[-1]

    yield make
    for provider in made:
        for machine in provider.describe():
            provider.terminate(machine.ref)


def _called(provider: LocalProvider, machine_id: str = "a1" * 16) -> dict[str, Any]:
    path = provider.root / machine_id / "called"
    deadline_s = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline_s, (provider.root / machine_id / "agent.log").read_text()
        time.sleep(0.02)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_launch_starts_an_agent_with_what_it_needs_and_nothing_else(
    provide: Callable[..., LocalProvider],
) -> None:
    provider = provide()
    machine = provider.launch(_spec(), "token-1")
    assert machine.state is ProviderState.RUNNING
    called = _called(provider)
    directory = provider.root / machine.machine_id
    assert called["args"] == [
        *("--machine-id", "a1" * 16, "--enrol-url", "http://127.0.0.1:1/internal/enrol", "--cell", "c0"),
        *("--var", str(directory), "--engine", "toy"),
    ]
    assert called["env"]["CORRAL_ENROL_PROOF"] == "the-proof"
    assert called["env"][MARK] == "a1" * 16
    assert "s3cret" not in json.dumps(called)
    assert "the-proof" not in json.dumps(called["args"])
    for path in (directory / "machine.json", directory / "agent.pid", directory / "agent.log"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert "the-proof" not in path.read_text()


def test_agent_pid_names_the_live_process_in_its_own_session(provide: Callable[..., LocalProvider]) -> None:
    provider = provide()
    machine = provider.launch(_spec(), "token-1")
    agent = read_agent_pid(provider.root / machine.ref / "agent.pid")
    assert agent is not None
    assert is_alive(agent)
    assert os.getsid(agent.pid) == agent.pid


def test_the_same_token_is_the_same_machine_also_for_another_process(
    provide: Callable[..., LocalProvider],
) -> None:
    first = provide().launch(_spec(), "token-1")
    again = provide().launch(_spec("b2" * 16), "token-1")
    assert again == first
    assert len(provide().describe()) == 1


def test_a_launch_that_died_before_its_record_is_found_by_its_mark(
    provide: Callable[..., LocalProvider],
) -> None:
    provider = provide()
    machine = provider.launch(_spec(), "token-1")
    _called(provider)
    (provider.root / machine.ref / "agent.pid").unlink()
    assert provider.launch(_spec(), "token-1").state is ProviderState.RUNNING
    assert len(find_marked(f"{MARK}={machine.ref}")) == 1


def test_capacity_is_an_error_of_its_own(provide: Callable[..., LocalProvider]) -> None:
    provider = provide(capacity=1)
    provider.launch(_spec(), "token-1")
    with pytest.raises(CapacityError, match="1 of 1 machines"):
        provider.launch(_spec("b2" * 16), "token-2")


@pytest.mark.parametrize("mode", ["obedient", "stubborn", "with-child"])
def test_terminate_ends_everything_of_the_machine(provide: Callable[..., LocalProvider], mode: str) -> None:
    provider = provide(mode)
    machine = provider.launch(_spec(), "token-1")
    _called(provider)
    provider.terminate(machine.ref)
    assert find_marked(f"{MARK}={machine.ref}") == []
    assert [m.state for m in provider.describe()] == [ProviderState.GONE]
    provider.terminate(machine.ref)  # again is fine
    with pytest.raises(CapacityError, match="was terminated"):
        provider.launch(_spec(), "token-1")


def test_a_terminated_machine_leaves_its_place_and_its_log(provide: Callable[..., LocalProvider]) -> None:
    provider = provide(capacity=1)
    for n in range(KEEP_TERMINATED + 2):
        machine = provider.launch(_spec(f"{n:032x}"), f"token-{n}")
        _called(provider, machine.ref)
        provider.terminate(machine.ref)
    kept = sorted(path.name for path in provider.root.glob("*/agent.log"))
    assert len(list(provider.root.glob("*/terminated"))) == KEEP_TERMINATED
    assert kept


def test_a_dead_agent_is_seen_and_started_again_without_a_proof(
    provide: Callable[..., LocalProvider],
) -> None:
    provider = provide()
    machine = provider.launch(_spec(), "token-1")
    _called(provider)
    agent = read_agent_pid(provider.root / machine.ref / "agent.pid")
    assert agent is not None
    os.kill(agent.pid, signal.SIGKILL)
    deadline_s = time.monotonic() + 10
    while provider.describe()[0].state is not ProviderState.AGENT_DOWN:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    (provider.root / machine.ref / "called").unlink()
    assert provider.restart_agent(machine.ref)
    assert "CORRAL_ENROL_PROOF" not in _called(provider)["env"]
    assert provider.describe()[0].state is ProviderState.RUNNING
    assert identity_of(agent.pid) is None


def test_a_machine_under_notice_makes_room_and_is_taken_when_it_ends(
    provide: Callable[..., LocalProvider],
) -> None:
    provider = provide(capacity=1)
    leaving = provider.launch(_spec(), "token-1")
    _called(provider)
    give_notice(provider.root / leaving.ref, 3600)
    assert provider.describe()[0].state is ProviderState.RUNNING
    other = provider.launch(_spec("b2" * 16), "token-2")
    give_notice(provider.root / leaving.ref, -1)
    states = {machine.ref: machine.state for machine in provider.describe()}
    assert states == {leaving.ref: ProviderState.GONE, other.ref: ProviderState.RUNNING}
    assert find_marked(f"{MARK}={leaving.ref}") == []
    assert not provider.restart_agent(leaving.ref), "nobody starts it again"


def test_a_terminated_or_unknown_machine_is_not_restarted(provide: Callable[..., LocalProvider]) -> None:
    provider = provide()
    machine = provider.launch(_spec(), "token-1")
    provider.terminate(machine.ref)
    assert not provider.restart_agent(machine.ref)
    assert not provider.restart_agent("c3" * 16)


def test_damaged_records_are_nobodys_machine(provide: Callable[..., LocalProvider]) -> None:
    provider = provide()
    provider.launch(_spec(), "token-1")
    broken = provider.root / ("d4" * 16)
    broken.mkdir()
    (broken / "machine.json").write_text("{")
    assert [m.machine_id for m in provider.describe()] == ["a1" * 16]


def test_ids_that_are_paths_are_refused(provide: Callable[..., LocalProvider]) -> None:
    with pytest.raises(ValueError, match="letters and digits"):
        provide().launch(_spec("../../etc"), "token-1")
