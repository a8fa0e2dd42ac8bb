"""A server of files by range that fails as it is told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class RangeServer:
    """files: path -> bytes. `mishap(path, start)` may answer a status, "cut" (half of it), "damage", or None."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.asked: list[tuple[str, int, int]] = []
        self.mishap: Callable[[str, int], int | str | None] = lambda path, start: None
        self.delay_s = 0.0
        self.n_connections = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                outer.n_connections += 1
                super().setup()

            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                data = outer.files.get(path)
                start, end = 0, len(data or b"") - 1
                ranged = self.headers.get("Range", "")
                if ranged:
                    first, _, last = ranged.removeprefix("bytes=").partition("-")
                    start, end = int(first), int(last)
                outer.asked.append((path, start, end))
                time.sleep(outer.delay_s)
                mishap = outer.mishap(path, start)
                if data is None or isinstance(mishap, int):
                    return self._say(mishap if isinstance(mishap, int) else 404, b"")
                body = data[start : end + 1]
                if mishap == "damage":
                    body = bytes(len(body))
                return self._say(206 if ranged else 200, body, cut=mishap == "cut")

            def _say(self, status: int, body: bytes, *, cut: bool = False) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if cut else body)
                if cut:
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
