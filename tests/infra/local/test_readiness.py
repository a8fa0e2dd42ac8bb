"""Readiness: of that very process, not of another one that shares its port."""

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local.readiness import answers_readyz, wrote_its_pid

SERVER = """
import http.server, socket, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/readyz" else 404); self.end_headers()
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler, bind_and_activate=False)
server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
server.server_bind(); server.server_activate()
print("up", flush=True); server.serve_forever()
"""


@pytest.fixture
def shared_port() -> Iterator[int]:
    with socket.socket() as hold:
        hold.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        hold.bind(("127.0.0.1", 0))
        yield hold.getsockname()[1]


def test_ready_only_when_that_process_listens(shared_port: int) -> None:
    ready = answers_readyz(shared_port)
    assert not ready(os.getpid())
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(shared_port)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout.readline() == "up\n"
        assert ready(server.pid)
        assert not ready(os.getpid()), "another process of the same port does not make us ready"
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def test_not_ready_while_it_says_so() -> None:
    class Unready(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Unready) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        assert not answers_readyz(server.server_address[1])(os.getpid())
        server.shutdown()
        thread.join()


def test_pid_of_an_earlier_process_counts_for_nothing(tmp_path: Path) -> None:
    ready = wrote_its_pid(tmp_path / "control.ready")
    assert not ready(17)
    (tmp_path / "control.ready").write_text("16")
    assert not ready(17)
    (tmp_path / "control.ready").write_text("17")
    assert ready(17)
