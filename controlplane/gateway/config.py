"""What a gateway process can be told, read from the environment once and checked: a mistake names knob,
value, range.

Called by __main__ only; nothing else in the gateway reads the environment.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from controlplane.prediction.lengths.model import ArtefactError, load
from controlplane.tenants.key_scopes import Network, network_of
from workers.keys import DEFAULT_CELL


class ConfigError(ValueError):
    """A variable is missing or out of range; the message says which, what it was and what is allowed."""


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """One gateway process. Secrets stay out of the repr."""

    redis_url: str = field(repr=False)
    pg_dsn: str = field(repr=False)
    key_pepper: bytes = field(repr=False)
    # Also accepted while the pepper changes (manage.py rotate pepper).
    key_pepper_previous: bytes = field(default=b"", repr=False)
    key_pepper_next: bytes = field(default=b"", repr=False)
    # Salts digests of bodies and idempotency keys; it outlives the pepper, so that clients may come back. Empty: the
    # pepper does.
    digest_secret: bytes = field(default=b"", repr=False)
    cell: str = DEFAULT_CELL
    name: str = ""  # label of its metrics and log lines; processes that share a port need different ones
    host: str = "127.0.0.1"
    port: int = 8400
    # PEM files, both or none (then a proxy before it speaks TLS). Read again when they change.
    tls_cert: str = ""
    tls_key: str = ""
    # Origins of browsers that may call /v1: the console's playground.
    cors_origins: tuple[str, ...] = ()
    # Whose X-Forwarded-For is believed, where keys are bound to networks.
    trusted_proxies: tuple[Network, ...] = ()

    max_body_bytes: int = 4 << 20
    # Some 10 KB each: bounds memory well before the descriptor limit does.
    max_in_flight: int = 10_000
    queue_bound: int = 2_000  # requests waiting per deployment, over all gateways
    # A band whose oldest request waited so long for each band before it gets every eighth free slot; inside its band a
    # request that waited so long goes first, or four times as long as usual where that is more (policy/fairness.py).
    queue_age_s: float = 30.0
    # File made by `manage.py train_lengths`: where a deployment serves shortest first, the text says how long.
    length_model: str = ""
    request_timeout_s: float = 600.0  # admission to the last token
    shutdown_grace_s: float = 30.0  # how long streams may run on after SIGTERM

    # A client that waits without a ready replica is told why from here on; sooner only costs the chance of a
    # proper status code for an error that comes at once.
    comment_after_s: float = 0.5
    keepalive_s: float = 10.0  # common proxies close an idle connection after 30 to 60 s
    # A stream that hears nothing for so long looks at its journal: bounds what a lost frame costs.
    stall_s: float = 5.0
    # Redis away for longer ends running streams with a retryable error.
    redis_grace_s: float = 20.0
    # Entries kept for a client that reads too slowly; beyond them the journal keeps the rest.
    stream_buffer: int = 1_024

    key_fresh_s: float = 30.0
    # With Postgres away a key seen before is served for so long, and no longer: a revoked one would be, too.
    key_stale_s: float = 900.0
    key_cache_size: int = 50_000
    unknown_key_s: float = 5.0
    change_poll_s: float = 0.5
    pg_pool_size: int = 4
    # CORRAL_PG_POOLER=transaction: a pooler in transaction mode stands before PostgreSQL.
    pg_pooled: bool = False

    # Share of admissions that are kept with their reasons; refusals always are.
    decision_sample: float = 0.01
    console_url: str = ""  # under which the API lies; refusals link to it

    log_sample: float = 1.0  # share of finished requests that get a log line; failures always do
    log_level: str = "INFO"

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Self:
        """Raises ConfigError listing what is missing, or naming the first value that is out of range."""
        missing = [
            name
            for name in ("CORRAL_REDIS_URL", "CORRAL_PG_DSN_APP", "CORRAL_KEY_PEPPER")
            if not env.get(name)
        ]
        if missing:
            raise ConfigError(f"set {', '.join(missing)} (`manage.py up` sets them for the local stack)")
        secrets = {
            knob: _secret(env, f"CORRAL_{knob.upper()}")
            for knob in ("key_pepper", "key_pepper_previous", "key_pepper_next", "digest_secret")
        }
        pooler = env.get("CORRAL_PG_POOLER", "")
        if pooler not in ("", "transaction"):
            raise ConfigError(f"CORRAL_PG_POOLER={pooler!r}: set transaction, or leave it out")
        tls = {name: env.get(f"CORRAL_GATEWAY_{name.upper()}", "") for name in ("tls_cert", "tls_key")}
        _check_pair(tls["tls_cert"], tls["tls_key"])
        listed = env.get("CORRAL_GATEWAY_CORS_ORIGINS", env.get("CORRAL_CONSOLE_URL", ""))
        defaults = cls("", "", b"")

        def number(knob: str, low: float, high: float) -> float:
            name = f"CORRAL_GATEWAY_{knob.upper()}"
            text = env.get(name)
            if text is None:
                return float(getattr(defaults, knob))
            try:
                value = float(text)
            except ValueError:
                value = float("nan")
            if not low <= value <= high:
                raise ConfigError(f"{name}={text!r}: must be a number from {low:g} to {high:g}")
            return value

        return cls(
            redis_url=env["CORRAL_REDIS_URL"],
            pg_dsn=env["CORRAL_PG_DSN_APP"],
            key_pepper=secrets["key_pepper"],
            key_pepper_previous=secrets["key_pepper_previous"],
            key_pepper_next=secrets["key_pepper_next"],
            digest_secret=secrets["digest_secret"],
            tls_cert=tls["tls_cert"],
            tls_key=tls["tls_key"],
            cell=env.get("CORRAL_CELL") or DEFAULT_CELL,
            name=env.get("CORRAL_GATEWAY_NAME") or f"gw-{os.getpid()}",
            host=env.get("CORRAL_GATEWAY_HOST") or defaults.host,
            port=int(number("port", 1, 65_535)),
            cors_origins=tuple(origin.strip().rstrip("/") for origin in listed.split(",") if origin.strip()),
            trusted_proxies=_networks(env.get("CORRAL_TRUSTED_PROXIES", "")),
            max_body_bytes=int(number("max_body_bytes", 1_024, 256 << 20)),
            max_in_flight=int(number("max_in_flight", 1, 1_000_000)),
            queue_bound=int(number("queue_bound", 0, 1_000_000)),
            queue_age_s=number("queue_age_s", 0, 86_400),
            length_model=_length_model(env.get("CORRAL_GATEWAY_LENGTH_MODEL", "")),
            request_timeout_s=number("request_timeout_s", 1, 86_400),
            shutdown_grace_s=number("shutdown_grace_s", 0, 86_400),
            comment_after_s=number("comment_after_s", 0.01, 60),
            keepalive_s=number("keepalive_s", 1, 300),
            stall_s=number("stall_s", 0.1, 300),
            redis_grace_s=number("redis_grace_s", 1, 3_600),
            stream_buffer=int(number("stream_buffer", 2, 1_000_000)),
            key_fresh_s=number("key_fresh_s", 0.1, 3_600),
            key_stale_s=number("key_stale_s", 0, 86_400),
            key_cache_size=int(number("key_cache_size", 16, 10_000_000)),
            unknown_key_s=number("unknown_key_s", 0, 60),
            change_poll_s=number("change_poll_s", 0.05, 60),
            pg_pool_size=int(number("pg_pool_size", 1, 100)),
            pg_pooled=pooler == "transaction",
            decision_sample=number("decision_sample", 0, 1),
            console_url=env.get("CORRAL_CONSOLE_URL", "").rstrip("/"),
            log_sample=number("log_sample", 0, 1),
            log_level=(env.get("CORRAL_LOG_LEVEL") or defaults.log_level).upper(),
        )


def _networks(listed: str) -> tuple[Network, ...]:
    try:
        return tuple(network_of(text) for text in listed.split(",") if text.strip())
    except ValueError as error:
        raise ConfigError(
            f"CORRAL_TRUSTED_PROXIES: {error}; list addresses or ranges (CIDR) with commas between them"
        ) from None


def _secret(env: Mapping[str, str], name: str) -> bytes:
    """Hex digits as bytes; empty where it is not set (what must be set was checked before)."""
    text = env.get(name, "")
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if text and len(value) < 16:
        raise ConfigError(f"{name}: must be 32 or more hex digits")
    return value


def _check_pair(cert: str, key: str) -> None:
    """Both or none, and they fit."""
    if not cert and not key:
        return
    if not cert or not key:
        raise ConfigError("CORRAL_GATEWAY_TLS_CERT, CORRAL_GATEWAY_TLS_KEY: set both, or none")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"CORRAL_GATEWAY_TLS_CERT={cert}, CORRAL_GATEWAY_TLS_KEY={key}: {error}") from error


def _length_model(path: str) -> str:
    """The path, if what lies there can be used."""
    if path:
        try:
            load(Path(path))
        except ArtefactError as error:
            raise ConfigError(f"CORRAL_GATEWAY_LENGTH_MODEL: {error}") from None
    return path
