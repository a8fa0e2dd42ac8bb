"""Replicas of one machine on GPUs of their own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from workers.agent import gpus
from workers.agent.known import Limits
from workers.agent.replicas import Replicas
from workers.agent.zygote_client import Zygote
from workers.config import AgentConfig, ServeTuning
from workers.contract import ReplicaSpec

FOUR = ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("taken", "n", "given"),
    [
        ([], 1, ["0"]),
        ([["0"], ["2"]], 1, ["1"]),
        ([["0", "1"]], 2, ["2", "3"]),
        ([["1"]], 2, ["0", "2"]),
        ([["0"], ["1"], ["2"], ["3"], ["1"]], 1, ["0"]),  # more replicas than GPUs: they share
        ([], 4, []),  # all of them
        ([], 0, []),
    ],
)
def test_a_replica_gets_what_fewest_use(taken: list[list[str]], n: int, given: list[str]) -> None:
    assert gpus.assign(FOUR, taken, n) == given


def test_what_a_profile_takes_and_a_machine_has(tmp_path: Path) -> None:
    assert gpus.needed({"tensor_parallel_size": 2, "data_parallel_size": 2}) == 4
    assert gpus.needed({"engine": "toy"}) == 0
    assert gpus.devices({"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b"}) == ["GPU-a", "GPU-b"]
    for name in ("0000:17:00.0", "0000:65:00.0"):
        (tmp_path / name).mkdir()
    assert gpus.devices({}, tmp_path) == ["0", "1"]
    assert gpus.devices({}, tmp_path / "none") == []


async def test_replicas_of_a_machine_never_share_a_gpu_nor_after_its_agent_was_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(FOUR))
    config = AgentConfig(
        machine="m1", enrol_url="http://x", var_dir=tmp_path, model_cache=tmp_path / "models"
    )
    config.dirs.create()

    def agent() -> Replicas:
        def nobody() -> asyncio.Future[Zygote]:
            return asyncio.get_running_loop().create_future()

        return Replicas(
            config, "c0", "redis://x", nobody, lambda status: None, limits=Limits(), tuning=ServeTuning()
        )

    def spec(name: str, tp: int) -> ReplicaSpec:
        profile: dict[str, object] = {"engine": "vllm", "tensor_parallel_size": tp}
        return ReplicaSpec(
            replica=name,
            deployment="d",
            model_digest="ab" * 32,
            model_source="s3://x/y",
            profile=profile,
            slots=1,
        )

    first = agent()
    wanted = {"r1": spec("r1", 1), "r2": spec("r2", 2)}
    first.reconcile(wanted)
    forks = {name: first._fork_spec(first._known[name], None).env for name in wanted}
    assert forks == {"r1": {"CUDA_VISIBLE_DEVICES": "0"}, "r2": {"CUDA_VISIBLE_DEVICES": "1,2"}}

    second = agent()  # what ran goes on
    second.reconcile({**wanted, "r3": spec("r3", 1)})
    assert second._fork_spec(second._known["r3"], None).env == {"CUDA_VISIBLE_DEVICES": "3"}
    for replicas in (first, second):
        for known in replicas._known.values():
            if known.task is not None:
                known.task.cancel()
