"""Prometheus gauges of attainment. Labels are service classes, windows and severities: few, and never a tenant."""

from typing import Final

from prometheus_client import Gauge

_BY: Final = ["slo_class", "window"]
ATTAINMENT: Final = Gauge(
    "corral_slo_attainment_ratio", "Share of requests that kept their promise, all tenants", _BY
)
BURN_RATE: Final = Gauge(
    "corral_slo_burn_rate", "Share of misses over the share allowed, all tenants; 1 uses the budget up", _BY
)
WORST_BURN_RATE: Final = Gauge(
    "corral_slo_worst_burn_rate", "The same of the project where it is highest", _BY
)
BUDGET_LEFT: Final = Gauge(
    "corral_slo_budget_left_ratio",
    "Share of the error budget of the last three days that is left",
    ["slo_class"],
)
BURNING: Final = Gauge("corral_slo_burning", "Projects and classes that an alert is open for", ["severity"])
