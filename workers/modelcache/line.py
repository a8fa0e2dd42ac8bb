"""One kept HTTP connection that brings ranges of a file to their place on the disk, hashing them on the way.

Used by transfer.py, one per thread. A connection on which anything went wrong is closed and made anew by the next call.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import ssl
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from hashlib import _Hash

_BLOCK_BYTES: Final = 1 << 20


class TransferError(RuntimeError):
    """`code` is stable: `source_missing`, `source_expired`, `source_unreachable`, `bad_weights`, `disk_full`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a source may take: to be reached, to say something, and what it must give."""

    connect_s: float
    read_s: float
    bytes_per_s: float

    def range_s(self, n_bytes: int) -> float:
        return max(self.read_s, n_bytes / self.bytes_per_s)


FAR: Final = Patience(connect_s=5.0, read_s=30.0, bytes_per_s=200e3)
# Of a source that others can stand in for, such as a sibling: what comes slower is better had from them.
NEAR: Final = Patience(connect_s=1.0, read_s=5.0, bytes_per_s=5e6)


class Line:
    """`fetch` as often as one likes, from one thread; `close` at the end."""

    def __init__(self) -> None:
        self._key: tuple[str, str, Patience] | None = None
        self._connection: http.client.HTTPConnection | None = None
        self._block = memoryview(bytearray(_BLOCK_BYTES))

    def fetch(
        self,
        url: str,
        start: int,
        end: int,
        descriptor: int,
        name: str,
        digest: _Hash | None = None,
        patience: Patience = FAR,
    ) -> None:
        """Bytes [start, end) into the file, and into `digest`. Raises TransferError."""
        where = urlsplit(url)
        path = f"{where.path}?{where.query}" if where.query else where.path
        deadline_s = time.monotonic() + patience.range_s(end - start)
        try:
            connection = self._connect(where.scheme, where.netloc, patience)
            connection.request("GET", path, headers={"Range": f"bytes={start}-{end - 1}"})
            answer = connection.getresponse()
            if answer.status != 206 and not (answer.status == 200 and start == 0):
                _refuse(answer.status, name)
            at = start
            while at < end:
                n = answer.readinto(self._block[: min(_BLOCK_BYTES, end - at)])
                if not n or time.monotonic() > deadline_s:
                    raise TransferError("source_unreachable", f"{name}: the source stopped in the middle")
                if digest is not None:
                    digest.update(self._block[:n])
                _write(descriptor, self._block[:n], at, name)
                at += n
            if answer.status == 200 or answer.read(1):
                self.close()  # more comes than was asked for
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise TransferError("source_unreachable", f"{name}: {type(error).__name__}") from None
        except BaseException:
            self.close()
            raise

    def _connect(self, scheme: str, netloc: str, patience: Patience) -> http.client.HTTPConnection:
        if self._connection is not None and self._key == (scheme, netloc, patience):
            return self._connection
        self.close()
        if scheme == "https":
            self._connection = http.client.HTTPSConnection(
                netloc, timeout=patience.connect_s, context=ssl.create_default_context()
            )
        elif scheme == "http":
            self._connection = http.client.HTTPConnection(netloc, timeout=patience.connect_s)
        else:
            raise TransferError(
                "source_missing", f"{scheme}:// is no source of model files: give http or https"
            )
        self._connection.connect()
        self._connection.sock.settimeout(patience.read_s)
        self._key = (scheme, netloc, patience)
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.close()
        self._connection = self._key = None


def _write(descriptor: int, block: memoryview, at: int, name: str) -> None:
    try:
        while block:
            n = os.pwrite(descriptor, block, at)
            block, at = block[n:], at + n
    except OSError as error:
        raise TransferError("disk_full", f"no space left for {name}: {error.strerror}") from None


def _refuse(status: int, name: str) -> None:
    if status in (401, 403):
        raise TransferError(
            "source_expired", f"{name}: the source refused us ({status}): its URL may have expired"
        )
    if status in (404, 410):
        raise TransferError("source_missing", f"{name}: the source does not have it ({status})")
    raise TransferError("source_unreachable", f"{name}: the source answered {status}")
