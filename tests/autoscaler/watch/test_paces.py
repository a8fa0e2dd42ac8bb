"""What gateways are told of a replica's speed before they saw it: the performance model's word, or nothing."""

from __future__ import annotations

import pytest

from autoscaler.models import Machine, Offer, Replica
from autoscaler.watch import paces, table
from controlplane.policy.gpus import GPUS
from controlplane.policy.models import MODELS
from controlplane.policy.pace import Pace, Speed
from controlplane.prediction.perf.coefficients import coefficients
from tests.autoscaler.conftest import Scaling
from workers.engine.base import EngineProfile

LLAMA = {
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096,
    "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip


def test_it_is_what_the_fitted_model_says_of_that_model_and_gpu() -> None:
    found = paces.speed(EngineProfile(dtype="bfloat16"), LLAMA, "h100_sxm")
    assert found is not None
    step = coefficients().step_model(MODELS["llama-3.1-8b"], GPUS["h100_sxm"])
    pace = Pace(*found)
    assert pace.first_s(1_000) == pytest.approx(
        step.prefill_s(1_000), rel=0.25
    )  # embeddings are multiplied by no prompt
    assert pace.step_s == pytest.approx(step.step_s(0, 0.0, 16, 16_000), rel=0.05)


def test_another_card_width_or_split_is_another_speed() -> None:
    plain = paces.speed(EngineProfile(dtype="bfloat16"), LLAMA, "h100_sxm")
    assert plain is not None
    for profile, gpu, slower in (
        (EngineProfile(dtype="bfloat16"), "l4", True),
        (EngineProfile(dtype="float32"), "h100_sxm", True),
        (EngineProfile(dtype="bfloat16", tensor_parallel_size=2), "h100_sxm", False),
    ):
        found = paces.speed(profile, LLAMA, gpu)
        assert found is not None
        assert (found.step_s > plain.step_s) == slower


@pytest.mark.parametrize(("config", "gpu"), [(None, "h100_sxm"), (LLAMA, ""), (LLAMA, "abacus"), ({}, "l4")])
def test_what_nobody_described_is_not_told(config: dict[str, int] | None, gpu: str) -> None:
    assert paces.speed(EngineProfile(), config, gpu) is None
    assert paces.speed(EngineProfile(), {"hidden_size": -1}, "l4") is None


def test_the_toy_engine_is_as_slow_as_it_is_told() -> None:
    toy = EngineProfile(engine="toy", toy_step_ms=20, toy_seq_ms=1, toy_prefill_ms=50)
    assert paces.speed(toy, None, "") == Speed(0.021, 5e-5, 0.036)


def test_the_watcher_knows_it_by_what_a_replica_runs_and_what_its_machine_was_bought_as(
    scaling: Scaling, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling.queue("a")
    scaling.tick()
    replica, machine = scaling.replica(), scaling.machine()
    toy = EngineProfile.from_json(replica.spec["profile"])
    found = table.read(machine.cell, 1).replicas[replica.id.hex].pace
    assert toy.engine == "toy" and found
    assert Speed.parse(found.encode()) == pytest.approx(paces.speed(toy, None, ""), rel=1e-4)
    monkeypatch.setattr(paces, "_config", {replica.spec["model_digest"]: LLAMA}.get)
    profile = EngineProfile(dtype="bfloat16")
    Replica.objects.filter(id=replica.id).update(
        spec={**replica.spec, "profile": profile.to_json()}, spec_digest="paces-test"
    )
    Machine.objects.filter(id=machine.id).update(offering="spot/z/g6.xlarge")
    Offer.objects.create(
        cell=machine.cell, provider=machine.provider, name="spot/z/g6.xlarge", instance_type="g6.xlarge",
        zone="z", is_spot=True, gpu="l4", n_gpus=1, price_nano_per_h=1, priced_at=machine.created_at,
    )  # fmt: skip
    found = table.read(machine.cell, 1).replicas[replica.id.hex].pace
    assert Speed.parse(found.encode()) == pytest.approx(paces.speed(profile, LLAMA, "l4"), rel=1e-4)
