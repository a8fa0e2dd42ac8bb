"""Puts the autoscaler together from the settings: configuration, provider, cell. One per process."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from django.conf import settings

from autoscaler.cell import Cell
from autoscaler.config import AutoscalerConfig, ConfigError
from autoscaler.external import external_house
from autoscaler.identity import Expected
from autoscaler.tick import House
from infra.providers.aws.config import AwsConfig
from infra.providers.base import Provider
from infra.providers.local import LocalProvider
from workers.keys import CellKeys


@lru_cache(maxsize=1)
def build_house() -> House:
    """Connects to nothing yet. Raises ConfigError for a provider we do not have."""
    config: AutoscalerConfig = settings.AUTOSCALER
    return House(config=config, provider=_provider(config), cell=build_cell())


@lru_cache(maxsize=1)
def build_external_house() -> House:
    """The same with the machine that calls endpoints elsewhere."""
    return external_house(build_house())


@lru_cache(maxsize=1)
def build_cell() -> Cell:
    """The cell of this control plane."""
    return Cell(settings.ENV.redis_url, CellKeys(settings.ENV.cell))


@lru_cache(maxsize=1)
def expected_identity() -> Expected | None:
    """What machines must show to enrol, where their provider signs who they are; None where a proof is given them."""
    if settings.AUTOSCALER.provider != "aws":
        return None
    aws = AwsConfig.read(os.environ)
    if not aws.identity_certificate:
        raise ConfigError(
            "CORRAL_AWS_IDENTITY_CERTIFICATE: set the path of AWS's RSA certificate for identity documents in "
            f"{aws.region}"
        )
    return Expected(Path(aws.identity_certificate), aws.region, aws.ami)


def _provider(config: AutoscalerConfig) -> Provider:
    if config.provider == "local":
        return LocalProvider(settings.ENV.var / "machines", capacity=config.max_machines)
    if config.provider == "aws":
        from infra.providers.aws.clients import connect  # boto3 takes a moment to load
        from infra.providers.aws.provider import AwsProvider

        aws = AwsConfig.read(os.environ)
        return AwsProvider(aws, connect(aws.region), settings.ENV.cell)
    raise ConfigError(f"CORRAL_PROVIDER={config.provider!r}: choose `local` or `aws`")
