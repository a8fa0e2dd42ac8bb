"""Prometheus metrics of the machines we pay for. Served by the control worker (CORRAL_CONTROL_METRICS_PORT)."""

from typing import Final

from prometheus_client import Counter

ORPHANS: Final = Counter(
    "corral_orphan_machines_total", "Machines found at the provider that no row knew; ended"
)
ORPHAN_DOLLARS: Final = Counter(
    "corral_orphan_dollars_total", "What orphan machines had cost when they were found, US dollars"
)
