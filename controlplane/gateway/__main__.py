"""`python -m controlplane.gateway`: one gateway process.

It binds its port with SO_REUSEPORT, so that several processes share one base_url and the kernel spreads
connections. SIGTERM or SIGINT: no new connections, running streams go on for a grace, the rest is cancelled,
exit 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import uvicorn
import uvloop

from controlplane.gateway.config import ConfigError, GatewayConfig
from controlplane.gateway.exchange import Protocol
from controlplane.gateway.gateway import Gateway
from controlplane.gateway.tls import Certificate
from controlplane.logging import configure

log = logging.getLogger("controlplane.gateway")

_BACKLOG = 2_048
_IDLE_CONNECTION_S = 75  # longer than the usual proxy keeps one, so that we are not the side that closes


def listen(host: str, port: int) -> socket.socket:
    """A listening socket that other gateway processes may share."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((host, port))
    sock.listen(_BACKLOG)
    sock.setblocking(False)
    return sock


class Server(uvicorn.Server):
    """uvicorn's server: tells the gateway when it begins to drain, and leaves signals to `serve`, because it
    would raise a caught SIGTERM again and so end the process before the gateway could close."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self._gateway = gateway

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """Drain and end; asked again, end at once."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._gateway.draining = True
        grace_s = self._gateway.config.shutdown_grace_s
        asyncio.get_running_loop().call_later(grace_s, self._gateway.end_streams)
        await super().shutdown(sockets)


async def serve(config: GatewayConfig) -> None:
    """Run until told to stop."""
    gateway = Gateway(config)
    await gateway.start()
    server = Server(
        uvicorn.Config(
            gateway.app,
            ssl_certfile=config.tls_cert or None,
            ssl_keyfile=config.tls_key or None,
            http=Protocol,
            loop="none",
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_IDLE_CONNECTION_S,
            # Behind end_streams, for a client that does not read even the error.
            timeout_graceful_shutdown=math.ceil(config.shutdown_grace_s) + 2,
            proxy_headers=False,
        ),
        gateway,
    )
    server.config.load()
    certificate = None
    if server.config.ssl is not None:
        certificate = Certificate(server.config.ssl, Path(config.tls_cert), Path(config.tls_key))
        certificate.start()
    for stop_signal in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(stop_signal, server.stop)
    sock = listen(config.host, config.port)
    log.info("gateway %s listens on %s:%s", config.name, config.host, config.port)
    try:
        await server.serve(sockets=[sock])
    finally:
        if certificate is not None:
            await certificate.close()
        await gateway.close()


def main() -> int:
    try:
        config = GatewayConfig.from_env()
    except ConfigError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 2
    configure(level=config.log_level)
    for noisy in ("uvicorn", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
