"""Puts the autoscaler together from the settings: configuration, provider, cell. One per process."""

from __future__ import annotations

from functools import lru_cache

from django.conf import settings

from autoscaler.cell import Cell
from autoscaler.config import AutoscalerConfig, ConfigError
from autoscaler.tick import House
from infra.providers.base import Provider
from infra.providers.local import LocalProvider
from workers.keys import CellKeys


@lru_cache(maxsize=1)
def build_house() -> House:
    """Connects to nothing yet. Raises ConfigError for a provider we do not have."""
    config: AutoscalerConfig = settings.AUTOSCALER
    return House(config=config, provider=_provider(config), cell=build_cell())


@lru_cache(maxsize=1)
def build_cell() -> Cell:
    """The cell of this control plane."""
    return Cell(settings.ENV.redis_url, CellKeys(settings.ENV.cell))


def _provider(config: AutoscalerConfig) -> Provider:
    if config.provider == "local":
        return LocalProvider(settings.ENV.var / "machines", capacity=config.max_machines)
    raise ConfigError(f"CORRAL_PROVIDER={config.provider!r}: choose `local`")
