"""Service levels in the console: what was kept, what burns, and why a request was refused."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from django.utils import timezone

from controlplane import ids
from tests.controlplane.decisions.test_intake import refusal, run, tell
from tests.controlplane.slo.test_attainment import fill
from tests.world import World


@pytest.fixture
def page(world: World, client: Any) -> Any:
    client.force_login(world.alice)
    return client


def test_the_page_shows_classes_their_budget_and_what_burns(world: World, page: Any) -> None:
    now = timezone.now()
    fill(world, n=1_000, n_bad=200, ago_s=60, now=now)
    fill(world, n=50, n_bad=0, ago_s=60, now=now, slo_class="batch")
    text = page.get("/slo?days=1").content.decode()
    assert "Class interactive burns its error budget" in text
    assert text.index("interactive") < text.index("batch"), "in the order they are served in"
    assert "80 %" in text and "used up" in text and "200 failed" in text
    assert "first token 1 s, then 100 ms each" in text


def test_a_refused_request_says_why_and_only_to_its_organization(
    world: World, page: Any, redis_url: str
) -> None:
    request = ids.new_id()
    with redis.Redis.from_url(redis_url) as cell:
        tell(cell, refusal(world, request.hex))
        run(cell)
    assert f"/requests/req_{request.hex}" in page.get("/slo").content.decode()
    text = page.get(f"/requests/req_{request.hex}").content.decode()
    for part in ("Why it was refused", "slo_unattainable", "12.5 s", "rep_…aaaaaaaa", "41,000"):
        assert part in text, part
    page.force_login(world.bob)
    assert page.get(f"/requests/req_{request.hex}").status_code == 200
    page.force_login(world.charlie)
    assert page.get(f"/requests/req_{request.hex}").status_code == 404
    assert request.hex not in page.get("/slo").content.decode()
