"""What a key is bound to: models that do not exist for it, routes and networks that refuse, and nothing in between."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from controlplane.gateway.app import _ROUTES, GatewayApp
from controlplane.gateway.directory import ScopesRow
from controlplane.gateway.keybounds import callable_names, client_of
from controlplane.gateway.surface import SURFACES
from controlplane.tenants import api_keys
from controlplane.tenants.key_scopes import KeyScopes, Route, network_of
from tests.controlplane.gateway.harness import CHAT, KEYS, Job, Machine, Running, running, until

NAMES = ("tiny", "acme/tiny", "acme/huge", "other/tiny")


def bound(gw: Running, names: tuple[str, ...] = NAMES, **scopes: Any) -> dict[str, str]:
    """Headers with a key that is bound so."""
    return gw.auth(gw.directory.add_key(names=names, scopes=ScopesRow(**scopes)))


async def test_a_model_out_of_scope_is_not_listed_and_does_not_exist(gw: Running) -> None:
    auth = bound(gw, models=("acme/*", "tiny"))
    listed = (await gw.http.get("/v1/models", headers=auth)).json()["data"]
    assert [model["id"] for model in listed] == ["acme/huge", "acme/tiny", "tiny"]
    for model in ("other/tiny", "never was"):
        told = await gw.http.post("/v1/chat/completions", json={**CHAT, "model": model}, headers=auth)
        assert (told.status_code, told.json()["error"]["code"]) == (404, "model_not_found")
        assert "acme/huge, acme/tiny, tiny" in told.json()["error"]["message"]
        assert (await gw.http.get(f"/v1/models/{model}", headers=auth)).status_code == 404
    assert (await gw.http.get("/v1/models/acme/tiny", headers=auth)).status_code == 200


async def test_a_model_in_scope_is_served(gw: Running, machine: Machine) -> None:
    response = await gw.http.post("/v1/chat/completions", json=CHAT, headers=bound(gw, models=("tiny",)))
    assert response.status_code == 200


async def test_a_scope_of_models_that_are_not_there_says_what_to_do(gw: Running) -> None:
    told = await gw.http.post("/v1/chat/completions", json=CHAT, headers=bound(gw, models=()))
    assert told.status_code == 404 and "scopes.models" in told.json()["error"]["message"]


async def test_an_alias_is_a_model_too(gw: Running, machine: Machine) -> None:
    key = gw.auth(gw.directory.add_key(aliases={"gpt-4": "tiny", "gone": "not there"}))
    listed = (await gw.http.get("/v1/models", headers=key)).json()["data"]
    assert [model["id"] for model in listed] == ["gpt-4", "tiny"]
    response = await gw.http.post("/v1/chat/completions", json={**CHAT, "model": "gpt-4"}, headers=key)
    assert response.status_code == 200


def test_an_alias_hides_nothing_and_lets_nothing_out_of_scope_in() -> None:
    aliases = {"nick": "big", "small": "big", "vip": "big"}
    assert callable_names({"big", "small"}, None, aliases) == {
        "big": "big", "small": "small", "nick": "big", "vip": "big",
    }  # fmt: skip
    assert callable_names({"big", "small"}, ("small",), aliases) == {"small": "small"}
    assert callable_names({"big", "small"}, ("vip",), aliases) == {"vip": "big"}
    assert callable_names({"big"}, ("*",), {"nick": "big"}) == {"big": "big", "nick": "big"}


@pytest.mark.parametrize("route", list(Route))
async def test_a_key_is_refused_where_its_routes_do_not_lead(
    gw: Running, machine: Machine, route: Route
) -> None:
    """And served where they do: a request of its own answers for what it may read."""
    first = await gw.post(CHAT)
    calls = {
        Route.CHAT: ("POST", "/v1/chat/completions", CHAT),
        Route.COMPLETIONS: ("POST", "/v1/completions", {"model": "tiny", "prompt": "x"}),
        Route.MODELS: ("GET", "/v1/models", None),
        Route.REQUESTS: ("GET", f"/v1/requests/{first.headers['x-request-id']}/events", None),
    }
    auth = bound(gw, routes=(route.value,))
    for called, (method, path, body) in calls.items():
        response = await gw.http.request(method, path, json=body, headers=auth)
        if called is route:
            assert response.status_code == 200, (called, response.text)
            continue
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (403, "key_scope", "scopes.routes")
        assert called.value in error["message"] and f"only for: {route.value}" in error["message"]
    assert gw.log.lines[-1].status in (200, 403)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {**CHAT, "max_tokens": 4}),
        ("/v1/responses", {"model": "tiny", "input": "Hello"}),
    ],
)
async def test_what_is_a_chat_in_other_words_is_in_the_scope_of_chats(
    gw: Running, machine: Machine, path: str, body: dict[str, Any]
) -> None:
    for routes, status in ((Route.CHAT,), 200), ((Route.COMPLETIONS, Route.MODELS, Route.REQUESTS), 403):
        auth = bound(gw, routes=tuple(route.value for route in routes))
        assert (await gw.http.post(path, json=body, headers=auth)).status_code == status


def test_every_path_of_the_gateway_belongs_to_a_route() -> None:
    """A new endpoint without a route could be called by every bound key."""
    assert set(_ROUTES) == {*SURFACES, None}
    assert {*_ROUTES.values(), Route.MODELS} == set(Route)
    public = {"/healthz", "/readyz", "/metrics"}
    source = GatewayApp.__init__.__code__.co_consts
    paths = {c for c in source if isinstance(c, str) and c.startswith("/")} | {
        p for c in source if isinstance(c, tuple) for p in c if isinstance(p, str) and p.startswith("/")
    }
    assert paths == public | {"/v1/models"}


LOCAL = ("127.0.0.0/8", "::1/128")


async def test_a_key_works_from_its_networks_only(gw: Running, machine: Machine) -> None:
    assert (await gw.http.get("/v1/models", headers=bound(gw, ip_ranges=LOCAL))).status_code == 200
    refused = await gw.http.get(
        "/v1/models", headers=bound(gw, ip_ranges=("203.0.113.0/24", "2001:db8::/32"))
    )
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (403, "key_scope", "scopes.ip_ranges")
    assert "127.0.0.1" in error["message"] and "203.0.113" not in error["message"], "a thief learns no range"
    told = await gw.http.post(
        "/v1/chat/completions", json=CHAT, headers=bound(gw, ip_ranges=("203.0.113.0/24",))
    )
    assert told.status_code == 403


async def test_a_forwarded_address_counts_behind_a_trusted_proxy_only(gw: Running) -> None:
    headers = {**bound(gw, ip_ranges=("203.0.113.0/24",)), "x-forwarded-for": "203.0.113.9"}
    assert (await gw.http.get("/v1/models", headers=headers)).status_code == 403
    async with running(gw.gateway.config.redis_url, trusted_proxies=(network_of("127.0.0.1"),)) as behind:
        inside = bound(behind, ip_ranges=("203.0.113.0/24",))
        for forwarded, status in (
            ("203.0.113.9", 200),
            ("198.51.100.7, 203.0.113.9", 200),
            ("203.0.113.9, 198.51.100.7", 403),
            ("203.0.113.9, 127.0.0.1", 200),
            ("nonsense", 403),
        ):
            headers = {**inside, "x-forwarded-for": forwarded}
            assert (await behind.http.get("/v1/models", headers=headers)).status_code == status, forwarded
        assert (await behind.http.get("/v1/models", headers=inside)).status_code == 403


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("10.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", ["1.2.3.4, 10.0.0.2", "10.0.0.3"], "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6, 1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", ["1.2.3.4:5678"], "1.2.3.4"),
        ("10.0.0.1", ["[2001:db8::7]:5678"], "2001:db8::7"),
        ("10.0.0.1", ["::ffff:1.2.3.4"], "1.2.3.4"),
        ("::ffff:10.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", ["unknown"], "None"),
        ("10.0.0.1", ["1.2.3.4, "], "None"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["10.0.0.9"], "10.0.0.9"),
        ("192.0.2.1", ["1.2.3.4"], "192.0.2.1"),
        (None, ["1.2.3.4"], "None"),
    ],
)
def test_the_client_is_the_last_hop_that_no_proxy_of_ours_is(
    peer: str | None, forwarded: list[str], expected: str
) -> None:
    scope = {
        "client": None if peer is None else (peer, 1),
        "headers": [(b"x-forwarded-for", value.encode()) for value in forwarded],
    }
    assert str(client_of(scope, (network_of("10.0.0.0/8"),))) == expected


async def test_a_request_out_of_scope_cannot_be_followed_nor_taken_over(
    gw: Running, machine: Machine
) -> None:
    """Its events would show another model's answer, and attaching would move them away from their reader."""
    released: list[int] = []

    async def slowly(job: Job) -> None:
        await job.emit("one ")
        while not released:
            await job.emit("more ")
            await asyncio.sleep(0.01)
        await job.finish()

    machine.behaviour = slowly
    async with gw.stream(CHAT) as events:
        await events.next()
        request = events.response.headers["x-request-id"]
        outside = bound(gw, ("tiny", "two"), models=("two",))
        told = await gw.http.get(f"/v1/requests/{request}/events", headers=outside)
        assert (told.status_code, told.json()["error"]["code"]) == (404, "request_not_found")
        released.append(1)
        rest = await events.rest()
        assert rest[-1] == "[DONE]", "its reader kept it"
    inside = bound(gw, ("tiny", "two"), models=("tiny",))
    assert (await gw.http.get(f"/v1/requests/{request}/events", headers=inside)).status_code == 200


async def test_a_scope_taken_away_ends_within_a_second(gw: Running) -> None:
    assert (await gw.http.get("/v1/models", headers=gw.auth())).status_code == 200
    gw.directory.change(gw.key, scopes=ScopesRow(routes=("chat",)))
    await gw.redis.publish(KEYS.invalidate_channel, f"key:{api_keys.lookup_of(gw.key)}")

    async def refused() -> bool:
        return (await gw.http.get("/v1/models", headers=gw.auth())).status_code == 403

    await until(refused, 5.0)


# -- what a scope may be


@pytest.mark.parametrize(
    ("scopes", "field"),
    [
        ({"routes": ("chat", "speech")}, "scopes.routes.1"),
        ({"routes": ("CHAT",)}, "scopes.routes.0"),
        ({"models": ("a*b",)}, "scopes.models.0"),
        ({"models": ("",)}, "scopes.models.0"),
        ({"models": ("a b",)}, "scopes.models.0"),
        ({"models": tuple(map(str, range(257)))}, "scopes.models"),
        ({"ip_ranges": ("10.0.0.1/8",)}, "scopes.ip_ranges.0"),
        ({"ip_ranges": ("10.0.0.0/33",)}, "scopes.ip_ranges.0"),
        ({"ip_ranges": ("example.org",)}, "scopes.ip_ranges.0"),
        ({"ip_ranges": ("10.0.0.0/8",) * 65}, "scopes.ip_ranges"),
    ],
)
def test_what_is_no_scope_is_named(scopes: dict[str, Any], field: str) -> None:
    assert [name for name, _ in KeyScopes(**scopes).problems()] == [field]


def test_scopes_are_stored_in_their_usual_form_and_read_back() -> None:
    scopes = KeyScopes(
        models=("a", "a", "b/*"), ip_ranges=("203.0.113.9", "::ffff:10.0.0.0/104", "2001:DB8::/32")
    )
    assert not list(scopes.problems())
    stored = scopes.as_json()
    assert stored == {"models": ["a", "b/*"], "ip_ranges": ["203.0.113.9/32", "10.0.0.0/8", "2001:db8::/32"]}
    assert KeyScopes.from_json(stored).as_json() == stored
    assert KeyScopes().as_json() is None and KeyScopes.from_json(None) == KeyScopes()
    assert KeyScopes(models=()).as_json() == {"models": []}


def test_a_host_inside_a_range_is_told_the_range() -> None:
    [(_, sentence)] = KeyScopes(ip_ranges=("10.1.2.3/8",)).problems()
    assert "10.0.0.0/8" in sentence
