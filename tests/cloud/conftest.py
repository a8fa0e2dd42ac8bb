"""A simulated region, and the provider that buys there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from infra.providers.aws.clients import Clients, connect
from infra.providers.aws.config import AwsConfig
from infra.providers.aws.provider import AwsProvider
from tests.cloud.ec2 import REGION, ZONES, Ec2

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
