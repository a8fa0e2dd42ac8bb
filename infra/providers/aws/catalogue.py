"""What EC2 sells here: the configured types in the configured zones, with GPUs and prices of now.

Spot prices come from DescribeSpotPriceHistory; on-demand prices from the operator, or a dated seed (us-east-1) where
they said nothing: `manage.py doctor aws` shows which. A type without any price is not offered. Hardware and zones are
read once per process.
"""

from __future__ import annotations

import csv
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, Final

from infra.providers.aws.config import AwsConfig
from infra.providers.base import Offering

SEED: Final = Path(__file__).with_name("on_demand_us-east-1_2026-07-20.csv")
MAX_PRICES: Final = 20_000
# AWS's names for what controlplane/policy/gpus.py calls otherwise; what is missing has no name there.
_GPUS: Final = {
    ("T4", 16): "t4",
    ("V100", 16): "v100",
    ("A10G", 22): "a10g",
    ("A10G", 24): "a10g",
    ("L4", 22): "l4",
    ("L4", 24): "l4",
    ("L40S", 45): "l40s",
    ("L40S", 48): "l40s",
    ("A100", 40): "a100_40gb",
    ("A100", 80): "a100_sxm",
    ("H100", 80): "h100_sxm",
    ("H200", 141): "h200_sxm",
    ("B200", 179): "b200_sxm",
    ("B300", 269): "b300_sxm",
}


class Catalogue:
    """`offerings()` asks for prices; everything else is asked once."""

    def __init__(self, config: AwsConfig, ec2: Any) -> None:
        self._config, self._ec2 = config, ec2
        self._hardware: dict[str, tuple[str, int]] = {}
        self._zones: dict[str, frozenset[str]] = {}

    def offerings(self) -> list[Offering]:
        """Raises botocore's errors."""
        config = self._config
        self._learn()
        found = []
        spot = self._spot_prices()
        for instance_type in config.instance_types:
            gpu, n_gpus = self._hardware.get(instance_type, ("", 0))
            fixed = config.on_demand_nano_per_h.get(instance_type) or seed_nano_per_h().get(instance_type)
            for zone in sorted(config.subnets):
                if zone not in self._zones.get(instance_type, frozenset()):
                    continue
                prices = ((True, spot.get((instance_type, zone))), (False, fixed))
                found += [
                    Offering(
                        instance_type=instance_type,
                        zone=zone,
                        is_spot=is_spot,
                        price_nano_per_h=price,
                        gpu=gpu,
                        n_gpus=n_gpus,
                    )
                    for is_spot, price in prices
                    if price
                ]
        return found

    def zones_of(self, instance_type: str) -> frozenset[str]:
        """Configured zones in which AWS sells this type."""
        self._learn()
        return self._zones.get(instance_type, frozenset()) & self._config.subnets.keys()

    def _learn(self) -> None:
        if self._hardware:
            return
        types = list(self._config.instance_types)
        for page in self._ec2.get_paginator("describe_instance_type_offerings").paginate(
            LocationType="availability-zone", Filters=[{"Name": "instance-type", "Values": types}]
        ):
            for row in page["InstanceTypeOfferings"]:
                known = self._zones.get(row["InstanceType"], frozenset())
                self._zones[row["InstanceType"]] = known | {row["Location"]}
        answer = self._ec2.describe_instance_types(InstanceTypes=types)
        for row in answer["InstanceTypes"]:
            self._hardware[row["InstanceType"]] = _gpu_of(row)

    def _spot_prices(self) -> dict[tuple[str, str], int]:
        """Nano-dollars per hour by (type, zone): the newest of each."""
        now = datetime.now(UTC)
        newest: dict[tuple[str, str], tuple[datetime, int]] = {}
        pages = self._ec2.get_paginator("describe_spot_price_history").paginate(
            InstanceTypes=list(self._config.instance_types),
            ProductDescriptions=["Linux/UNIX"],
            StartTime=now - timedelta(hours=1),  # AWS answers the price in force then, too
            EndTime=now,
            PaginationConfig={"MaxItems": MAX_PRICES},
        )
        for page in pages:
            for row in page["SpotPriceHistory"]:
                key = (row["InstanceType"], row["AvailabilityZone"])
                at, price = row["Timestamp"], round(float(row["SpotPrice"]) * 1e9)
                if price > 0 and (key not in newest or at > newest[key][0]):
                    newest[key] = (at, price)
        return {key: price for key, (_, price) in newest.items()}


@cache
def seed_nano_per_h() -> dict[str, int]:
    """On-demand prices by type of the seed, nano-dollars per hour."""
    with SEED.open(encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(line for line in lines if not line.startswith("#"))
        return {row["instance_type"]: round(float(row["usd_per_hour"]) * 1e9) for row in rows}


def _gpu_of(row: dict[str, Any]) -> tuple[str, int]:
    gpus = row.get("GpuInfo", {}).get("Gpus", [])
    if not gpus:
        return "", 0
    gib = round(gpus[0].get("MemoryInfo", {}).get("SizeInMiB", 0) / 1024)
    return _GPUS.get((gpus[0].get("Name", ""), gib), ""), sum(g.get("Count", 1) for g in gpus)
