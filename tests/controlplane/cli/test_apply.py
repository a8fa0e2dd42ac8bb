"""`corral apply`: what a file says, once; errors with their line; nothing ended unless asked for."""

from __future__ import annotations

import json
import re

import pytest

from controlplane.tenants.context import tenant
from controlplane.tenants.models import ApiKey, Project
from tests.controlplane.cli.conftest import Corral
from tests.world import World, make_replica, make_version

ALL = """
    kind: Organization
    spec: {name: Acme Inc, timezone: Europe/Berlin, limits: {rpm: 6000}}
    ---
    kind: Project
    name: research
    spec:
      title: Research
      weight: 200
      limits: {rpm: 600, budget_usd: 25.5}
    ---
    kind: Deployment
    name: chat
    project: research
    spec:
      model: toy
      engine_profile: {engine: toy}
      max_replicas: 4
    ---
    kind: Key
    name: web
    project: research
    spec: {limits: {rpm: 60}, tags: [team]}
    ---
    kind: Member
    email: bob@example.org
    spec: {role: admin}
    ---
    kind: Member
    email: new@example.org
    spec: {role: viewer}
    ---
    kind: ServiceAccount
    name: deployer
    spec: {role: developer}
    ---
    kind: Limits
    spec: {project: main, limits: {max_concurrency: 8}}
    ---
    kind: Budget
    name: team
    spec: {project: main, limit_usd: 100, period: month}
"""


@pytest.fixture(autouse=True)
def a_model(world: World) -> None:
    make_version(world.organization.id)


def test_everything_is_made_and_the_second_time_nothing(corral: Corral, world: World) -> None:
    planned = corral.apply(ALL, "--dry-run")
    assert "6 to create, 3 to change, 0 to end, 0 as they should be" in planned.output
    with tenant(world.organization.id):
        assert not Project.objects.filter(slug="research").exists()
    first = corral.apply(ALL)
    assert re.search(r"^web  sk-crl-\w{12}-\S+$", first.stdout, re.M)
    again = corral.apply(ALL)
    assert "0 to create, 0 to change, 0 to end, 9 as they should be" in again.output
    with tenant(world.organization.id):
        made = Project.objects.get(slug="research")
        assert (made.name, made.weight, made.rpm, made.budget_nano) == ("Research", 200, 600, 25_500_000_000)
        assert ApiKey.objects.get(name="web").rpm == 60


def test_a_change_is_shown_field_by_field_with_whom_it_disrupts(corral: Corral, world: World) -> None:
    corral.apply(ALL)
    from controlplane.deployments.models import Deployment

    with tenant(world.organization.id):
        deployment = Deployment.objects.select_related("model_version").get(name="chat")
    for _ in range(2):
        make_replica(deployment)
    less = ALL.replace("max_replicas: 4", "max_replicas: 1").replace("rpm: 60}", "rpm: 70}")
    shown = corral.apply(less, "--dry-run").output
    assert "~ deployment chat (research)" in shown
    assert "max_replicas: 4 → 1" in shown
    assert "! 1 replica of chat is drained" in shown
    assert "rpm: 60 → 70" in shown
    assert "0 to create, 2 to change" in shown
    told = json.loads(corral.apply(less, "--dry-run", "-o", "json").stdout)
    changed = {each["title"]: each["plans"][0]["changes"] for each in told if each["action"] == "update"}
    assert changed["deployment chat (research)"][0]["fields"][0]["after"] == 1


def test_what_no_document_names_is_ended_only_when_asked_for(corral: Corral, world: World) -> None:
    corral.apply(ALL)
    without_key = re.sub(r"    kind: Key.*?---\n", "", ALL, flags=re.S)
    assert "as they should be" in corral.apply(without_key).output
    shown = corral.apply(without_key, "--prune", "--dry-run").output
    assert "- key web (research)" in shown
    assert "key web stops working at once" in shown
    corral.apply(without_key, "--prune")
    with tenant(world.organization.id):
        assert ApiKey.objects.get(name="web").revoked_at is not None
    assert "0 to end" in corral.apply(without_key, "--prune", "--dry-run").output


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kind: Projekt\nname: x\n", "acme.yaml:1: kind: 'Projekt' is unknown, did you mean Project?"),
        (
            "kind: Project\nname: x\nspec:\n  wieght: 3\n",
            "acme.yaml:4: spec.wieght: no such field, did you mean weight?",
        ),
        ("kind: Project\nname: x\nspec: {weight: 0}\n", "acme.yaml:3: spec.weight: "),
        ("kind: Project\nname: x\nspec:\n  limits:\n    rpm: -1\n", "acme.yaml:5: spec.limits.rpm: "),
        ("kind: Project\nname: not a slug\n", "acme.yaml:2: name: "),
        ("kind: Project\n", "acme.yaml:1: name: Project needs name"),
        ("kind: Key\nname: k\nproject: nowhere\n", "acme.yaml:3: project: there is no project 'nowhere'"),
        ("kind: Project\nname: x\nname: y\n", "acme.yaml:3: name: is there twice"),
        ("kind: Project\nname: [\n", "acme.yaml:3: is no YAML"),
        ("kind: Project\nname: a\n---\nkind: Project\nname: a\n", "acme.yaml:4: Project: project a is in "),
        (
            "kind: Deployment\nname: d\nproject: main\nspec:\n  model: gpt\n",
            "acme.yaml:5: spec.model: there is no model version 'gpt'; known: toy",
        ),
        (
            "kind: Deployment\nname: d\nproject: main\nspec:\n  model: toy\n  engine_profile: {engine: vllm}\n",
            "acme.yaml:6: spec.engine_profile: ",
        ),
        ("kind: Member\nemail: a@example.org\nspec: {role: king}\n", "acme.yaml:3: spec.role: "),
    ],
)
def test_an_error_names_file_line_and_field_and_nothing_is_done(
    corral: Corral, world: World, text: str, says: str
) -> None:
    answer = corral.apply(text, status=1)
    assert says in answer.stderr
    with tenant(world.organization.id):
        assert Project.objects.count() == 1


def test_a_failure_half_way_says_how_far_it_came_and_hands_out_keys(corral: Corral, world: World) -> None:
    text = """
        kind: Key
        name: first
        project: main
        ---
        kind: Project
        name: research
        ---
        kind: Key
        name: second
        project: research
        spec: {tags: [1]}
    """
    answer = corral.apply(text, status=1)
    assert "spec.tags" in answer.stderr
    assert re.search(r"acme.yaml:12: spec.tags.0: ", answer.stderr)
    assert "2 of 3 were applied" in answer.stderr
    assert re.search(r"^first  sk-crl-", answer.stdout, re.M)


def test_nobody_is_asked_where_nobody_is(corral: Corral) -> None:
    answer = corral.run("apply", "-f", corral.file(ALL), status=1)
    assert "add --yes" in answer.stderr
    assert "nobody is here" in answer.stderr


def test_documents_may_come_by_standard_input_and_as_several_files(corral: Corral) -> None:
    corral.run("apply", "-f", "-", "--yes", stdin="kind: Project\nname: piped\n")
    first = corral.file("kind: Project\nname: one\n", "one.yaml")
    second = corral.file("kind: Key\nname: k\nproject: one\n", "two.yaml")
    assert "k  sk-crl-" in corral.run("apply", "-f", first, "-f", second, "-y").stdout
    assert "cannot be read" in corral.run("apply", "-f", "/nowhere", status=1).stderr
