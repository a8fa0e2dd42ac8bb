"""The machine's Redis password is replaced: the agent opens the box that control left for it, and puts it in a file.

Every process of the machine reads that file when it connects (workers/redis_address.py), so nothing is restarted. Who
knows the present password finds the box, too, and cannot open it. Called by the agent's loop; never logs a password.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from workers import sealed
from workers.keys import MachineKeys
from workers.redis_client import Client

log = logging.getLogger(__name__)


class Renewal:
    """`look` now and then. `digest`: SHA-256 (hex) of the password that processes connect with; said in every beat."""

    def __init__(self, client: Client, keys: MachineKeys, box_key: str, path: Path) -> None:
        self._client, self._keys, self._box_key, self._path = client, keys, box_key, path
        self.digest = _digest((client.address.password_now() or "").encode())

    async def look(self) -> bool:
        """Whether a new password was taken. Raises RedisError; may be repeated at any point."""
        if await self._client.call("EXISTS", self._keys.password) == 0:
            return False
        # Taken whole or not at all: what control takes back, nobody has. Sent in one write, so nothing comes between.
        commands = (("MULTI",), ("GET", self._keys.password), ("DEL", self._keys.password), ("EXEC",))
        answers = [self._client.call(*command) for command in commands]
        box = [await answer for answer in answers][-1][0]
        if box is None:
            return False
        try:
            password = sealed.open_box(self._box_key, box.decode("ascii", "replace"))
            _write(self._path, password)
        except sealed.BoxError as error:  # not for us: whoever put it there knows our password
            log.error("a password was offered that is not ours to open: %s", error)
            return False
        except OSError as error:  # control offers another one
            log.error("a new password could not be kept: %s", error)
            return False
        self.digest = _digest(password)
        log.info("password replaced")
        return True


def _digest(password: bytes) -> str:
    return hashlib.sha256(password).hexdigest()


def _write(path: Path, password: bytes) -> None:
    """Whole or not at all, readable by us only."""
    scratch = path.with_suffix(".new")
    scratch.unlink(missing_ok=True)
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(password)
        file.flush()
        os.fsync(file.fileno())
    scratch.rename(path)
