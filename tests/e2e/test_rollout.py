"""A new profile on the whole product under load: a bad one goes back by itself, a good one goes through, none fails."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from benchmarks.stack import BenchStack, bench_stack

pytestmark = [pytest.mark.stack, pytest.mark.full, pytest.mark.timeout(600)]
N_CLIENTS = 6
WITHIN_S = 150.0
LIMITS = {"tolerance": 0.2, "slower_tolerance": 0.4, "min_requests": 15, "step_max_s": 120}


@pytest.fixture(scope="module")
def toy() -> Iterator[BenchStack]:
    with bench_stack("toy") as running:
        yield running


class Load:
    """Clients that ask one after the other, half of them streaming, until told to stop."""

    def __init__(self, stack: BenchStack, model: str) -> None:
        self.n_answered = 0
        self.failures: list[str] = []
        self._stack, self._model = stack, model
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(N_CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def _ask(self, number: int) -> None:
        facts, streams = self._stack.facts, number % 2 == 0
        with httpx.Client(headers={"Authorization": f"Bearer {facts.api_key}"}, timeout=60) as client:
            while not self._stop.is_set():
                body = {
                    "model": self._model, "messages": [{"role": "user", "content": f"tell {number}"}],
                    "max_tokens": 12, "stream": streams,
                }  # fmt: skip
                try:
                    answer = client.post(f"{facts.base_url}/chat/completions", json=body)
                    done = answer.status_code == 200 and (
                        "data: [DONE]" in answer.text and '"error"' not in answer.text
                        if streams
                        else bool(answer.json()["choices"][0]["finish_reason"])
                    )
                except (httpx.HTTPError, KeyError, ValueError) as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                    continue
                if done:
                    self.n_answered += 1
                else:
                    self.failures.append(f"{answer.status_code} {answer.text[-300:]}")


def shell(stack: BenchStack, code: str) -> Any:
    """The last line that `code` prints, as JSON; run as the house."""
    return json.loads(stack.manage("shell", "-c", code).strip().splitlines()[-1])


def rolled_out(stack: BenchStack, name: str, profile: dict[str, Any]) -> dict[str, Any]:
    """Begin a rollout of `profile` and wait for its end."""
    begun = shell(
        stack,
        "import json\n"
        "from controlplane.deployments.models import Deployment\n"
        "from controlplane.policy.canary import Limits\n"
        "from controlplane.rollouts import services\n"
        f"d = Deployment.objects.get(name={name!r})\n"
        "r = services.begin(organization_id=d.organization_id, deployment_id=d.id, "
        f"engine_profile={profile!r}, steps_ppm=(300_000,), limits=Limits(**{LIMITS!r}))\n"
        "print(json.dumps(str(r.id)))",
    )
    deadline_s = time.monotonic() + WITHIN_S
    row: dict[str, Any] = {}
    while time.monotonic() < deadline_s:
        row = shell(
            stack,
            "import json\n"
            "from controlplane.rollouts.models import Rollout\n"
            f"r = Rollout.objects.get(id={begun!r})\n"
            "print(json.dumps({'state': r.state, 'verdict': r.verdict, 'evidence': r.evidence, "
            "'profile': r.deployment.engine_profile}))",
        )
        if row["state"] in ("promoted", "rolled_back"):
            return row
        time.sleep(1)
    raise AssertionError(f"not decided within {WITHIN_S:.0f} s: {row}")


def test_bad_versions_go_back_and_a_good_one_goes_through_while_nobody_fails(toy: BenchStack) -> None:
    base = {"engine": "toy", "toy_step_ms": 10.0, "max_num_seqs": 16}
    options = [f"--profile={name}={json.dumps(value)}" for name, value in base.items()]
    toy.manage("deploy", "tried", "--model", "toy", "--min", "1", "--max", "2", *options)
    with Load(toy, "tried") as load:
        deadline_s = time.monotonic() + 60
        while load.n_answered < 50:
            assert time.monotonic() < deadline_s, load.failures[:3]
            time.sleep(0.1)
        failing = rolled_out(toy, "tried", {**base, "toy_fail_every": 2})
        assert (failing["state"], "errors" in failing["verdict"]) == ("rolled_back", True), failing
        slow = rolled_out(toy, "tried", {**base, "toy_step_ms": 60.0})
        assert (slow["state"], "slower" in slow["verdict"]) == ("rolled_back", True), slow
        good = rolled_out(toy, "tried", {**base, "max_num_seqs": 24})
        assert (good["state"], good["profile"]["max_num_seqs"]) == ("promoted", 24), good
    for name, row in (("failing", failing), ("slow", slow), ("good", good)):
        print(name, row["state"], row["verdict"], row["evidence"][-1]["seen"])
    print(f"{load.n_answered} answered, {len(load.failures)} failed")
    assert not load.failures, load.failures[:5]
