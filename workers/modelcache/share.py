"""What this machine holds, for its siblings: files of whole versions by range, to who has a ticket. HTTP, threads.

Run by the agent where it was given an address (CORRAL_MODEL_SHARE). Slots bound what siblings may take of the network;
beyond them the answer is 503, and they fetch elsewhere. A version that is being sent is not evicted. Who fetches
verifies every range, so nothing here needs to be believed.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO, Final
from urllib.parse import parse_qs, unquote, urlsplit

from workers.modelcache.manifest import MANIFEST_NAME, is_digest, is_plain_name
from workers.modelcache.store import ModelStore, ModelStoreError
from workers.modelcache.ticket import KEY_BYTES, is_good

N_SLOTS: Final = 8  # ranges being sent at once: two machines that start
MAX_CONNECTIONS: Final = 64
IDLE_S: Final = 20.0  # of a connection that says nothing, or takes nothing
MAX_RANGE_BYTES: Final = 256 << 20
_RANGE: Final = re.compile(r"bytes=(\d{1,15})-(\d{1,15})")


class Share:
    """`start()`, `close()`. `key` is what tickets for this machine are signed with."""

    def __init__(
        self,
        store: ModelStore,
        host: str,
        port: int,
        *,
        n_slots: int = N_SLOTS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises OSError where the address cannot be had. port 0: any that is free."""
        self.key = secrets.token_bytes(KEY_BYTES)
        self.n_sent_bytes = 0
        self._slots = threading.BoundedSemaphore(n_slots)
        self._http = _server_of(store, self, host, port, clock)
        self.url = f"http://{host}:{self._http.server_port}"

    def start(self) -> None:
        threading.Thread(target=self._http.serve_forever, args=(0.2,), name="share", daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    @contextlib.contextmanager
    def slot(self) -> Any:
        """Whether there was one; given back at the end."""
        taken = self._slots.acquire(blocking=False)
        try:
            yield taken
        finally:
            if taken:
                self._slots.release()


def version_url(base: str, digest: str, query: str) -> str:
    """A version's files at a sibling: `{name}` stands for the file's."""
    return f"{base}/models/{digest}/{{name}}?{query}"


def _server_of(
    store: ModelStore, share: Share, host: str, port: int, clock: Callable[[], float]
) -> ThreadingHTTPServer:
    connections = threading.BoundedSemaphore(MAX_CONNECTIONS)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = IDLE_S

        def do_GET(self) -> None:
            where = urlsplit(self.path)
            _, _, digest, name = (*where.path.split("/", 3), "", "", "")[:4]
            asked = {key: values[0] for key, values in parse_qs(where.query).items()}
            name = unquote(name)
            if not where.path.startswith("/models/") or not is_digest(digest) or not is_plain_name(name):
                return self._refuse(404)
            if not is_good(share.key, digest, asked.get("ends", ""), asked.get("ticket", ""), clock()):
                return self._refuse(403)
            found = _RANGE.fullmatch(self.headers.get("Range", ""))
            if found is None:
                return self._refuse(416)
            with share.slot() as is_free:
                if not is_free:
                    return self._refuse(503)
                return self._send(digest, name, int(found[1]), int(found[2]) + 1)

        def _send(self, digest: str, name: str, start: int, end: int) -> None:
            claim = store.claim(digest)
            try:
                listed = {entry.name: entry.size_bytes for entry in store.manifest(digest).files}
                if name == MANIFEST_NAME or name not in listed:
                    return self._refuse(404)
                if not start < end <= listed[name] or end - start > MAX_RANGE_BYTES:
                    return self._refuse(416)
                with (store.path(digest) / name).open("rb") as file:
                    self.send_response(206)
                    self.send_header("Content-Length", str(end - start))
                    self.send_header("Content-Range", f"bytes {start}-{end - 1}/{listed[name]}")
                    self.end_headers()
                    self.wfile.flush()
                    self._pour(file, start, end)
            except (ModelStoreError, FileNotFoundError):
                return self._refuse(404)
            finally:
                claim.close()

        def _pour(self, file: BinaryIO, at: int, end: int) -> None:
            """From the page cache to the socket; whoever takes nothing for IDLE_S is left."""
            self.connection.settimeout(IDLE_S)
            try:
                sent = self.connection.sendfile(file, at, end - at)
            except OSError:
                self.close_connection = True
                return
            share.n_sent_bytes += sent
            if sent != end - at:
                self.close_connection = True

        def _refuse(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing: paths hold tickets."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 32

        def process_request(self, request: Any, client_address: Any) -> None:
            if not connections.acquire(blocking=False):
                self.shutdown_request(request)
                return
            super().process_request(request, client_address)

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            try:
                super().process_request_thread(request, client_address)
            finally:
                connections.release()

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A sibling that went away is no news."""

        def server_bind(self) -> None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            super().server_bind()

    return Server((host, port), Handler)
