"""What an EC2 machine can ask about itself: who it is, signed, and whether it will be taken away. IMDSv2 only.

Used by the agent where its machine id is `imds`. The address is the link-local one of every EC2 machine, or what
AWS_EC2_METADATA_SERVICE_ENDPOINT says, as for the AWS SDKs. Never logs an answer: documents and tokens are proofs.
"""

from __future__ import annotations

import calendar
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Final

import msgspec

from workers.agent.notice import Notice

DEFAULT_ENDPOINT: Final = "http://169.254.169.254"
TIMEOUT_S: Final = 2.0
TOKEN_LIFE_S: Final = 21_600
MAX_ANSWER_BYTES: Final = 65_536
# A machine that AWS advises to leave early has no end yet: it is replaced first, and drained then, within this long.
REBALANCE_HORIZON_S: Final = 900.0


class MetadataError(OSError):
    """The metadata service does not answer, or not as it should."""


class Identity(msgspec.Struct, frozen=True):
    """Signed proof of which instance this is: the document exactly as AWS signed it, and the base64 signature."""

    document: str
    signature: str


class _Action(msgspec.Struct, frozen=True):
    action: str
    time: str


class _Rebalance(msgspec.Struct, frozen=True):
    noticeTime: str  # noqa: N815 - AWS's name


class Metadata:
    """Blocks, TIMEOUT_S per call. Not for several threads at once."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        endpoint = environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or DEFAULT_ENDPOINT
        if not endpoint.startswith(("http://", "https://")):
            raise MetadataError(f"AWS_EC2_METADATA_SERVICE_ENDPOINT={endpoint!r}: give an http URL")
        self._base = endpoint.rstrip("/")
        self._token = ""
        self._token_until_s = 0.0
        # A direct connection whatever HTTP_PROXY says: a proxy would answer for its own machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def tag(self, name: str) -> str:
        """A tag of this instance. MetadataError without it: tags must be switched on in the launch template."""
        found = self._get(f"/latest/meta-data/tags/instance/{name}")
        if found is None:
            raise MetadataError(f"this instance has no tag {name!r}, or its tags are not in its metadata")
        return found

    def address(self) -> str:
        """This instance's private address. MetadataError without one."""
        found = self._get("/latest/meta-data/local-ipv4")
        if not found:
            raise MetadataError("this instance has no private address in its metadata")
        return found.strip()

    def identity(self) -> Identity:
        """MetadataError where this is no EC2 machine."""
        document = self._get("/latest/dynamic/instance-identity/document")
        signature = self._get("/latest/dynamic/instance-identity/signature")
        if document is None or signature is None:
            raise MetadataError("no signed instance identity here")
        return Identity(document, "".join(signature.split()))

    def notice(self, now_s: float) -> Notice | None:
        """When this machine ends: spot interruption first, else a rebalance recommendation. None while it may stay."""
        answer = self._get("/latest/meta-data/spot/instance-action")
        if answer is not None:
            try:
                action = msgspec.json.decode(answer, type=_Action)
                # Hibernation begins at once; AWS gives the others their two minutes.
                return Notice(now_s if action.action == "hibernate" else _seconds(action.time))
            except (msgspec.MsgspecError, ValueError) as error:
                raise MetadataError(f"spot/instance-action: {type(error).__name__}") from None
        answer = self._get("/latest/meta-data/events/recommendations/rebalance")
        if answer is None:
            return None
        try:
            return Notice(
                _seconds(msgspec.json.decode(answer, type=_Rebalance).noticeTime) + REBALANCE_HORIZON_S
            )
        except (msgspec.MsgspecError, ValueError) as error:
            raise MetadataError(f"rebalance: {type(error).__name__}") from None

    def _get(self, path: str) -> str | None:
        """Text, or None for 404. A token that is not taken any more is renewed once."""
        for attempt in range(2):
            if not self._token or time.monotonic() > self._token_until_s:
                self._renew()
            request = urllib.request.Request(  # noqa: S310 - scheme checked above
                self._base + path, headers={"X-aws-ec2-metadata-token": self._token}
            )
            try:
                with self._opener.open(request, timeout=TIMEOUT_S) as answer:
                    return bytes(answer.read(MAX_ANSWER_BYTES)).decode("utf-8", "strict")
            except urllib.error.HTTPError as error:
                error.close()
                if error.code == 404:
                    return None
                if error.code != 401 or attempt:
                    raise MetadataError(f"metadata service: HTTP {error.code}") from None
                self._token = ""
            except (OSError, UnicodeDecodeError) as error:
                raise MetadataError(f"metadata service: {type(error).__name__}") from None
        raise AssertionError("unreachable")

    def _renew(self) -> None:
        request = urllib.request.Request(  # noqa: S310
            f"{self._base}/latest/api/token",
            method="PUT",
            headers={"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_LIFE_S)},
        )
        try:
            with self._opener.open(request, timeout=TIMEOUT_S) as answer:
                self._token = bytes(answer.read(MAX_ANSWER_BYTES)).decode("ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise MetadataError(f"metadata service, token: {type(error).__name__}") from None
        self._token_until_s = time.monotonic() + TOKEN_LIFE_S / 2


def _seconds(text: str) -> float:
    return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")))
