"""EC2 as a Provider: launch by CreateFleet with our own client tokens, find by tags, end by id.

One call buys one machine: the spot offers of its plan as one fleet, then the on-demand ones, so that a zone without
machines costs no tick. Fleets are `instant`: they are a call, not a thing that lives on. Everything a machine is known
by (cell, machine id, client token) is a tag set by the very call that makes it. Blocks; called in the control worker.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

from botocore.exceptions import BotoCoreError, ClientError

from infra.providers.aws import catalogue, matrix
from infra.providers.aws.clients import Clients
from infra.providers.aws.config import AwsConfig
from infra.providers.aws.failures import Kind, as_provider_error, code_of, kind_of
from infra.providers.aws.notices import forget, receive
from infra.providers.aws.userdata import user_data
from infra.providers.base import (
    CapacityError,
    CentralNotice,
    LaunchSpec,
    Offering,
    OutcomeUnknownError,
    ProviderError,
    ProviderMachine,
    ProviderRefusedError,
    ProviderState,
    Refusal,
)

ATTEMPTS: Final = 3  # of a call whose outcome is not known, with the same client token
ATTEMPT_PAUSE_S: Final = 0.5
MAX_MACHINES: Final = 10_000
_NO_TEMPLATE: Final = "InvalidLaunchTemplateName.NotFoundException"
_STATES: Final = {
    "shutting-down": ProviderState.GONE,
    "terminated": ProviderState.GONE,
    "stopping": ProviderState.STOPPING,
    "stopped": ProviderState.STOPPED,
}
_ALIVE: Final = ("pending", "running", "stopping", "stopped", "shutting-down")


class AwsProvider:
    """Provider over one account and region. Several processes may use it at once: AWS keeps the tokens."""

    name = "aws"
    stops = True
    lists_after_s = 60.0  # DescribeInstances may trail a launch

    def __init__(
        self, config: AwsConfig, clients: Clients, cell: str, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._config, self._clients, self._cell, self._sleep = config, clients, cell, sleep
        self._templates: set[str] = set()
        self._catalogue = catalogue.Catalogue(config, clients.read)

    # -- Provider

    def launch(self, spec: LaunchSpec, client_token: str) -> ProviderMachine:
        """See Provider. Raises CapacityError with every offering that refused, OutcomeUnknownError when AWS does not
        answer, ProviderRefusedError for what configuration must mend.
        """
        if not spec.offerings:
            raise ProviderRefusedError(
                "aws: no offering given: see `manage.py doctor aws` for what is sold here"
            )
        known = len(self._templates)
        template = self._template(spec)
        try:
            return self._launch(template, spec, client_token)
        except ProviderRefusedError as error:
            if _NO_TEMPLATE not in str(error) or len(self._templates) != known:
                raise
            self._templates.discard(template)  # somebody deleted it; nothing was bought
            return self._launch(self._template(spec), spec, client_token)

    def _launch(self, template: str, spec: LaunchSpec, client_token: str) -> ProviderMachine:
        refusals: list[Refusal] = []
        for is_spot in (True, False):
            offers = [o for o in spec.offerings if o.is_spot is is_spot]
            if not offers:
                continue
            found = self._buy(template, offers, spec, client_token, refusals)
            if found is not None:
                return found
        raise CapacityError(
            f"no machine to be had: {', '.join(f'{r.offering} ({r.code})' for r in refusals[:6])}",
            tuple(refusals),
        )

    def restart_agent(self, ref: str) -> bool:
        """A machine's own init starts its agent again; where that fails, only a new machine helps."""
        return False

    def terminate(self, ref: str) -> None:
        self._end([ref])

    def leaving(self, ref: str, in_s: float) -> None:
        """Nothing: its successor is a computer of its own."""

    def staying(self, ref: str) -> None:
        """Nothing: `leaving` was nothing."""

    def describe(self) -> list[ProviderMachine]:
        """Instances with our cell's tag that are not terminated, oldest first."""
        filters = [
            {"Name": f"tag:{self._config.tag_prefix}:cell", "Values": [self._cell]},
            {"Name": "instance-state-name", "Values": list(_ALIVE)},
        ]
        found: list[ProviderMachine] = []
        try:
            pages = self._clients.read.get_paginator("describe_instances").paginate(
                Filters=filters, PaginationConfig={"MaxItems": MAX_MACHINES, "PageSize": 500}
            )
            for page in pages:
                for reservation in page["Reservations"]:
                    found += [self._machine(instance) for instance in reservation["Instances"]]
        except (ClientError, BotoCoreError) as error:
            raise as_provider_error(error, "listing machines") from None
        return sorted(found, key=lambda m: (m.started_at_s, m.ref))

    def offerings(self) -> list[Offering]:
        """What the configured types cost in the configured zones, spot and on-demand."""
        try:
            return self._catalogue.offerings()
        except (ClientError, BotoCoreError) as error:
            raise as_provider_error(error, "reading prices") from None

    def notices(self) -> Iterable[CentralNotice]:
        """Of the configured SQS queue; nothing without one."""
        return receive(self._clients.sqs, self._config.queue_url) if self._config.queue_url else ()

    def heeded(self, notice: CentralNotice) -> None:
        forget(self._clients.sqs, self._config.queue_url, notice.receipt)

    # -- the stop/start rung of the warm ladder

    def stop(self, ref: str) -> None:
        """An on-demand machine keeps its disk, with weights and credentials, and costs storage only. Spot machines of
        instant fleets are one-time requests: EC2 ends them, and stops none of them for us."""
        try:
            found = self._clients.read.describe_instances(InstanceIds=[ref])["Reservations"]
            if any(i.get("InstanceLifecycle") == "spot" for group in found for i in group["Instances"]):
                raise ProviderRefusedError(f"stopping {ref}: a one-time spot machine can only be ended")
            self._clients.read.stop_instances(InstanceIds=[ref])
        except (ClientError, BotoCoreError) as error:
            raise as_provider_error(error, f"stopping {ref}") from None

    def start(self, ref: str) -> None:
        """Start a stopped machine. CapacityError when its zone has no room for it now."""
        try:
            self._clients.buy.start_instances(InstanceIds=[ref])
        except ClientError as error:
            if kind_of(code_of(error)) in (Kind.CAPACITY, Kind.QUOTA):
                raise CapacityError(f"starting {ref}: {code_of(error)}") from None
            raise as_provider_error(error, f"starting {ref}") from None
        except BotoCoreError as error:
            raise as_provider_error(error, f"starting {ref}") from None

    # -- buying

    def _buy(
        self,
        template: str,
        offers: list[Offering],
        spec: LaunchSpec,
        client_token: str,
        refusals: list[Refusal],
    ) -> ProviderMachine | None:
        """One fleet of one machine; None when none of the offers has any, which is then in `refusals`."""
        lifecycle = "spot" if offers[0].is_spot else "on-demand"
        tags = self._tags(spec.machine_id, client_token)
        request = {
            "Type": "instant",
            # A part of the token per fleet: the two of one machine are different requests to AWS.
            "ClientToken": f"{client_token}-{lifecycle}",
            "LaunchTemplateConfigs": [
                {
                    "LaunchTemplateSpecification": {"LaunchTemplateName": template, "Version": "$Default"},
                    "Overrides": [
                        {"InstanceType": o.instance_type, "SubnetId": self._subnet(o), "Priority": float(n)}
                        for n, o in enumerate(offers)
                    ],
                }
            ],
            "TargetCapacitySpecification": {"TotalTargetCapacity": 1, "DefaultTargetCapacityType": lifecycle},
            "TagSpecifications": [{"ResourceType": kind, "Tags": tags} for kind in ("instance", "fleet")],
        }
        if lifecycle == "spot":
            request["SpotOptions"] = {
                "AllocationStrategy": "capacity-optimized-prioritized",
                "InstanceInterruptionBehavior": "terminate",
            }
        else:
            request["OnDemandOptions"] = {"AllocationStrategy": "prioritized"}
        try:
            answer = self._asked(lambda: self._clients.buy.create_fleet(**request), "buying a machine")
        except ClientError as error:
            code = code_of(error)
            refusals += [Refusal(o.name, code) for o in offers]
            return None
        refusals += self._refusals(answer.get("Errors", []), offers)
        for group in answer.get("Instances", []):
            for ref in group["InstanceIds"]:
                offering = self._offering(group, offers)
                return ProviderMachine(
                    ref=ref,
                    machine_id=spec.machine_id,
                    client_token=client_token,
                    state=ProviderState.RUNNING,
                    started_at_s=time.time(),
                    offering=offering.name,
                    refusals=tuple(r for r in refusals if r.offering != offering.name),
                )
        known = {r.offering for r in refusals}
        refusals += [Refusal(o.name, "InsufficientInstanceCapacity") for o in offers if o.name not in known]
        return None

    def _asked(self, call: Callable[[], Any], what: str) -> Any:
        """The answer; ClientError for capacity and quota, ProviderError for the rest.

        What may have happened, and what came too often, is asked again with the same token, a bounded number of times.
        """
        for attempt in range(ATTEMPTS):
            try:
                return call()
            except (ClientError, BotoCoreError) as error:
                if isinstance(error, ClientError):
                    kind = kind_of(code_of(error))
                    if kind in (Kind.CAPACITY, Kind.QUOTA):
                        raise
                    if code_of(error) == "IdempotentParameterMismatch":
                        raise OutcomeUnknownError(f"{what}: the token was used for another request") from None
                else:
                    kind = Kind.UNKNOWN
                if kind is Kind.REFUSED or attempt == ATTEMPTS - 1:
                    raise as_provider_error(error, what) from None
            self._sleep(ATTEMPT_PAUSE_S * 2**attempt)
        raise AssertionError("unreachable")

    def _refusals(self, errors: Iterable[dict[str, Any]], offers: list[Offering]) -> list[Refusal]:
        found = []
        for error in errors:
            code = str(error.get("ErrorCode", ""))
            if kind_of(code) is Kind.REFUSED:
                raise ProviderRefusedError(
                    f"buying a machine: {code}: {str(error.get('ErrorMessage', ''))[:300]} (see `manage.py doctor aws`)"
                )
            found.append(Refusal(self._offering(error, offers).name, code))
        return found

    def _offering(self, group: dict[str, Any], offers: list[Offering]) -> Offering:
        """Which of the offers a part of an answer is about."""
        overrides = group.get("LaunchTemplateAndOverrides", {}).get("Overrides", {})
        instance_type = group.get("InstanceType") or overrides.get("InstanceType")
        for offer in offers:
            if offer.instance_type == instance_type and self._subnet(offer) == overrides.get("SubnetId"):
                return offer
        return next((o for o in offers if o.instance_type == instance_type), offers[0])

    def _subnet(self, offering: Offering) -> str:
        subnet = self._config.subnets.get(offering.zone)
        if subnet is None:
            raise ProviderRefusedError(
                f"CORRAL_AWS_SUBNETS: names no subnet of zone {offering.zone}: add one"
            )
        return subnet

    def _tags(self, machine_id: str, client_token: str) -> list[dict[str, str]]:
        prefix = self._config.tag_prefix
        return [
            {"Key": "Name", "Value": f"{prefix} {machine_id[:12]}"},
            {"Key": f"{prefix}:cell", "Value": self._cell},
            {"Key": f"{prefix}:machine", "Value": machine_id},
            {"Key": f"{prefix}:token", "Value": client_token},
        ]

    # -- the launch template

    def _template(self, spec: LaunchSpec) -> str:
        """Name of the template for these machines, made if it is not there; its name is the digest of its content."""
        data = self._template_data(spec)
        digest = hashlib.sha256(repr(sorted(data.items())).encode()).hexdigest()[:16]
        name = f"{self._config.tag_prefix}-{self._cell}-{digest}"
        if name in self._templates:
            return name
        self._check_image()
        try:
            self._clients.read.create_launch_template(
                LaunchTemplateName=name,
                ClientToken=digest,
                LaunchTemplateData=data,
                TagSpecifications=[
                    {
                        "ResourceType": "launch-template",
                        "Tags": [{"Key": f"{self._config.tag_prefix}:cell", "Value": self._cell}],
                    }
                ],
            )
        except ClientError as error:
            if code_of(error) != "InvalidLaunchTemplateName.AlreadyExistsException":
                raise as_provider_error(error, "making the launch template") from None
        except BotoCoreError as error:
            # Nothing was bought yet, and the same name is asked for again.
            raise ProviderError(f"making the launch template: {type(error).__name__}") from None
        self._templates.add(name)
        return name

    def _check_image(self) -> None:
        """An image whose own tags say that its engine cannot run is not launched. What cannot be asked is no reason."""
        try:
            images = self._clients.read.describe_images(ImageIds=[self._config.ami])["Images"]
        except (ClientError, BotoCoreError):
            return
        for image in images:
            tags = {tag["Key"]: tag["Value"] for tag in image.get("Tags", [])}
            fit = matrix.judge(tags, self._config.tag_prefix)
            if fit is not None and fit.is_wrong:
                raise ProviderRefusedError(f"image {self._config.ami}: {fit.found}: {fit.remedy}")

    def _template_data(self, spec: LaunchSpec) -> dict[str, Any]:
        config = self._config
        data: dict[str, Any] = {
            "ImageId": config.ami,
            "SecurityGroupIds": list(config.security_groups),
            "UserData": base64.b64encode(user_data(spec, config).encode()).decode(),
            # Metadata by session token only, never through a hop, with the tags that say who the machine is.
            "MetadataOptions": {
                "HttpTokens": "required",
                "HttpEndpoint": "enabled",
                "HttpPutResponseHopLimit": 1,
                "InstanceMetadataTags": "enabled",
            },
            "BlockDeviceMappings": [
                {
                    "DeviceName": "/dev/sda1",
                    "Ebs": {
                        "VolumeSize": config.volume_gib,
                        "VolumeType": "gp3",
                        "Encrypted": True,
                        "DeleteOnTermination": True,
                    },
                }
            ],
            "InstanceInitiatedShutdownBehavior": "terminate",
        }
        if config.instance_profile:
            data["IamInstanceProfile"] = {"Name": config.instance_profile}
        return data

    # -- reading and ending

    def _machine(self, instance: dict[str, Any]) -> ProviderMachine:
        tags = {tag["Key"]: tag["Value"] for tag in instance.get("Tags", [])}
        prefix = self._config.tag_prefix
        offering = Offering(
            instance_type=instance.get("InstanceType", ""),
            zone=instance.get("Placement", {}).get("AvailabilityZone", ""),
            is_spot=instance.get("InstanceLifecycle") == "spot",
            price_nano_per_h=0,
        )
        return ProviderMachine(
            ref=instance["InstanceId"],
            machine_id=tags.get(f"{prefix}:machine", ""),
            client_token=tags.get(f"{prefix}:token", ""),
            state=_STATES.get(instance["State"]["Name"], ProviderState.RUNNING),
            started_at_s=instance["LaunchTime"].timestamp(),
            offering=offering.name,
        )

    def _end(self, refs: list[str]) -> None:
        try:
            self._clients.read.terminate_instances(InstanceIds=refs)
        except ClientError as error:
            if code_of(error) != "InvalidInstanceID.NotFound":
                raise as_provider_error(error, f"ending {', '.join(refs)}") from None
        except BotoCoreError as error:
            raise as_provider_error(error, f"ending {', '.join(refs)}") from None
