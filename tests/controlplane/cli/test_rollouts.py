"""`corral profile` and `corral rollouts`: why a deployment runs so, and trying something else."""

from __future__ import annotations

from tests.controlplane.cli.conftest import Corral
from tests.world import World, make_deployment


def test_a_profile_is_shown_with_reasons_and_a_rollout_begun_ordered_and_listed(
    corral: Corral, world: World
) -> None:
    make_deployment(
        world,
        engine_profile={"engine": "toy", "max_num_seqs": 8},
        profile_reasons={"max_num_seqs": "two cores only"},
    )
    shown = corral.run("profile", "toy-chat").stdout
    print(shown)
    assert "profile 1 on cpu, class interactive" in shown
    assert "8* two cores only" in shown
    assert "had no rollout" in corral.run("rollouts", "pause", "toy-chat", status=1).stderr
    begun = corral.run(
        "rollouts", "begin", "toy-chat", "--set", "max_num_seqs=16", "--share", "5", "--reason", "more at once", "-y"
    ).stdout  # fmt: skip
    assert "Trying profile 2 of toy-chat: rlo_" in begun
    assert "open already" in corral.run(
        "rollouts", "begin", "toy-chat", "--set", "max_num_seqs=32", "-y", status=1
    ).output  # fmt: skip
    assert "starting" in corral.run("rollouts", "pause", "toy-chat").stdout
    corral.run("rollouts", "abort", "toy-chat")
    listed = corral.run("rollouts", "list", "toy-chat").stdout
    print(listed)
    assert "starting (paused)" in listed
    assert "wanted:" in corral.run("rollouts", "show", "toy-chat").stdout
    assert "two cores only" not in corral.run("profile", "toy-chat", "--number", "2").stdout
