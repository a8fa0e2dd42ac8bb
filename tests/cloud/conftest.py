"""A simulated region, and the provider that buys there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import objectstore
from infra.providers.aws.clients import Clients, connect
from infra.providers.aws.config import AwsConfig
from infra.providers.aws.provider import AwsProvider
from tests.cloud.ec2 import REGION, ZONES, Ec2
from tests.cloud.s3 import s3_server

TYPE = "g6.xlarge"


@pytest.fixture(scope="session")
def region() -> Iterator[tuple[Ec2, Clients]]:
    """The server and boto3's clients, which take a second to make."""
    made = Ec2()
    made.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.environ.items():
            patch.setenv(name, value)
        clients = connect(REGION)
    yield made, clients
    made.stop()


@pytest.fixture
def ec2(region: tuple[Ec2, Clients], monkeypatch: pytest.MonkeyPatch) -> Ec2:
    made = region[0]
    made.reset()
    made.spot_usd |= {(TYPE, zone): 0.3 + n / 100 for n, zone in enumerate(ZONES)}
    for name, value in made.environ.items():
        monkeypatch.setenv(name, value)
    return made


@pytest.fixture
def aws(ec2: Ec2, region: tuple[Ec2, Clients]) -> AwsProvider:
    return AwsProvider(aws_config(ec2), region[1], "c0", sleep=lambda _: None)


def aws_config(ec2: Ec2, **changes: str) -> AwsConfig:
    """As an operator would write it."""
    environ = {
        "CORRAL_AWS_REGION": REGION,
        "CORRAL_AWS_SUBNETS": ",".join(f"{zone}={subnet}" for zone, subnet in ec2.subnets.items()),
        "CORRAL_AWS_AMI": ec2.ami,
        "CORRAL_AWS_INSTANCE_TYPES": TYPE,
        "CORRAL_AWS_SECURITY_GROUPS": ec2.group,
    }
    return AwsConfig.read({**environ, **changes})


@pytest.fixture(scope="session")
def s3_environ() -> Iterator[dict[str, str]]:
    """A real S3 server for the session; its variables for boto3."""
    root = Path(tempfile.mkdtemp(prefix="weed"))
    with s3_server(root) as environ:
        yield environ
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def s3(s3_environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The same, in this process's environment. After `ec2`, if both: its credentials are taken for all."""
    for name, value in s3_environ.items():
        monkeypatch.setenv(name, value)
    objectstore._client.cache_clear()
    return s3_environ
