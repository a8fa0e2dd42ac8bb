"""What is wrong with an account is found and told with its remedy; what is right is not complained about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from django.core.management import call_command

from infra.providers.aws.clients import Clients
from infra.providers.aws.doctor import Finding, Verdict, examine
from infra.providers.aws.provider import AwsProvider
from infra.providers.base import LaunchSpec, Offering, ProviderRefusedError
from tests.cloud.conftest import TYPE, aws_config
from tests.cloud.ec2 import Ec2, Fault
from tests.cloud.imds import certificate


@pytest.fixture
def pem(tmp_path: Path) -> str:
    path = tmp_path / "certificate.pem"
    path.write_bytes(certificate())
    return str(path)


@pytest.fixture
def image(ec2: Ec2) -> str:
    """An image in the account, tagged as its builder should."""
    client = ec2.client("ec2")
    found: str = client.register_image(Name="corral", Architecture="x86_64", RootDeviceName="/dev/sda1")[
        "ImageId"
    ]
    tags = {"corral:driver": "580.82", "corral:cuda": "13.0", "corral:vllm": "0.32.0"}
    client.create_tags(Resources=[found], Tags=[{"Key": k, "Value": v} for k, v in tags.items()])
    return found


def _examine(ec2: Ec2, region: tuple[Ec2, Clients], **changes: str) -> dict[str, Finding]:
    config = aws_config(ec2, **{f"CORRAL_AWS_{name.upper()}": value for name, value in changes.items()})
    return {f.subject: f for f in examine(config, region[1], max_machines=3)}


def test_a_sound_account(ec2: Ec2, region: tuple[Ec2, Clients], pem: str, image: str) -> None:
    found = _examine(ec2, region, ami=image, identity_certificate=pem)
    assert not [f for f in found.values() if f.verdict is Verdict.FAILED]
    assert found["driver × CUDA × engine"].verdict is Verdict.OK
    assert (
        found[f"type {TYPE}"].found
        == "1 × l4, spot from 0.3000 $/h in us-east-1a (3 zones), on-demand 0.8048 $/h"
    )
    assert found["expected cost"].found.startswith("3 machines: 0.90 $/h (spot/us-east-1a")
    assert "CORRAL_AWS_QUEUE_URL" in found["central spot notices"].remedy


def test_what_each_size_holds_and_what_is_never_bought(
    ec2: Ec2, region: tuple[Ec2, Clients], image: str
) -> None:
    config = aws_config(ec2, CORRAL_AWS_AMI=image, CORRAL_AWS_INSTANCE_TYPES=f"{TYPE},g6.12xlarge,g5.xlarge")

    def holds(offer: Offering) -> int:
        return offer.n_gpus if offer.gpu == "l4" else 0

    found = {f.subject: f for f in examine(config, region[1], max_machines=3, holds=holds)}
    assert found["type g6.12xlarge"].found.startswith("4 × l4 for 4 replicas, ")
    assert found["type g5.xlarge"].verdict is Verdict.WARNING
    assert "CORRAL_ACCELERATOR" in found["type g5.xlarge"].remedy


@pytest.mark.parametrize(
    ("changes", "subject", "remedy"),
    [
        ({"ami": "ami-0badbadbadbad0000"}, "image ami-0badbadbadbad0000", "CORRAL_AWS_AMI"),
        (
            {"instance_types": "p5en.48xlarge", "zone": "us-east-1b"},
            "type p5en.48xlarge",
            "another type",
        ),
        ({"security_groups": "sg-0bad"}, "security groups sg-0bad", "CORRAL_AWS_SECURITY_GROUPS"),
        ({"identity_certificate": "/nowhere.pem"}, "identity certificate", "CORRAL_AWS_IDENTITY_CERTIFICATE"),
        ({"queue_url": "http://127.0.0.1:1/none"}, "central spot notices", "sqs:ReceiveMessage"),
    ],
)
def test_what_is_wrong_is_named(
    ec2: Ec2, region: tuple[Ec2, Clients], changes: dict[str, str], subject: str, remedy: str
) -> None:
    changes = dict(changes)
    zone = changes.pop("zone", "")
    only = {"subnets": f"{zone}={ec2.subnets[zone]}"} if zone else {}
    found = _examine(ec2, region, **changes, **only)[subject]
    assert found.verdict is Verdict.FAILED, found
    assert remedy in found.remedy


def test_a_subnet_of_another_zone(ec2: Ec2, region: tuple[Ec2, Clients]) -> None:
    subnet = ec2.subnets["us-east-1a"]
    found = _examine(ec2, region, subnets=f"us-east-1c={subnet}")[f"subnet {subnet}"]
    assert found.remedy == f"write us-east-1a={subnet} into CORRAL_AWS_SUBNETS"


def test_a_missing_right_is_named_and_nothing_is_bought(ec2: Ec2, region: tuple[Ec2, Clients]) -> None:
    ec2.faults.append(Fault("TerminateInstances", code="UnauthorizedOperation", status=403))
    found = _examine(ec2, region)
    assert found["ec2:TerminateInstances"].remedy == "add ec2:TerminateInstances to the role's policy"
    assert ec2.instances() == []
    assert all(form.get("DryRun") == "true" for action, form in ec2.calls if action == "RunInstances")


@pytest.mark.parametrize(
    ("tags", "verdict"),
    [
        ({"corral:driver": "550.1", "corral:cuda": "13.0"}, Verdict.FAILED),
        ({"corral:driver": "580.1", "corral:cuda": "99.0"}, Verdict.WARNING),
        ({}, Verdict.UNKNOWN),
    ],
)
def test_an_image_whose_driver_is_too_old_is_found_before_it_is_launched(
    ec2: Ec2, region: tuple[Ec2, Clients], tags: dict[str, str], verdict: Verdict
) -> None:
    client = ec2.client("ec2")
    image = client.register_image(Name=f"corral {len(tags)} {verdict}", RootDeviceName="/dev/sda1")["ImageId"]
    if tags:
        client.create_tags(Resources=[image], Tags=[{"Key": k, "Value": v} for k, v in tags.items()])
    assert _examine(ec2, region, ami=image)["driver × CUDA × engine"].verdict is verdict
    provider = AwsProvider(aws_config(ec2, CORRAL_AWS_AMI=image), region[1], "c0")
    offer = Offering(instance_type=TYPE, zone="us-east-1a", is_spot=True, price_nano_per_h=1)
    spec = LaunchSpec(
        machine_id="a" * 32, cell="c0", enrol_url="http://x", engine="vllm", offerings=(offer,), proof=""
    )
    if verdict is Verdict.FAILED:
        with pytest.raises(ProviderRefusedError, match="driver 580 or later"):
            provider.launch(spec, "t" * 32)
        assert ec2.instances() == []
    else:
        assert provider.launch(spec, "t" * 32).ref


def test_the_command_says_what_failed_and_ends_with_1(
    ec2: Ec2, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "REGION": "us-east-1",
        "AMI": ec2.ami,
        "SUBNETS": f"us-east-1a={ec2.subnets['us-east-1a']}",
        "INSTANCE_TYPES": TYPE,
        "SECURITY_GROUPS": ec2.group,
    }.items():
        monkeypatch.setenv(f"CORRAL_AWS_{name}", value)
    with pytest.raises(SystemExit, match="1"):
        call_command("doctor", "aws", "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["n_failed"] >= 1
    assert {f["subject"] for f in told["findings"]} >= {
        "credentials",
        "identity certificate",
        "expected cost",
    }
