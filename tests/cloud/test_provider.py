"""The AWS provider against a simulated EC2 that refuses, delays, throttles, forgets to answer and repeats itself."""

from __future__ import annotations

import shlex
import time
import uuid
from typing import Any

import pytest

from infra.providers.aws.clients import Clients
from infra.providers.aws.config import AwsConfig
from infra.providers.aws.provider import AwsProvider
from infra.providers.base import (
    CapacityError,
    LaunchSpec,
    Offering,
    OutcomeUnknownError,
    ProviderError,
    ProviderRefusedError,
    ProviderState,
)
from tests.cloud.conftest import TYPE, aws_config
from tests.cloud.ec2 import ZONES, Ec2, Fault
from workers.config import AgentConfig

SPOT = tuple(f"spot/{zone}/{TYPE}" for zone in ZONES)


def _spec(aws: AwsProvider, machine_id: str = "a1" * 16, **changes: Any) -> LaunchSpec:
    offers = sorted(aws.offerings(), key=lambda o: (not o.is_spot, o.price_nano_per_h, o.zone))
    given: dict[str, Any] = {"offerings": tuple(offers), "proof": "never to be seen", **changes}
    return LaunchSpec(
        machine_id=machine_id, cell="c0", enrol_url="http://10.0.0.1/internal/enrol", engine="toy", **given
    )


def _token() -> str:
    return uuid.uuid4().hex


def test_the_market_has_gpu_spot_prices_by_zone_and_a_dated_price_on_demand(aws: AwsProvider) -> None:
    offers = {o.name: o for o in aws.offerings()}
    assert set(offers) == {*SPOT, *(f"on-demand/{zone}/{TYPE}" for zone in ZONES)}
    first = offers[SPOT[0]]
    assert (first.price_nano_per_h, first.gpu, first.n_gpus) == (300_000_000, "l4", 1)
    assert offers[f"on-demand/us-east-1a/{TYPE}"].price_nano_per_h == 804_800_000


def test_one_spot_machine_with_everything_it_is_known_by(aws: AwsProvider, ec2: Ec2) -> None:
    token = _token()
    bought = aws.launch(_spec(aws), token)
    assert bought.offering == SPOT[0]
    [instance] = ec2.instances()
    assert (instance.id, instance.placement.zone, instance.lifecycle) == (bought.ref, ZONES[0], "spot")
    tags = {t["key"]: t["value"] for t in instance.get_tags()}
    assert (tags["corral:machine"], tags["corral:cell"], tags["corral:token"]) == ("a1" * 16, "c0", token)
    [listed] = aws.describe()
    assert (listed.ref, listed.machine_id, listed.client_token) == (bought.ref, "a1" * 16, token)
    assert (listed.state, listed.offering) == (ProviderState.RUNNING, SPOT[0])
    script = instance.user_data.decode()
    assert "never to be seen" not in script
    assert "CORRAL_MACHINE_ID=imds" in script


def test_the_launch_template_requires_session_tokens_and_encrypts_the_disk(
    aws: AwsProvider, ec2: Ec2
) -> None:
    aws.launch(_spec(aws), _token())
    aws.launch(_spec(aws, "b2" * 16), _token())
    assert ec2.count("CreateLaunchTemplate") == 1
    asked = next(form for action, form in ec2.calls if action == "CreateLaunchTemplate")
    data = {k.removeprefix("LaunchTemplateData."): v for k, v in asked.items()}
    assert data["MetadataOptions.HttpTokens"] == "required"
    assert data["MetadataOptions.HttpPutResponseHopLimit"] == "1"
    assert data["MetadataOptions.InstanceMetadataTags"] == "enabled"
    assert data["BlockDeviceMapping.1.Ebs.Encrypted"] == "true"


def test_a_bought_machine_shares_weights_and_bounds_its_cache_as_the_deployment_is_set(
    ec2: Ec2, region: tuple[Ec2, Clients]
) -> None:
    told = {"CORRAL_MODEL_SHARE": "imds:7437", "CORRAL_MODEL_CACHE_GIB": "1.5"}
    aws = AwsProvider(aws_config(ec2, **told), region[1], "c0", sleep=lambda _: None)
    aws.launch(_spec(aws), _token())
    [instance] = ec2.instances()
    script = instance.user_data.decode()
    [exported] = [line for line in script.splitlines() if line.startswith("export ")]
    given = dict(word.split("=", 1) for word in shlex.split(exported)[1:])
    agent = AgentConfig.from_args([], {**given, "CORRAL_MACHINE_VAR": "/var/lib/corral"})
    assert (agent.model_share, agent.model_cache_bytes) == (("imds", 7437), 3 * 2**29)
    [kept] = [line for line in script.splitlines() if "/etc/corral/agent.env" in line and "printf" in line]
    assert {f"{name}={value}" for name, value in told.items()} <= set(shlex.split(kept)), (
        "and after a restart"
    )


def test_a_launch_template_that_somebody_deleted_is_made_again(aws: AwsProvider, ec2: Ec2) -> None:
    first = aws.launch(_spec(aws), _token())
    for template in ec2.client("ec2").describe_launch_templates()["LaunchTemplates"]:
        ec2.client("ec2").delete_launch_template(LaunchTemplateId=template["LaunchTemplateId"])
    second = aws.launch(_spec(aws, "b2" * 16), _token())
    assert {first.ref, second.ref} == set(ec2.alive())
    assert ec2.count("CreateLaunchTemplate") == 2


def test_a_zone_without_capacity_is_followed_by_the_next_in_the_same_call(aws: AwsProvider, ec2: Ec2) -> None:
    ec2.sell(SPOT[:2])
    bought = aws.launch(_spec(aws), _token())
    assert bought.offering == SPOT[2]
    assert [(r.offering, r.code) for r in bought.refusals] == [
        (name, "InsufficientInstanceCapacity") for name in SPOT[:2]
    ]
    assert len(ec2.instances()) == 1


def test_no_spot_anywhere_is_followed_by_on_demand(aws: AwsProvider, ec2: Ec2) -> None:
    ec2.sell(SPOT, code="MaxSpotInstanceCountExceeded")
    bought = aws.launch(_spec(aws), _token())
    assert bought.offering.startswith("on-demand/")
    assert {r.code for r in bought.refusals} == {"MaxSpotInstanceCountExceeded"}
    [instance] = ec2.instances()
    assert instance.lifecycle in ("", "normal", None)


def test_nothing_anywhere_says_which_offers_refused(aws: AwsProvider, ec2: Ec2) -> None:
    spec = _spec(aws)
    ec2.sell(o.name for o in spec.offerings)
    with pytest.raises(CapacityError) as caught:
        aws.launch(spec, _token())
    assert {r.offering for r in caught.value.refusals} == {o.name for o in spec.offerings}
    assert ec2.instances() == []


def test_capacity_refused_by_the_whole_call_is_not_asked_again_for_the_same_offers(
    aws: AwsProvider, ec2: Ec2
) -> None:
    ec2.faults.append(Fault("CreateFleet", code="InsufficientInstanceCapacity", status=500))
    bought = aws.launch(_spec(aws), _token())
    assert bought.offering.startswith("on-demand/")
    assert ec2.count("CreateFleet") == 2


@pytest.mark.parametrize("n_lost", [1, 2])
def test_a_lost_answer_is_asked_for_again_and_buys_one_machine(
    aws: AwsProvider, ec2: Ec2, n_lost: int
) -> None:
    ec2.faults.append(Fault("CreateFleet", times=n_lost, lose_reply=True))
    bought = aws.launch(_spec(aws), _token())
    assert [i.id for i in ec2.instances()] == [bought.ref]


def test_an_outcome_that_stays_unknown_is_said_to_be_and_the_next_call_finds_it(
    aws: AwsProvider, ec2: Ec2
) -> None:
    ec2.faults.append(Fault("CreateFleet", times=3, lose_reply=True))
    spec, token = _spec(aws), _token()
    with pytest.raises(OutcomeUnknownError):
        aws.launch(spec, token)
    bought = aws.launch(spec, token)
    assert [i.id for i in ec2.instances()] == [bought.ref]
    assert aws.describe()[0].client_token == token


def test_throttling_is_waited_out_a_bounded_number_of_times(ec2: Ec2, aws: AwsProvider) -> None:
    ec2.faults.append(Fault("CreateFleet", times=2, code="RequestLimitExceeded", status=503))
    assert aws.launch(_spec(aws), _token()).ref
    ec2.faults.append(Fault("CreateFleet", times=99, code="RequestLimitExceeded", status=503))
    n_before = ec2.count("CreateFleet")
    with pytest.raises(Exception, match="RequestLimitExceeded"):
        aws.launch(_spec(aws), _token())
    assert ec2.count("CreateFleet") - n_before == 3


@pytest.mark.parametrize(
    ("code", "remedy"),
    [("UnauthorizedOperation", "role's policy"), ("InvalidSubnetID.NotFound", "CORRAL_AWS_SUBNETS")],
)
def test_what_configuration_must_mend_says_how(aws: AwsProvider, ec2: Ec2, code: str, remedy: str) -> None:
    ec2.faults.append(Fault("CreateFleet", code=code))
    with pytest.raises(ProviderRefusedError, match=remedy):
        aws.launch(_spec(aws), _token())
    assert ec2.count("CreateFleet") == 1


def test_the_same_token_for_another_request_is_never_a_second_machine(aws: AwsProvider, ec2: Ec2) -> None:
    token = _token()
    aws.launch(_spec(aws), token)
    with pytest.raises(OutcomeUnknownError):
        aws.launch(_spec(aws, "b2" * 16), token)
    assert len(ec2.instances()) == 1


def test_ending_is_repeatable_and_other_cells_and_people_are_left_alone(aws: AwsProvider, ec2: Ec2) -> None:
    bought = aws.launch(_spec(aws), _token())
    ec2.client("ec2").run_instances(ImageId=ec2.ami, MinCount=1, MaxCount=1, InstanceType="t3.micro")
    assert [m.ref for m in aws.describe()] == [bought.ref]
    aws.terminate(bought.ref)
    aws.terminate(bought.ref)
    aws.terminate("i-0123456789abcdef0")
    assert aws.describe() == []
    assert len(ec2.alive()) == 1


def test_a_stopped_machine_comes_back_or_its_zone_says_no(aws: AwsProvider, ec2: Ec2) -> None:
    spec = _spec(aws, offerings=tuple(o for o in aws.offerings() if not o.is_spot))
    bought = aws.launch(spec, _token())
    aws.stop(bought.ref)
    assert [(m.ref, m.state) for m in aws.describe()] == [(bought.ref, ProviderState.STOPPED)]
    ec2.faults.append(Fault("StartInstances", code="InsufficientInstanceCapacity", status=500))
    with pytest.raises(CapacityError):
        aws.start(bought.ref)
    aws.start(bought.ref)
    assert [i.state for i in ec2.instances()] == ["running"]
    assert [m.state for m in aws.describe()] == [ProviderState.RUNNING]


def test_stops_and_starts_take_time_and_are_asked_for_again_where_ec2_refuses_meanwhile(
    aws: AwsProvider, ec2: Ec2
) -> None:
    """pending, running, stopping, stopped, pending, running: each is seen, and no order counts twice."""
    ec2.boot_s = ec2.stop_s = 0.15
    seen: list[str] = []

    def until(state: str) -> None:
        deadline_s = time.monotonic() + 10
        while ec2.instances()[0].state != state:
            assert time.monotonic() < deadline_s, seen
            time.sleep(0.005)

    def look() -> ProviderState:
        [machine], [instance] = aws.describe(), ec2.instances()
        seen.append(instance.state)
        return machine.state

    bought = aws.launch(_spec(aws, offerings=tuple(o for o in aws.offerings() if not o.is_spot)), _token())
    assert look() is ProviderState.RUNNING, "it exists; whether it is up, its agent says"
    with pytest.raises(ProviderError):
        aws.stop(bought.ref)
    until("running")
    aws.stop(bought.ref)
    assert look() is ProviderState.STOPPING
    with pytest.raises(ProviderError):
        aws.start(bought.ref)
    until("stopped")
    assert look() is ProviderState.STOPPED
    aws.stop(bought.ref)
    assert look() is ProviderState.STOPPED
    aws.start(bought.ref)
    aws.start(bought.ref)
    assert look() is ProviderState.RUNNING
    until("running")
    assert seen == ["pending", "stopping", "stopped", "stopped", "pending"]


def test_a_spot_machine_is_not_stopped(aws: AwsProvider, ec2: Ec2) -> None:
    bought = aws.launch(_spec(aws), _token())
    assert bought.offering.startswith("spot/")
    with pytest.raises(ProviderRefusedError, match="one-time spot"):
        aws.stop(bought.ref)
    assert ec2.count("StopInstances") == 0


def test_an_offer_in_a_zone_without_a_subnet_names_the_setting(aws: AwsProvider) -> None:
    offer = Offering(instance_type=TYPE, zone="us-east-1f", is_spot=True, price_nano_per_h=1)
    with pytest.raises(ProviderRefusedError, match=r"CORRAL_AWS_SUBNETS.*us-east-1f"):
        aws.launch(_spec(aws, offerings=(offer,)), _token())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CORRAL_AWS_REGION", "Frankfurt"),
        ("CORRAL_AWS_AMI", "ubuntu"),
        ("CORRAL_AWS_SUBNETS", "us-east-1a"),
        ("CORRAL_AWS_SUBNETS", ""),
        ("CORRAL_AWS_VOLUME_GIB", "5"),
        ("CORRAL_AWS_ON_DEMAND_USD", "g6.xlarge=free"),
        ("CORRAL_AWS_ON_DEMAND_USD", "g6.xlarge=-1"),
        ("CORRAL_MODEL_SHARE", "10.0.0.7:7437"),
        ("CORRAL_MODEL_SHARE", "imds:0"),
        ("CORRAL_MODEL_CACHE_GIB", "all"),
        ("CORRAL_MODEL_CACHE_GIB", "nan"),
        ("CORRAL_MODEL_CACHE_GIB", "201"),
    ],
)
def test_a_wrong_setting_is_named(ec2: Ec2, name: str, value: str) -> None:
    with pytest.raises(ProviderRefusedError, match=name):
        aws_config(ec2, **{name: value})


def test_what_an_account_really_pays_replaces_the_seed(ec2: Ec2) -> None:
    config = aws_config(ec2, CORRAL_AWS_ON_DEMAND_USD=f"{TYPE}=0.5")
    assert isinstance(config, AwsConfig)
    assert config.on_demand_nano_per_h[TYPE] == 500_000_000
