"""Redis URLs, parsed once into an Address. Called by the client and the subscriber; connects to nothing."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, parse_qsl, unquote, urlencode, urlsplit, urlunsplit


@dataclass(frozen=True)
class Address:
    """Where Redis is and who we are there. The password never shows in a repr or a log line."""

    host: str
    port: int
    path: str | None
    db: int
    username: str | None
    password: str | None = field(repr=False)
    tls: ssl.SSLContext | None = field(repr=False)
    # Where it says so, the password is what this file holds at the moment of connecting: it is replaced now and then.
    password_file: str = ""

    def password_now(self) -> str | None:
        """The file's, where there is one to be read; else the URL's."""
        return read_password(self.password_file) or self.password

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"{self.host}:{self.port}"


def parse_url(url: str) -> Address:
    """`redis://`, `rediss://` (TLS, verified) or `unix://` → Address; ValueError names the part at fault.

    All take `?password_file=` (a path).
    rediss:// takes `?ssl_ca_certs=`, `ssl_certfile=` and `ssl_keyfile=` (paths); unix:// takes `?db=`.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise ValueError(f"Redis URL: scheme is {parts.scheme!r}; use redis://, rediss:// or unix://")
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    db_text = query.get("db", "") if parts.scheme == "unix" else parts.path.strip("/") or query.get("db", "")
    if db_text and not db_text.isdigit():
        raise ValueError(f"Redis URL: database is {db_text!r}; it must be a number such as /0")
    tls = None
    if parts.scheme == "rediss":
        tls = ssl.create_default_context(cafile=query.get("ssl_ca_certs"))
        if "ssl_certfile" in query:
            tls.load_cert_chain(query["ssl_certfile"], query.get("ssl_keyfile"))
    return Address(
        host=parts.hostname or "127.0.0.1",
        port=parts.port or 6379,
        path=unquote(parts.path) if parts.scheme == "unix" else None,
        db=int(db_text or 0),
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        tls=tls,
        password_file=query.get("password_file", ""),
    )


def read_password(path: str) -> str:
    """What is in a password file; '' without one."""
    if not path:
        return ""
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def with_password_file(url: str, path: Path) -> str:
    """The URL of somebody whose password may be replaced by what this file comes to hold."""
    parts = urlsplit(url)
    query = urlencode({**dict(parse_qsl(parts.query)), "password_file": str(path)})
    return urlunsplit(parts._replace(query=query))


def without_password_file(url: str) -> tuple[str, str]:
    """(the URL as others read it, path of the password file or '')."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    path = query.pop("password_file", "")
    return (urlunsplit(parts._replace(query=urlencode(query))) if path else url), path
