"""Whether an AWS account can do what Corral will ask of it: one finding per question, each with its remedy.

Buys nothing: rights to buy are asked with DryRun. Called by `manage.py doctor aws`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Final

from botocore.exceptions import BotoCoreError, ClientError
from cryptography import x509

from infra.providers.aws import matrix
from infra.providers.aws.catalogue import SEED, Catalogue, seed_nano_per_h
from infra.providers.aws.clients import Clients
from infra.providers.aws.config import AwsConfig
from infra.providers.aws.failures import code_of
from infra.providers.base import Offering

# Quotas of running instances, in vCPU: (spot, on-demand) by the letter a type begins with.
_QUOTAS: Final = {
    "g": ("L-3819A6DF", "L-DB2E81BA"),
    "p": ("L-7212CCBC", "L-417A185B"),
    "i": ("L-B5D1601B", "L-1945791B"),
    "t": ("L-2C3B7624", "L-2C3B7624"),
}
_OTHER: Final = ("L-34B43A08", "L-1216C47A")  # the standard families


class Verdict(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """`subject`: what was asked; `found`: what came out; `remedy`: what to do, empty where nothing need be done."""

    subject: str
    verdict: Verdict
    found: str
    remedy: str = ""


def examine(
    config: AwsConfig,
    clients: Clients,
    *,
    max_machines: int,
    holds: Callable[[Offering], int] = lambda offer: 1,
) -> Iterator[Finding]:
    """Findings as they come, from what everything rests on to what only matters later. `holds`: replicas that a machine
    of that kind holds."""
    who = _ask(lambda: clients.sts.get_caller_identity())
    if isinstance(who, str):
        yield Finding(
            "credentials",
            Verdict.FAILED,
            who,
            "give this machine a role, or set AWS_PROFILE, and check the clock",
        )
        return
    yield Finding("credentials", Verdict.OK, f"{who['Arn']}")
    yield from _image(config, clients)
    zones = yield from _network(config, clients)
    offers = yield from _market(config, clients, holds)
    yield from _rights(config, clients, zones)
    yield from _quotas(config, clients, max_machines)
    yield from _queue(config, clients)
    yield _certificate(config)
    yield from _cost([o for o in offers if holds(o)], max_machines)


def _image(config: AwsConfig, clients: Clients) -> Iterator[Finding]:
    answer = _ask(lambda: clients.read.describe_images(ImageIds=[config.ami]))
    if isinstance(answer, str) or not answer["Images"]:
        found = answer if isinstance(answer, str) else "there is no such image here"
        yield Finding(
            f"image {config.ami}", Verdict.FAILED, found, f"set CORRAL_AWS_AMI to an image in {config.region}"
        )
        return
    image = answer["Images"][0]
    architecture, state = image.get("Architecture", "x86_64"), image.get("State", "available")
    good = state == "available" and architecture == "x86_64"
    yield Finding(
        f"image {config.ami}",
        Verdict.OK if good else Verdict.FAILED,
        f"{image.get('Name', '')} {architecture} {state}".strip(),
        "" if good else "take an x86_64 image that is available",
    )
    yield _matrix({tag["Key"]: tag["Value"] for tag in image.get("Tags", [])})


def _matrix(tags: Mapping[str, str]) -> Finding:
    """Driver and CUDA of an image, as its builder tagged it."""
    subject = "driver × CUDA × engine"
    fit = matrix.judge(tags)
    if fit is None:
        return Finding(
            subject,
            Verdict.UNKNOWN,
            "the image says nothing about its driver",
            "tag the image corral:driver=580.82, corral:cuda=13.0 and corral:vllm=0.32.0 when it is built",
        )
    if not fit.remedy:
        return Finding(subject, Verdict.OK, fit.found)
    return Finding(subject, Verdict.FAILED if fit.is_wrong else Verdict.WARNING, fit.found, fit.remedy)


def _network(config: AwsConfig, clients: Clients) -> Any:
    """Findings; returns the zones whose subnet is as stated."""
    good: list[str] = []
    vpcs: set[str] = set()
    for zone, subnet in sorted(config.subnets.items()):
        answer = _ask(partial(clients.read.describe_subnets, SubnetIds=[subnet]))
        subject = f"subnet {subnet}"
        if isinstance(answer, str):
            yield Finding(subject, Verdict.FAILED, answer, f"set CORRAL_AWS_SUBNETS to a subnet of {zone}")
            continue
        row = answer["Subnets"][0]
        vpcs.add(row["VpcId"])
        if row["AvailabilityZone"] != zone:
            yield Finding(
                subject,
                Verdict.FAILED,
                f"lies in {row['AvailabilityZone']}, not {zone}",
                f"write {row['AvailabilityZone']}={subnet} into CORRAL_AWS_SUBNETS",
            )
            continue
        good.append(zone)
        free = row["AvailableIpAddressCount"]
        yield Finding(
            subject,
            Verdict.OK if free >= 16 else Verdict.WARNING,
            f"{zone}, {free} free addresses",
            "" if free >= 16 else "take a larger subnet: each machine needs an address",
        )
    answer = _ask(lambda: clients.read.describe_security_groups(GroupIds=list(config.security_groups)))
    subject = f"security groups {', '.join(config.security_groups)}"
    if isinstance(answer, str):
        yield Finding(
            subject, Verdict.FAILED, answer, "set CORRAL_AWS_SECURITY_GROUPS to groups of the subnets' VPC"
        )
        return good
    others = {g["VpcId"] for g in answer["SecurityGroups"]} - vpcs
    open_to_all = [
        g["GroupId"]
        for g in answer["SecurityGroups"]
        if any(
            r.get("CidrIp") == "0.0.0.0/0" for p in g.get("IpPermissions", []) for r in p.get("IpRanges", [])
        )
    ]
    if others:
        yield Finding(
            subject, Verdict.FAILED, "in another VPC than the subnets", "take groups of the subnets' VPC"
        )
    elif open_to_all:
        yield Finding(
            subject,
            Verdict.WARNING,
            f"{', '.join(open_to_all)} lets the whole internet in",
            "machines open connections themselves: no inbound rule is needed",
        )
    else:
        yield Finding(subject, Verdict.OK, "of the subnets' VPC, closed to the internet")
    return good


def _market(config: AwsConfig, clients: Clients, holds: Callable[[Offering], int]) -> Any:
    """Findings; returns what is sold."""
    catalogue = Catalogue(config, clients.read)
    offers = _ask(catalogue.offerings)
    if isinstance(offers, str):
        yield Finding(
            "offers", Verdict.FAILED, offers, "allow ec2:Describe… in the role's policy; check the types"
        )
        return []
    for instance_type in config.instance_types:
        mine = [o for o in offers if o.instance_type == instance_type]
        spot = sorted((o for o in mine if o.is_spot), key=lambda o: o.price_nano_per_h)
        fixed = [o for o in mine if not o.is_spot]
        subject = f"type {instance_type}"
        if not catalogue.zones_of(instance_type):
            remedy = "add a subnet of a zone that sells it, or take another type"
            yield Finding(subject, Verdict.FAILED, "not sold in any of the zones", remedy)
            continue
        shown = (
            [f"spot from {_usd(spot[0])} in {spot[0].zone} ({len(spot)} zones)"]
            if spot
            else ["no spot price"]
        )
        shown += [f"on-demand {_usd(fixed[0])}"] if fixed else ["no on-demand price"]
        gpu = f"{mine[0].n_gpus} × {mine[0].gpu or 'unknown GPU'}" if mine and mine[0].n_gpus else "no GPU"
        if mine and not (n := holds(mine[0])):
            remedy = "set CORRAL_ACCELERATOR to what every type has at least, or take the type out"
            yield Finding(subject, Verdict.WARNING, f"{gpu}: holds no replica and is never bought", remedy)
            continue
        if mine and n > 1:
            gpu += f" for {n} replicas"
        remedy = (
            "" if fixed else f"set CORRAL_AWS_ON_DEMAND_USD={instance_type}=… so that it may serve as cover"
        )
        yield Finding(subject, Verdict.OK if fixed else Verdict.WARNING, f"{gpu}, {', '.join(shown)}", remedy)
    seeded = [
        t for t in config.instance_types if t not in config.on_demand_nano_per_h and t in seed_nano_per_h()
    ]
    if seeded:
        dated = SEED.stem.removeprefix("on_demand_")
        remedy = (
            "" if config.region == "us-east-1" else "set CORRAL_AWS_ON_DEMAND_USD to what this region costs"
        )
        verdict = Verdict.OK if config.region == "us-east-1" else Verdict.WARNING
        yield Finding("on-demand prices", verdict, f"from the seed {dated} for {', '.join(seeded)}", remedy)
    return offers


def _rights(config: AwsConfig, clients: Clients, zones: list[str]) -> Iterator[Finding]:
    """Each action is asked with DryRun: AWS says whether it would be allowed, and does nothing."""
    some = "i-00000000000000000"
    calls: dict[str, Callable[[], Any]] = {
        "ec2:RunInstances": lambda: clients.read.run_instances(
            DryRun=True,
            MinCount=1,
            MaxCount=1,
            ImageId=config.ami,
            InstanceType=config.instance_types[0],
            **({"SubnetId": config.subnets[zones[0]]} if zones else {}),
        ),
        "ec2:CreateLaunchTemplate": lambda: clients.read.create_launch_template(
            DryRun=True, LaunchTemplateName="corral-doctor", LaunchTemplateData={"ImageId": config.ami}
        ),
        "ec2:TerminateInstances": lambda: clients.read.terminate_instances(DryRun=True, InstanceIds=[some]),
        "ec2:StopInstances": lambda: clients.read.stop_instances(DryRun=True, InstanceIds=[some]),
        "ec2:StartInstances": lambda: clients.read.start_instances(DryRun=True, InstanceIds=[some]),
        "ec2:DescribeInstances": lambda: clients.read.describe_instances(DryRun=True),
        "ec2:DescribeSpotPriceHistory": lambda: clients.read.describe_spot_price_history(
            DryRun=True, MaxResults=1
        ),
    }
    for action, call in calls.items():
        try:
            call()
            yield Finding(action, Verdict.OK, "allowed")
        except ClientError as error:
            code = code_of(error)
            if code in ("DryRunOperation", "InvalidInstanceID.NotFound", "InvalidInstanceID.Malformed"):
                yield Finding(action, Verdict.OK, "allowed")
            elif code == "UnauthorizedOperation":
                yield Finding(action, Verdict.FAILED, "not allowed", f"add {action} to the role's policy")
            else:
                yield Finding(action, Verdict.UNKNOWN, code, "")
        except BotoCoreError as error:
            yield Finding(action, Verdict.UNKNOWN, type(error).__name__, "")


def _quotas(config: AwsConfig, clients: Clients, max_machines: int) -> Iterator[Finding]:
    answer = _ask(lambda: clients.read.describe_instance_types(InstanceTypes=list(config.instance_types)))
    if isinstance(answer, str):
        return
    cpus = {row["InstanceType"]: row["VCpuInfo"]["DefaultVCpus"] for row in answer["InstanceTypes"]}
    families: dict[str, int] = {}
    for name, n_cpus in cpus.items():
        families[name[0]] = max(families.get(name[0], 0), n_cpus)
    for family, n_cpus in sorted(families.items()):
        needed = n_cpus * max_machines
        for kind, code in zip(("spot", "on-demand"), _QUOTAS.get(family, _OTHER), strict=True):
            subject = f"quota {kind} {family.upper()} ({code})"
            quota = _ask(partial(clients.quotas.get_service_quota, ServiceCode="ec2", QuotaCode=code))
            if isinstance(quota, str):
                yield Finding(
                    subject,
                    Verdict.UNKNOWN,
                    quota,
                    "allow servicequotas:GetServiceQuota, or look in the console",
                )
                continue
            have = quota["Quota"]["Value"]
            enough = have >= needed
            remedy = f"ask AWS for {needed}: {max_machines} machines of {n_cpus} vCPU may run"
            verdict = Verdict.OK if enough else Verdict.WARNING
            yield Finding(
                subject, verdict, f"{have:.0f} vCPU, {needed} may be needed", "" if enough else remedy
            )


def _queue(config: AwsConfig, clients: Clients) -> Iterator[Finding]:
    if not config.queue_url:
        yield Finding(
            "central spot notices",
            Verdict.WARNING,
            "no queue: only a machine's own agent hears that it will be taken away",
            "lead EventBridge's EC2 spot events to an SQS queue and set CORRAL_AWS_QUEUE_URL",
        )
        return
    answer = _ask(
        lambda: clients.sqs.get_queue_attributes(
            QueueUrl=config.queue_url, AttributeNames=["ApproximateNumberOfMessages", "VisibilityTimeout"]
        )
    )
    if isinstance(answer, str):
        yield Finding(
            "central spot notices",
            Verdict.FAILED,
            answer,
            "allow sqs:ReceiveMessage, DeleteMessage; check the URL",
        )
        return
    waiting = int(answer["Attributes"]["ApproximateNumberOfMessages"])
    yield Finding(
        "central spot notices",
        Verdict.OK if waiting < 1000 else Verdict.WARNING,
        f"{waiting} messages wait",
        "" if waiting < 1000 else "more comes than is read: let the rule pass EC2 spot events only",
    )


def _certificate(config: AwsConfig) -> Finding:
    subject = "identity certificate"
    remedy = (
        "save AWS's RSA certificate for instance identity documents of this region (it is in the EC2 user guide) "
        "and set CORRAL_AWS_IDENTITY_CERTIFICATE to the file"
    )
    if not config.identity_certificate:
        return Finding(subject, Verdict.FAILED, "not set: no machine could enrol", remedy)
    try:
        read = x509.load_pem_x509_certificate(Path(config.identity_certificate).read_bytes())
    except (OSError, ValueError) as error:
        return Finding(
            subject, Verdict.FAILED, f"{type(error).__name__}: {config.identity_certificate}", remedy
        )
    return Finding(subject, Verdict.OK, f"valid until {read.not_valid_after_utc:%Y-%m-%d}")


def _cost(offers: list[Offering], max_machines: int) -> Iterator[Finding]:
    if not offers:
        return
    cheapest, dearest = (pick(offers, key=lambda o: o.price_nano_per_h) for pick in (min, max))
    least, most = (o.price_nano_per_h / 1e9 * max_machines for o in (cheapest, dearest))
    yield Finding(
        "expected cost",
        Verdict.OK,
        f"{max_machines} machines: {least:.2f} $/h ({cheapest.name}) to {most:.2f} $/h ({dearest.name})",
    )


def _usd(offer: Offering) -> str:
    return f"{offer.price_nano_per_h / 1e9:.4f} $/h"


def _ask(call: Callable[[], Any]) -> Any:
    """The answer, or what went wrong as text."""
    try:
        return call()
    except ClientError as error:
        return f"{code_of(error)}: {error.response.get('Error', {}).get('Message', '')}"[:200]
    except BotoCoreError as error:
        return f"{type(error).__name__}: {error}"[:200]
