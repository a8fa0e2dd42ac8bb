"""Enrolment: a single-use proof against the machine's own Redis user, kept in a file so that a restart
needs no proof.

POST {machine_id, capabilities, nonce, proof or (signed by EC2) identity} to the control plane; the answer holds the URL
of the cell's Redis with this machine's user and password. The nonce is made here, kept on disk before it is sent, and
gets the same answer again should the first be lost. None of proof, identity, nonce and URL is ever logged.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit, urlunsplit

import msgspec

from workers import sealed
from workers.agent.imds import Metadata, MetadataError
from workers.config import AgentConfig
from workers.keys import DEFAULT_CELL
from workers.redis_address import with_password_file

log = logging.getLogger(__name__)

# Long: the control plane may be busy enrolling a fleet.
_TIMEOUT_S: Final = 30.0
_GIVE_UP_S: Final = 240.0
_MAX_ANSWER_BYTES: Final = 65_536


class EnrolRefused(RuntimeError):  # noqa: N818 - an answer
    """The control plane will not enrol this machine; the message says why. Trying again is useless."""


class Credentials(msgspec.Struct, kw_only=True):
    """What enrolment gives; the content of credentials.json."""

    machine_id: str
    redis_url: str
    cell: str = DEFAULT_CELL
    heartbeat_ms: int = 1000
    # Ours alone: opens what the control plane seals for this machine.
    box_key: str = ""


class Asking(msgspec.Struct, kw_only=True):
    """An enrolment that was begun: what its answer, when it comes, belongs to. The content of enrolling.json."""

    machine_id: str
    nonce: str
    box_key: str


_Kept = TypeVar("_Kept", Credentials, Asking)


async def credentials_of(config: AgentConfig) -> Credentials:
    """Stored credentials, else enrol and store them. EnrolRefused when that is hopeless."""
    path = config.dirs.credentials
    found = _read(path, config.machine, Credentials)
    if found is None:
        found = await _enrol(config)
        _write(path, found)
        config.dirs.enrolling.unlink(missing_ok=True)
    found.redis_url = with_password_file(_at_address(found.redis_url, config.redis), config.dirs.password)
    return found


async def _enrol(config: AgentConfig) -> Credentials:
    if not config.proof and not config.tag_prefix:
        raise EnrolRefused("no credentials of an earlier run and no proof: set CORRAL_ENROL_PROOF")
    asked: dict[str, object] = {"machine_id": config.machine, "capabilities": capabilities(config)}
    if config.proof:
        asked["proof"] = config.proof
    else:
        try:
            asked["identity"] = await asyncio.to_thread(lambda: Metadata().identity())
        except MetadataError as error:
            raise EnrolRefused(f"cannot prove which machine this is: {error}") from None
    asking = _read(config.dirs.enrolling, config.machine, Asking)
    if asking is None:
        asking = Asking(machine_id=config.machine, nonce=secrets.token_urlsafe(32), box_key=sealed.new_key())
        _write(config.dirs.enrolling, asking)
    asked["nonce"] = asking.nonce
    asked["capabilities"] = {**capabilities(config), "box_public": sealed.public_of(asking.box_key)}
    question = msgspec.json.encode(asked)
    deadline_s = asyncio.get_running_loop().time() + _GIVE_UP_S
    wait_s = 0.1
    while True:
        try:
            answer = await asyncio.to_thread(_post, config.enrol_url, question)
            found = msgspec.json.decode(answer, type=Credentials)
        except (OSError, msgspec.MsgspecError) as error:
            if asyncio.get_running_loop().time() > deadline_s:
                raise EnrolRefused(
                    f"no enrolment within {_GIVE_UP_S:.0f} s: {type(error).__name__}"
                ) from None
            log.warning("enrolment: %s; trying again", type(error).__name__)
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(wait_s * 2, 5.0)
            continue
        if found.machine_id != config.machine:
            raise EnrolRefused(f"enrolled as {found.machine_id!r}, expected {config.machine!r}")
        log.info("enrolled")
        found.box_key = asking.box_key
        return found


def capabilities(config: AgentConfig) -> dict[str, object]:
    """What this machine is, for placement."""
    return {
        "engine": config.engine,
        "n_cpus": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [path.name for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*"))],
    }


def _post(url: str, body: bytes) -> bytes:
    """EnrolRefused for an answer that will not change; OSError otherwise."""
    request = urllib.request.Request(  # noqa: S310 - scheme checked by AgentConfig
        url, data=body, headers={"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310
            return bytes(answer.read(_MAX_ANSWER_BYTES))
    except urllib.error.HTTPError as error:
        with error:
            detail = error.read(500).decode("utf-8", "replace")
        if 400 <= error.code < 500 and error.code not in (404, 408, 425, 429):
            raise EnrolRefused(f"enrolment refused ({error.code}): {detail}") from None
        raise


def _read(path: Path, machine: str, kind: type[_Kept]) -> _Kept | None:
    try:
        found = msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError):
        return None
    return found if found.machine_id == machine else None


def _write(path: Path, kept: Credentials | Asking) -> None:
    """Whole or not at all, readable by us only."""
    scratch = path.with_suffix(".new")
    scratch.unlink(missing_ok=True)
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(msgspec.json.encode(kept))
        file.flush()
        os.fsync(file.fileno())
    scratch.rename(path)


def _at_address(url: str, address: str) -> str:
    """The URL at another host:port (a tunnel); unchanged when `address` is empty."""
    if not address:
        return url
    parts = urlsplit(url)
    login = parts.netloc.rpartition("@")[0]
    return urlunsplit(parts._replace(netloc=f"{login}@{address}" if login else address))
