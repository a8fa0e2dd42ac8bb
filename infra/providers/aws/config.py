"""What the operator says about an AWS account, read once from CORRAL_AWS_… variables.

Credentials are boto3's business (role of the machine, profile, environment). Called by autoscaler/house.py and
`manage.py doctor aws`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from types import MappingProxyType
from typing import Final, Self

from infra.providers.base import ProviderRefusedError

# Where a machine image of ours keeps the product.
AGENT_COMMAND: Final = "/opt/corral/.venv/bin/python -m workers.agent"
_SHAPES: Final = {
    "region": re.compile(r"[a-z]{2}(-[a-z]+)+-\d"),
    "ami": re.compile(r"ami-[0-9a-f]{8,17}"),
    "instance_profile": re.compile(r"[\w+=,.@-]{1,128}"),
}


@dataclass(frozen=True, slots=True)
class AwsConfig:
    """One region, its zones by subnet, and the kinds of machines that may be bought there."""

    region: str
    subnets: Mapping[str, str]  # zone -> subnet id
    ami: str
    instance_types: tuple[str, ...]
    security_groups: tuple[str, ...]
    instance_profile: str = ""
    volume_gib: int = 200
    agent_command: str = AGENT_COMMAND
    # Nano-dollars per hour where the seed's price list is not what this account pays.
    on_demand_nano_per_h: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    queue_url: str = ""  # SQS queue that EventBridge writes spot notices to
    # File: AWS's public RSA certificate for instance identity documents in this region.
    identity_certificate: str = ""
    tag_prefix: str = "corral"
    # Of each machine's agent: where siblings fetch model versions (`imds:port`), what versions take of the disk.
    model_share: str = ""
    model_cache_gib: str = ""

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Self:
        """Raises ProviderRefusedError naming the variable and what it should look like."""

        def text(name: str, remedy: str, default: str | None = None) -> str:
            value = environ.get(f"CORRAL_AWS_{name}", "").strip()
            if not value and default is None:
                raise ProviderRefusedError(f"CORRAL_AWS_{name}: {remedy}")
            value = value or (default or "")
            shape = _SHAPES.get(name.lower())
            if value and shape is not None and shape.fullmatch(value) is None:
                raise ProviderRefusedError(f"CORRAL_AWS_{name}={value!r}: {remedy}")
            return value

        def pairs(name: str, remedy: str, default: str | None = None) -> dict[str, str]:
            found = {}
            for item in filter(None, (part.strip() for part in text(name, remedy, default).split(","))):
                key, separator, value = item.partition("=")
                if not separator or not key or not value:
                    raise ProviderRefusedError(f"CORRAL_AWS_{name}: {item!r}: {remedy}")
                found[key.strip()] = value.strip()
            return found

        def listed(name: str, remedy: str) -> tuple[str, ...]:
            return tuple(filter(None, (part.strip() for part in text(name, remedy).split(","))))

        volume = text("VOLUME_GIB", "whole GiB from 20 to 16000", "200")
        if not volume.isdigit() or not 20 <= int(volume) <= 16_000:
            raise ProviderRefusedError(f"CORRAL_AWS_VOLUME_GIB={volume!r}: set whole GiB from 20 to 16000")
        price_remedy = "set instance type=dollars per hour, separated by commas, e.g. g6.xlarge=0.8048"
        return cls(
            region=text("REGION", "set the region, e.g. us-east-1"),
            subnets=MappingProxyType(
                pairs("SUBNETS", "set zone=subnet, separated by commas, e.g. us-east-1a=subnet-0abc")
            ),
            ami=text("AMI", "set the id of a machine image with Corral on it, e.g. ami-0123456789abcdef0"),
            instance_types=listed("INSTANCE_TYPES", "set the types to buy, e.g. g6.xlarge,g5.xlarge"),
            security_groups=listed("SECURITY_GROUPS", "set the ids of the security groups, e.g. sg-0abc"),
            instance_profile=text("INSTANCE_PROFILE", "the name of an instance profile", ""),
            volume_gib=int(volume),
            agent_command=text("AGENT_COMMAND", "the command that starts the agent", AGENT_COMMAND),
            on_demand_nano_per_h=MappingProxyType(
                {
                    name: _nano(usd, price_remedy)
                    for name, usd in pairs("ON_DEMAND_USD", price_remedy, "").items()
                }
            ),
            queue_url=text("QUEUE_URL", "the URL of an SQS queue", ""),
            identity_certificate=text("IDENTITY_CERTIFICATE", "the path of a PEM file", ""),
            model_share=_model_share(environ.get("CORRAL_MODEL_SHARE", "").strip()),
            model_cache_gib=_model_cache_gib(environ.get("CORRAL_MODEL_CACHE_GIB", "").strip(), int(volume)),
        )


def _model_share(text: str) -> str:
    """The same for every machine, so that only `imds` can name each one's own address."""
    host, _, port = text.rpartition(":")
    if text and (host != "imds" or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535):
        raise ProviderRefusedError(
            f"CORRAL_MODEL_SHARE={text!r}: set imds:port, e.g. imds:7437, with which each machine shares at its own "
            "private address"
        )
    return text


def _model_cache_gib(text: str, volume_gib: int) -> str:
    if text and not (re.fullmatch(r"\d{1,5}(\.\d{1,3})?", text) and 0 < float(text) <= volume_gib):
        raise ProviderRefusedError(
            f"CORRAL_MODEL_CACHE_GIB={text!r}: set GiB above 0 and at most the disk's {volume_gib} "
            "(CORRAL_AWS_VOLUME_GIB)"
        )
    return text


def _nano(usd: str, remedy: str) -> int:
    try:
        nano = Decimal(usd) * 10**9
    except InvalidOperation:
        raise ProviderRefusedError(f"CORRAL_AWS_ON_DEMAND_USD: {usd!r}: {remedy}") from None
    if not 0 < nano < 10**15:
        raise ProviderRefusedError(f"CORRAL_AWS_ON_DEMAND_USD: {usd!r}: {remedy}")
    return int(nano)
