"""LoRA adapters through the whole product: published, brought to the machine, answered with, metered, retired."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psycopg
import pytest

from benchmarks.stack import BenchStack
from infra.local.preflight import engine_verdict, gather
from tests.workers.adapter_files import SMALL, TINY_SHAPES, write_adapter

pytestmark = [pytest.mark.stack, pytest.mark.engine, pytest.mark.full, pytest.mark.timeout(600)]
Eventually = Callable[[Callable[[], object], str], None]


def test_two_adapters_beside_their_base(
    stack: BenchStack, operator: psycopg.Connection, eventually: Eventually, tmp_path: Path
) -> None:
    runs, _ = engine_verdict(gather())
    model, shapes = ("tiny", TINY_SHAPES) if runs else ("toy", SMALL)
    knobs = ("max_loras=2", "max_lora_rank=8", "max_model_len=512", "kv_cache_bytes=67108864")
    stack.manage("deploy", "styles", "--model", model, "--min", "1", *(f"--profile={knob}" for knob in knobs))

    def ask(name: str, text: str = "Where do the numbers come from?") -> httpx.Response:
        return httpx.post(
            f"{stack.facts.base_url}/chat/completions",
            headers={"authorization": f"Bearer {stack.facts.api_key}"},
            json={
                "model": name,
                "max_tokens": 16,
                "temperature": 0,
                "messages": [{"role": "user", "content": text}],
            },
            timeout=120,
        )

    def words(name: str) -> str:
        answer = ask(name)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == name
        return str(answer.json()["choices"][0]["message"]["content"])

    base = words("styles")
    assert ask("styles:one").json()["error"]["code"] == "model_not_found"
    for seed, name in enumerate(("one", "two", "three")):
        made = write_adapter(tmp_path / name, shapes, r=8, alpha=16, seed=seed, size=0.08)
        stack.manage("publish_adapter", str(made), "--deployment", "styles", "--name", name)
    eventually(lambda: ask("styles:three").status_code == 200, "the gateways know all three")
    alone = {name: words(f"styles:{name}") for name in ("one", "two", "three")}
    assert len({base, *alone.values()}) == 4
    names = ["styles", "styles:one", "styles:two", "styles:three"] * 4
    with ThreadPoolExecutor(8) as pool:  # three of them, two places, and the base in one batch
        answers = list(pool.map(words, names))
    for name, answer in zip(names, answers, strict=True):
        assert answer == (base if name == "styles" else alone[name.partition(":")[2]]), name
    assert max(len(beat.adapters or ()) for beat in stack.heartbeats()) <= 2
    booked = "SELECT count(*) FROM billing_usageevent WHERE model = 'styles:two' AND cost_nano > 0"
    eventually(lambda: operator.execute(booked).fetchone() >= (5,), "each is metered under its own name")
    operator.execute("UPDATE adapters_adapter SET state = 'retired', retired_at = now() WHERE name = 'two'")
    eventually(lambda: ask("styles:two").status_code == 404, "a retired one is there no more")
    assert words("styles:one") == alone["one"]
    stack.manage("deploy", "styles", "--model", model, "--min", "0", "--idle-timeout-s", "0")
