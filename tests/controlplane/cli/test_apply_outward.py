"""`corral apply` of upstreams, webhooks, SLO rules and quotas; and what is there as a file that changes nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from controlplane.api.app import api as rest
from controlplane.cli.documents import SHAPES
from controlplane.cli.steps import LIMIT_NAMES
from controlplane.slo.models import SloRule
from controlplane.tenants.context import tenant
from controlplane.upstreams import services as upstreams
from controlplane.upstreams.models import Upstream, UpstreamSecrets
from controlplane.upstreams.services import secret_of
from tests.controlplane.cli.conftest import Corral
from tests.world import World, make_version

BASE = """
    kind: Deployment
    name: chat
    project: main
    spec: {model: toy, engine_profile: {engine: toy}}
    ---
    kind: Key
    name: web
    project: main
"""
OUTWARD = """
    kind: SloRule
    class: batch
    project: main
    spec: {deployment: chat, key: web, deadline_s: 600, is_default: true}
    ---
    kind: SloRule
    class: interactive
    project: main
    spec: {ttft_ms: 400, objective_ppm: 995000}
    ---
    kind: EndCustomerLimits
    project: main
    spec: {limits: {rpm: 20, budget_usd: 5}}
    ---
    kind: EndCustomerLimits
    project: main
    spec: {end_customer: cust-4711, limits: {rpm: 600}}
    ---
    kind: Quota
    name: machines
    spec: {limit: 4}
    ---
    kind: Quota
    name: spend_rate
    spec: {limit_usd_per_h: 12.5}
    ---
    kind: Webhook
    url: https://example.org/hook
    spec: {events: [quota.reached, budget.threshold], description: pages us}
    ---
    kind: Webhook
    url: https://example.org/asleep
    spec: {enabled: false}
    ---
    kind: Upstream
    name: theirs
    project: main
    spec:
      deployment: chat
      role: overflow
      base_url: https://inference.example.org/v1
      model: big
      slots: 8
      api_key_env: THEIR_KEY
      headers_env: {X-Team: THEIR_TEAM}
      input_usd_per_million: 0.05
"""
ALL = BASE + "    ---\n" + OUTWARD


@pytest.fixture(autouse=True)
def _given(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    make_version(world.organization.id)
    monkeypatch.setenv("THEIR_KEY", "sk-theirs")
    monkeypatch.setenv("THEIR_TEAM", "a")


def test_everything_is_made_in_one_go_and_the_second_time_nothing(corral: Corral, world: World) -> None:
    planned = corral.apply(ALL, "--dry-run")
    assert "9 to create, 2 to change, 0 to end, 0 as they should be" in planned.output
    assert "+ slo rule batch of key web on deployment chat (main)" in planned.output
    assert "+ end customer limits of each (main)" in planned.output
    assert "+ end customer limits of cust-4711 (main)" in planned.output
    with tenant(world.organization.id):
        assert not SloRule.objects.exists()
        assert not Upstream.objects.exists()
    first = corral.apply(ALL)
    assert re.search(r"^https://example.org/hook  whsec_\S+$", first.stdout, re.M)
    assert "sk-theirs" not in first.output + planned.output
    assert "0 to create, 0 to change, 0 to end, 11 as they should be" in corral.apply(ALL).output
    with tenant(world.organization.id):
        made = Upstream.objects.get(name="theirs")
        secret = secret_of(UpstreamSecrets.objects.get(upstream=made))
        assert (secret.api_key, secret.headers) == ("sk-theirs", {"X-Team": "a"})
        assert (made.slots, made.input_nano_per_million) == (8, 50_000_000)
        batch = SloRule.objects.get(slo_class_id="batch")
        assert (batch.deadline_s, batch.is_default, batch.deployment_id) == (600, True, made.deployment_id)
    rows = yaml.safe_load(corral.run("get", "webhooks", "-o", "yaml").stdout)
    assert {row["url"]: row["enabled"] for row in rows}["https://example.org/asleep"] is False


def test_what_is_there_is_written_as_a_file_that_changes_nothing(corral: Corral, world: World) -> None:
    corral.apply(ALL)
    corral.apply("kind: Budget\nname: team\nspec: {project: main, limit_usd: 100, period: month}")
    words = ["organization", "projects", "members", "deployments", "keys", "budgets"]
    words += ["slo-rules", "end-customer-limits", "quotas", "webhooks", "upstreams"]
    texts = [corral.run("get", word, "--documents").stdout for word in words]
    whole = "---\n".join(texts)
    kinds = [each["kind"] for each in yaml.safe_load_all(whole)]
    assert {
        "SloRule",
        "EndCustomerLimits",
        "Quota",
        "Webhook",
        "Upstream",
        "Deployment",
        "Key",
        "Budget",
    } <= set(kinds)
    again = corral.run("apply", "-f", corral.file(whole), "--yes")
    assert f"0 to create, 0 to change, 0 to end, {len(kinds)} as they should be" in again.output
    one = yaml.safe_load(corral.run("get", "upstream", "theirs", "--documents").stdout)
    assert (one["project"], one["spec"]["deployment"]) == ("main", "chat")
    assert (
        "have no replicas; they have organization"
        in corral.run("get", "replicas", "--documents", status=1).stderr
    )


def test_changes_are_planned_field_by_field_and_only_what_differs_is_sent(
    corral: Corral, world: World
) -> None:
    corral.apply(ALL)
    text = ALL.replace("slots: 8", "slots: 9").replace("ttft_ms: 400", "ttft_ms: null")
    text = text.replace("limit: 4", "limit: null").replace("pages us", "wakes us")
    text = text.replace("enabled: false", "enabled: true").replace("rpm: 600", "rpm: 700")
    shown = corral.apply(text, "--dry-run").output
    for line in ("slots: 8 → 9", "ttft_ms: 400 → none", "description: pages us → wakes us", "rpm: 600 → 700"):
        assert line in shown, shown
    assert "0 to create, 6 to change, 0 to end, 5 as they should be" in shown
    corral.apply(text)
    assert "11 as they should be" in corral.apply(text).output


def test_a_default_moves_from_one_class_to_another(corral: Corral, world: World) -> None:
    corral.apply("kind: SloRule\nclass: batch\nproject: main\nspec: {is_default: true}")
    moved = """
        kind: SloRule
        class: flex
        project: main
        spec: {is_default: true}
        ---
        kind: SloRule
        class: batch
        project: main
        spec: {is_default: false}
    """
    corral.apply(moved)
    with tenant(world.organization.id):
        assert SloRule.objects.get(is_default=True).slo_class_id == "flex"
    assert "2 as they should be" in corral.apply(moved).output


def test_secrets_are_sent_once_or_when_asked_for(
    corral: Corral, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key() -> str:
        with tenant(world.organization.id):
            return secret_of(UpstreamSecrets.objects.get()).api_key

    corral.apply(ALL)
    monkeypatch.setenv("THEIR_KEY", "sk-renewed")
    corral.apply(ALL)
    assert key() == "sk-theirs"
    assert "~ upstream theirs (main)" in corral.apply(ALL, "--renew-secrets").output
    assert key() == "sk-renewed"
    corral.apply(ALL.replace("api_key_env: THEIR_KEY", "api_key_env: null"))
    assert key() == ""


_UPSTREAM = (
    "Upstream\nname: u\nproject: main\nspec:\n  deployment: chat\n  role: {}\n  base_url: {}\n  model: m\n"
)
_ENDS = "EndCustomerLimits\nproject: main\nspec:\n"
_FINE = _UPSTREAM.format("replica", "https://a.example/v1")
_RULE = "SloRule\nclass: batch\nproject: main\nspec:\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Quota\nname: machnes\nspec: {limit: 1}", "2: name: there is no quota 'machnes'; known: machines,"),
        ("Quota\nname: machines\nspec:\n  limit: -1", "4: spec.limit: "),
        (
            "Quota\nname: machines\nspec:\n  limit_usd_per_h: 1",
            "4: spec.limit_usd_per_h: machines is no amount of money: give limit",
        ),
        ("Quota\nname: machines", "1: spec: give limit"),
        ("Webhook\nurl: http://10.0.0.1/x", "2: url: "),
        (
            "Webhook\nurl: https://a.example/x\nspec:\n  events: [nope]",
            "4: spec.events: 'nope' is no kind of event; there are ",
        ),
        ("Webhook\nspec: {}", "1: url: Webhook needs url: a text"),
        ("SloRule\nclass: fast\nproject: main", "2: class: slo_class='fast': choose one of "),
        (_RULE + "  ttft_ms: 0", "5: spec.ttft_ms: "),
        (_RULE + "  key: nobody", "5: spec.key: there is no key 'nobody' in main"),
        (_ENDS + "  end_customer: a", "3: spec: EndCustomerLimits needs limits"),
        (_ENDS + "  end_customer: 4711\n  limits: {}", "4: spec.end_customer: must be a text: in quotes"),
        (_ENDS + "  end_customer: a\n  customer: b\n  limits: {}", "5: spec.customer: is the pseudonym of"),
        (_ENDS + "  limits: {}\n  customer: b", "5: spec.customer: "),
        (_ENDS + "  limits:\n    rpm: -1", "5: spec.limits.rpm: "),
        (_UPSTREAM.format("king", "https://a.example/v1"), "6: spec.role: "),
        (_UPSTREAM.format("replica", "http://169.254.169.254/v1"), "7: spec.base_url: "),
        (_FINE + "  slots: 0\n", "9: spec.slots: "),
        (
            _FINE + "  api_key_env: NOT_SET\n",
            "9: spec.api_key_env: there is no variable 'NOT_SET' in the environment: export it",
        ),
        (_FINE + "  api_key: sk-1\n", "9: spec.api_key: no such field, did you mean api_key_env?"),
        (
            _FINE.replace("chat", "nowhere"),
            "5: spec.deployment: there is no deployment 'nowhere' in main",
        ),
        (_FINE.replace("  deployment: chat\n", ""), "4: spec: Upstream needs deployment"),
    ],
)
def test_an_error_names_file_line_field_and_remedy(corral: Corral, text: str, says: str) -> None:
    corral.apply(BASE)
    assert f"acme.yaml:{says}" in corral.apply(f"kind: {text}", status=1).stderr


def test_a_deployment_may_be_a_shadow(corral: Corral, world: World) -> None:
    upstreams.set_consent(organization_id=world.organization.id, agreed=True)
    corral.apply(BASE)
    files = (
        BASE
        + """    ---
    kind: Deployment
    name: next
    project: main
    spec: {model: toy, engine_profile: {engine: toy}}
    ---
    kind: Upstream
    name: trial
    project: main
    spec: {deployment: chat, role: shadow, target: next, shadow_ppm: 500, shadow_rpm: 9}
"""
    )
    corral.apply(files)
    with tenant(world.organization.id):
        made = Upstream.objects.get(name="trial")
        assert (made.target is not None and made.target.name, made.shadow_rpm) == ("next", 9)
    written = corral.run("get", "upstreams", "--documents").stdout
    assert ("target: next" in written, "base_url" in written) == (True, False)
    assert "0 to create, 0 to change" in corral.run("apply", "-f", corral.file(written), "--yes").output
    assert "keeps it" in corral.apply(files.replace("target: next, ", ""), status=1).stderr


def test_an_upstream_keeps_its_deployment(corral: Corral) -> None:
    corral.apply(ALL)
    two = ALL.replace("deployment: chat\n      role", "deployment: other\n      role").replace(
        "kind: Key",
        "kind: Deployment\n    name: other\n    project: main\n    spec: {model: toy}\n    ---\n    kind: Key",
    )
    assert "spec.deployment: theirs serves another one" in corral.apply(two, status=1).stderr


@pytest.mark.parametrize(
    ("kind", "schema", "elsewhere"),
    [
        ("Upstream", "NewUpstream", {"name", "deployment_id", "target_deployment_id", "api_key", "headers"}),
        ("Webhook", "NewWebhook", {"url"}),
        ("SloRule", "NewSloRule", {"slo_class", "project_id", "key_id", "deployment_id"}),
        ("Quota", "QuotaValue", set()),
        ("EndCustomerLimits", "NewEndCustomerLimits", set(LIMIT_NAMES)),
    ],
)
def test_files_say_whatever_the_api_takes(kind: str, schema: str, elsewhere: set[str]) -> None:
    """A field added to the API and not to files fails here."""
    taken: dict[str, Any] = rest.get_openapi_schema()["components"]["schemas"][schema]["properties"]
    assert taken.keys() - elsewhere <= SHAPES[kind].spec.keys()
