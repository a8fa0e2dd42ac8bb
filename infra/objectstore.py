"""Model versions in an S3 bucket: put there once by content, read by machines through signed URLs.

Called by `manage.py publish_model` and, for signing alone (no network), by autoscaler/specs.py. Machines get no
credentials for the bucket: a URL opens one file of the version they were told to serve, for a while. boto3's own
variables say where the store is (AWS_ENDPOINT_URL_S3, credentials, region).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from workers.modelcache.manifest import MANIFEST_NAME, Manifest

EXPIRES_S: Final = 6 * 3600  # a cold start of hundreds of gigabytes ends within
PART_BYTES: Final = 64 << 20
CONNECT_S, READ_S = 5.0, 60.0
_BLOCK_BYTES: Final = 1 << 20


class ObjectStoreError(RuntimeError):
    """The store cannot be used as asked; the message says the remedy."""


@dataclass(frozen=True, slots=True)
class Place:
    """`s3://bucket/prefix`; versions lie below it by digest."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, uri: str) -> Place:
        """Raises ObjectStoreError."""
        parts = urlsplit(uri)
        if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
            raise ObjectStoreError(f"{uri!r}: give s3://bucket or s3://bucket/prefix")
        return cls(parts.netloc, parts.path.strip("/"))

    def key(self, *names: str) -> str:
        return "/".join(filter(None, (self.prefix, *names)))

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


def publish(directory: Path, manifest: Manifest, place: Place, report: Callable[[str, int], None]) -> int:
    """Upload what is not there yet, the manifest last, so that a version is whole or unknown; bytes sent.

    Every part carries its SHA-256, which the store checks. `report` hears of each file and its size.
    """
    s3, sent = _client(), 0
    for entry in manifest.files:
        sent += _put(s3, directory / entry.name, place, manifest.digest, entry.name, entry.size_bytes, report)
    path = directory / MANIFEST_NAME
    return sent + _put(s3, path, place, manifest.digest, MANIFEST_NAME, path.stat().st_size, report)


def signed_urls(place: Place, digest: str, names: Iterable[str]) -> dict[str, list[str]]:
    """A URL for the manifest and each of the version's files, good for EXPIRES_S. Asks nobody."""
    s3 = _client()
    return {
        name: [
            s3.generate_presigned_url(
                "get_object",
                Params={"Bucket": place.bucket, "Key": place.key(digest, name)},
                ExpiresIn=EXPIRES_S,
            )
        ]
        for name in (MANIFEST_NAME, *names)
    }


def upload_url(place: Place, name: str, expires_s: int) -> str:
    """A URL that takes a PUT of one file below the place. Asks nobody."""
    found: str = _client().generate_presigned_url(
        "put_object", Params={"Bucket": place.bucket, "Key": place.key(name)}, ExpiresIn=expires_s
    )
    return found


def download(place: Place, name: str, target: Path, max_bytes: int) -> None:
    """One file below the place. Raises ObjectStoreError: it is not there, or larger than `max_bytes`."""
    from botocore.exceptions import BotoCoreError, ClientError

    s3, key = _client(), place.key(name)
    try:
        answer = s3.get_object(Bucket=place.bucket, Key=key)
        if answer["ContentLength"] > max_bytes:
            raise ObjectStoreError(f"{target.name} has {answer['ContentLength']} bytes; at most {max_bytes}")
        with target.open("wb") as file:
            for block in answer["Body"].iter_chunks(_BLOCK_BYTES):
                file.write(block)
    except (ClientError, BotoCoreError) as error:
        code = _code(error)
        if code in ("404", "NoSuchKey", "NotFound"):
            raise ObjectStoreError(
                f"{target.name} was not uploaded: PUT it to the URL given for it"
            ) from None
        raise ObjectStoreError(f"{target.name} could not be read from the object store: {code}") from None


def remove(place: Place, names: Iterable[str]) -> None:
    """Delete files below the place; those that are not there are as good as deleted. Raises ObjectStoreError."""
    from botocore.exceptions import BotoCoreError, ClientError

    s3 = _client()
    try:
        for name in names:
            s3.delete_object(Bucket=place.bucket, Key=place.key(name))
    except (ClientError, BotoCoreError) as error:
        raise ObjectStoreError(f"files could not be deleted from {place.uri}: {_code(error)}") from None


def _code(error: Exception) -> str:
    response = getattr(error, "response", None)
    return str(response["Error"]["Code"]) if response else type(error).__name__


def _put(
    s3: Any,
    path: Path,
    place: Place,
    digest: str,
    name: str,
    size: int,
    report: Callable[[str, int], None],
) -> int:
    from boto3.s3.transfer import TransferConfig
    from botocore.exceptions import BotoCoreError, ClientError

    key = place.key(digest, name)
    try:
        try:
            there = s3.head_object(Bucket=place.bucket, Key=key)
            if there["ContentLength"] == size and there.get("Metadata", {}).get("corral-digest") == digest:
                return 0
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("404", "NoSuchKey", "NotFound"):
                raise
        report(name, size)
        s3.upload_file(
            str(path),
            place.bucket,
            key,
            ExtraArgs={"ChecksumAlgorithm": "SHA256", "Metadata": {"corral-digest": digest}},
            Config=TransferConfig(
                multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4
            ),
        )
        return size
    except (ClientError, BotoCoreError) as error:
        code = error.response["Error"]["Code"] if isinstance(error, ClientError) else type(error).__name__
        raise ObjectStoreError(
            f"{name} could not be put into {place.uri}: {code}: check the bucket, its region and the credentials"
        ) from None


@lru_cache(maxsize=1)
def _client() -> Any:
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client(
        "s3",
        config=Config(
            connect_timeout=CONNECT_S,
            read_timeout=READ_S,
            retries={"total_max_attempts": 4, "mode": "standard"},
            signature_version="s3v4",
            request_checksum_calculation="when_required",
        ),
    )
