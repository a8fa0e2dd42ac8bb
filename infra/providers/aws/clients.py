"""boto3 clients with every wait bounded: one that never repeats by itself, for buying, and one that may, for reading.

botocore's own retries would count a refusal of capacity as a server's fault and ask the same zone four times; buying is
repeated by us, with our own client token. Loaded only where the provider is `aws`: importing boto3 takes a moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import boto3
from botocore.config import Config

CONNECT_S, READ_S = 3.0, 20.0


@dataclass(frozen=True, slots=True)
class Clients:
    """Of one region. boto3's clients are safe to share between threads."""

    buy: Any  # ec2, one attempt
    read: Any  # ec2, three attempts
    sqs: Any
    sts: Any
    quotas: Any


def connect(region: str, *, endpoint_url: str | None = None) -> Clients:
    """Connects to nothing yet. `endpoint_url`: another address for all of them (AWS_ENDPOINT_URL does the same)."""
    session = boto3.session.Session()

    def client(service: str, attempts: int) -> Any:
        return session.client(
            service,
            region_name=region,
            endpoint_url=endpoint_url,
            config=Config(
                connect_timeout=CONNECT_S,
                read_timeout=READ_S,
                retries={"total_max_attempts": attempts, "mode": "standard"},
                user_agent_extra="corral",
                max_pool_connections=8,
            ),
        )

    return Clients(
        buy=client("ec2", 1),
        read=client("ec2", 3),
        sqs=client("sqs", 2),
        sts=client("sts", 2),
        quotas=client("service-quotas", 2),
    )
