"""Enrolment against a real HTTP server: once, kept privately, refused for good or tried again."""

import asyncio
import json
import stat
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from workers import sealed
from workers.agent.enrol import EnrolRefused, credentials_of
from workers.config import AgentConfig
from workers.redis_address import with_password_file

GOOD = {"machine_id": "m1", "cell": "c3", "redis_url": "redis://m-m1:pw@10.0.0.1:6379/0", "heartbeat_ms": 500}


class Server:
    """Answers what it is told to, in turn; the last answer repeats."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, Any]] = []
        self.asked: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                status, answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def config(server: Server, var: Path, **options: Any) -> AgentConfig:
    made = AgentConfig(
        machine="m1",
        enrol_url=f"http://127.0.0.1:{server.http.server_port}/internal/enrol",
        var_dir=var,
        model_cache=var,
        **({"proof": "p"} | options),
    )
    made.dirs.create()
    return made


async def test_credentials_are_stored_privately_and_used_again(server: Server, tmp_path: Path) -> None:
    server.answers = [(200, GOOD)]
    first = await credentials_of(config(server, tmp_path))
    assert (first.cell, first.heartbeat_ms) == ("c3", 500)
    assert first.redis_url == with_password_file(str(GOOD["redis_url"]), tmp_path / "redis-password")
    assert server.asked[0]["proof"] == "p" and server.asked[0]["capabilities"]["n_cpus"] >= 1
    assert stat.S_IMODE((tmp_path / "credentials.json").stat().st_mode) == 0o600
    again = await credentials_of(config(server, tmp_path, proof=""))
    assert again == first and len(server.asked) == 1


async def test_busy_control_plane_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.answers = [(503, {}), (502, "nonsense"), (200, "nonsense"), (200, GOOD)]
    assert (await credentials_of(config(server, tmp_path))).machine_id == "m1"
    assert len(server.asked) == 4


async def test_what_is_asked_again_is_the_same_even_by_the_next_agent(server: Server, tmp_path: Path) -> None:
    server.answers = [(503, {})]
    task = asyncio.create_task(credentials_of(config(server, tmp_path)))
    while len(server.asked) < 2:
        await asyncio.sleep(0.005)
    task.cancel()  # killed before an answer came
    await asyncio.gather(task, return_exceptions=True)
    kept = tmp_path / "enrolling.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    server.answers = [(200, GOOD)]
    found = await credentials_of(config(server, tmp_path))
    assert len({json.dumps(asked, sort_keys=True) for asked in server.asked}) == 1
    assert len(server.asked[0]["nonce"]) == 43
    assert sealed.public_of(found.box_key) == server.asked[0]["capabilities"]["box_public"]
    assert not kept.exists(), "the next enrolment of this directory is another one"


@pytest.mark.parametrize("answer", [(403, {"error": "used"}), (200, {**GOOD, "machine_id": "m2"})])
async def test_refusal_is_final(server: Server, tmp_path: Path, answer: tuple[int, Any]) -> None:
    server.answers = [answer]
    with pytest.raises(EnrolRefused):
        await credentials_of(config(server, tmp_path))
    assert len(server.asked) == 1
    assert not (tmp_path / "credentials.json").exists()


async def test_no_proof_and_no_credentials_is_said(server: Server, tmp_path: Path) -> None:
    with pytest.raises(EnrolRefused, match="CORRAL_ENROL_PROOF"):
        await credentials_of(config(server, tmp_path, proof=""))


async def test_credentials_of_another_machine_are_not_used(server: Server, tmp_path: Path) -> None:
    (tmp_path / "credentials.json").write_text(json.dumps({**GOOD, "machine_id": "m2"}))
    server.answers = [(200, GOOD)]
    assert (await credentials_of(config(server, tmp_path))).machine_id == "m1"
    assert json.loads((tmp_path / "credentials.json").read_text())["machine_id"] == "m1"


async def test_redis_may_be_reached_at_another_address(server: Server, tmp_path: Path) -> None:
    server.answers = [(200, GOOD)]
    found = await credentials_of(config(server, tmp_path, redis="127.0.0.1:7777"))
    assert found.redis_url.partition("?")[0] == "redis://m-m1:pw@127.0.0.1:7777/0"
    stored = json.loads((tmp_path / "credentials.json").read_text())
    assert stored["redis_url"] == GOOD["redis_url"]


async def test_enrolment_can_be_interrupted(server: Server, tmp_path: Path) -> None:
    server.answers = [(503, {})]
    task = asyncio.create_task(credentials_of(config(server, tmp_path)))
    while not server.asked:
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
