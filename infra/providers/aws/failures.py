"""What AWS's error codes mean to us: no capacity here, asked too often, never as asked, or nobody knows.

One table, used for errors of a call and for those that CreateFleet lists beside a success.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Final

from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from infra.providers.base import OutcomeUnknownError, ProviderError, ProviderRefusedError


class Kind(Enum):
    """What to do about it."""

    CAPACITY = "capacity"  # another zone or type may have it
    QUOTA = "quota"  # of the account: nothing of this kind anywhere in the region
    THROTTLED = "throttled"
    REFUSED = "refused"  # a configuration or a right
    UNKNOWN = "unknown"  # it may have happened


_CAPACITY: Final = {
    "InsufficientInstanceCapacity",
    "InsufficientHostCapacity",
    "InsufficientReservedInstanceCapacity",
    "InsufficientCapacityOnHost",
    "InsufficientCapacity",
    "UnfulfillableCapacity",
    "Unsupported",  # this type is not sold in this zone
    "SpotMaxPriceTooLow",
    "InsufficientFreeAddressesInSubnet",
}
_QUOTA: Final = {
    "MaxSpotInstanceCountExceeded",
    "VcpuLimitExceeded",
    "InstanceLimitExceeded",
    "MaxFleetCountExceeded",
    "VolumeLimitExceeded",
    "PendingVerification",
}
_THROTTLED: Final = {"RequestLimitExceeded", "Throttling", "ThrottlingException", "EC2ThrottledException"}
_REMEDIES: Final = {
    "UnauthorizedOperation": "allow the action in the role's policy (`manage.py doctor aws` lists them)",
    "AuthFailure": "check the credentials, and the clock of this machine",
    "InvalidAMIID.NotFound": "set CORRAL_AWS_AMI to an image of this region",
    "InvalidSubnetID.NotFound": "set CORRAL_AWS_SUBNETS to subnets of this region",
    "InvalidGroup.NotFound": "set CORRAL_AWS_SECURITY_GROUPS to groups of the subnets' VPC",
    "InvalidInstanceType.NotFound": "set CORRAL_AWS_INSTANCE_TYPES to types that exist",
    "OptInRequired": "subscribe to the image in the AWS Marketplace",
}


def kind_of(code: str) -> Kind:
    """Of an error code in AWS's words."""
    if code in _CAPACITY:
        return Kind.CAPACITY
    if code in _QUOTA:
        return Kind.QUOTA
    if code in _THROTTLED:
        return Kind.THROTTLED
    if code in ("InternalError", "InternalFailure", "ServiceUnavailable", "Unavailable", "500", "503"):
        return Kind.UNKNOWN
    return Kind.REFUSED


def code_of(error: ClientError) -> str:
    found: Any = error.response.get("Error", {}).get("Code", "")
    return str(found)


def as_provider_error(error: Exception, what: str) -> ProviderError:
    """The error of a call that is not about capacity, in our words."""
    if isinstance(error, ClientError):
        code = code_of(error)
        message = error.response.get("Error", {}).get("Message", "")
        kind = kind_of(code)
        if kind is Kind.UNKNOWN:
            return OutcomeUnknownError(f"{what}: {code}")
        if kind is Kind.REFUSED:
            remedy = _REMEDIES.get(code) or _REMEDIES.get(code.split(".")[0]) or "see `manage.py doctor aws`"
            return ProviderRefusedError(f"{what}: {code}: {message[:300]} ({remedy})")
        return ProviderError(f"{what}: {code}: {message[:300]}")
    if isinstance(error, NoCredentialsError):
        return ProviderRefusedError(f"{what}: no credentials: give this machine a role, or set AWS_PROFILE")
    if isinstance(error, BotoCoreError):  # timeouts, refused connections, unreadable answers
        return OutcomeUnknownError(f"{what}: {type(error).__name__}")
    raise error
