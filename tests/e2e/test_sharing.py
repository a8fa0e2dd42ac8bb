"""One deployment, two tenants, live: leave given and taken back reaches the gateways, and the caller is billed."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import psycopg
import pytest

from benchmarks.stack import BenchStack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]
Eventually = Callable[[Callable[[], object], str], None]


def test_another_tenant_calls_a_shared_deployment_and_pays_for_it(
    stack: BenchStack, operator: psycopg.Connection, eventually: Eventually
) -> None:
    stack.manage("deploy", "shared", "--model", "toy", "--min", "1")
    stack.manage("ask", "ready?", "--model", "shared")
    stack.manage("create_organization", "customer", "--owner", "customer@example.org")
    key = stack.manage_json("create_key", "app", "--organization", "customer", "--project", "main")["api_key"]

    def ask() -> httpx.Response:
        return httpx.post(
            f"{stack.facts.base_url}/chat/completions",
            headers={"authorization": f"Bearer {key}"},
            json={
                "model": "acme/shared",
                "max_tokens": 5,
                "messages": [{"role": "user", "content": "Hello"}],
            },
            timeout=30,
        )

    assert ask().json()["error"]["code"] == "model_not_found"
    stack.manage("share", "shared", "--with", "customer")
    eventually(lambda: ask().status_code == 200, "the customer is served")
    booked = (
        "SELECT count(*) FROM billing_usageevent u JOIN tenants_organization o ON o.id = u.organization_id "
        "WHERE o.slug = 'customer' AND u.model = 'acme/shared' AND u.cost_nano > 0"
    )
    eventually(lambda: operator.execute(booked).fetchone() != (0,), "the customer is billed")
    stack.manage("share", "shared", "--with", "customer", "--withdraw")
    eventually(lambda: ask().status_code == 404, "the customer is served no more")
    stack.manage("deploy", "shared", "--model", "toy", "--min", "0", "--idle-timeout-s", "0")
