"""Error pages, and rules that hold for the markup of every page."""

from html.parser import HTMLParser

import pytest
from django.core.exceptions import PermissionDenied
from django.db import OperationalError, connections
from django.test import Client, RequestFactory

from controlplane.console import pages
from controlplane.deployments.models import Deployment
from tests.world import World


@pytest.mark.django_db
def test_what_is_not_there_gets_a_page_of_ours(anonymous: Client) -> None:
    response = anonymous.get("/nowhere")
    assert response.status_code == 404
    assert "There is nothing here" in response.content.decode()


def test_a_bug_gets_a_page_without_its_details(owner: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise ValueError("secret detail")

    monkeypatch.setattr("controlplane.console.usage.traffic", fail)
    owner.raise_request_exception = False
    response = owner.get("/")
    assert response.status_code == 500
    assert "Something went wrong" in response.content.decode()
    assert "secret detail" not in response.content.decode()


def test_postgres_away_in_a_view_is_said(owner: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise OperationalError("connection refused")

    monkeypatch.setattr("controlplane.console.usage.traffic", fail)
    owner.raise_request_exception = False
    response = owner.get("/")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
    assert "cannot reach its database" in response.content.decode()
    fragment = owner.get("/live", headers={"HX-Request": "true"})
    assert fragment.status_code == 503
    assert "<html" not in fragment.content.decode()


@pytest.mark.django_db(transaction=True)
def test_postgres_away_altogether_is_said(anonymous: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the page's own may need the database: sessions and users live there too."""
    from infra.local.ports import free_port

    connection = connections["default"]
    connection.close()
    anonymous.cookies["corral_session"] = "x" * 32
    anonymous.raise_request_exception = False
    with monkeypatch.context() as patched:
        patched.setitem(connection.settings_dict, "PORT", str(free_port()))
        response = anonymous.get("/")
    connection.close()
    assert response.status_code == 503
    assert "cannot reach its database" in response.content.decode()


def test_the_other_handlers_answer_with_their_status() -> None:
    request = RequestFactory().get("/")
    assert pages.bad_request(request, ValueError()).status_code == 400
    assert pages.forbidden(request, PermissionDenied()).status_code == 403


class Rules(HTMLParser):
    """Collects what a strict policy, a keyboard or a screen reader would stumble over."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.ids: list[str] = []
        self.labelled: set[str] = set()
        self.controls: list[tuple[str, dict[str, str | None]]] = []
        self.landmarks: list[str] = []
        self.headings: list[str] = []
        self._depth_label = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if "style" in found or tag == "style":
            self.problems.append(f"inline style: {self.get_starttag_text()}")
        if any(name.startswith(("on", "hx-on")) for name in found):
            self.problems.append(f"inline handler: {self.get_starttag_text()}")
        if tag == "script" and not (found.get("src") or "").startswith("/static/"):
            self.problems.append("a script that is not ours")
        if tag == "a" and (found.get("href") or "").startswith(("http", "javascript")):
            self.problems.append(f"a link away: {found['href']}")
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag == "label":
            self._depth_label += 1
            self.labelled.add(str(found.get("for")))
        if tag in ("input", "select", "textarea") and found.get("type") != "hidden" and not self._depth_label:
            self.controls.append((tag, found))
        if tag in ("main", "nav", "header"):
            self.landmarks.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append(tag)
        if tag in ("th",) and found.get("scope") != "col":
            self.problems.append("a header cell without scope")

    def handle_endtag(self, tag: str) -> None:
        if tag == "label":
            self._depth_label -= 1

    def check(self) -> list[str]:
        problems = list(self.problems)
        problems += [f"id twice: {each}" for each in set(self.ids) if self.ids.count(each) > 1]
        problems += [
            f"no label: {found}" for _, found in self.controls if str(found.get("id")) not in self.labelled
        ]
        if self.landmarks.count("main") != 1:
            problems.append("not one main")
        if self.headings.count("h1") != 1:
            problems.append("not one h1")
        return problems


@pytest.mark.parametrize("visitor", ["owner", "viewer", "stranger"])
def test_every_page_keeps_the_rules(
    visitor: str, world: World, deployment: Deployment, usage_event, replica, request: pytest.FixtureRequest
) -> None:
    usage_event()
    client: Client = request.getfixturevalue(visitor)
    paths = ["/", "/deployments", "/keys", "/playground", "/people", "/usage", "/nowhere"]
    if visitor != "stranger":
        paths.append(f"/deployments/{deployment}")
    for path in paths:
        rules = Rules()
        rules.feed(client.get(path).content.decode())
        assert rules.check() == [], path
    rules = Rules()
    rules.feed(Client().get("/login").content.decode())
    assert rules.check() == []


def test_the_policy_forbids_what_the_pages_do_not_need(owner: Client, settings) -> None:
    policy = owner.get("/").headers["Content-Security-Policy"]
    assert "unsafe-inline" not in policy and "unsafe-eval" not in policy
    assert f"connect-src 'self' {settings.ENV.gateway_url}" in policy
    assert "frame-ancestors 'none'" in policy
