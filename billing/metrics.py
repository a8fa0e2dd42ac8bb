"""Prometheus metrics of intake. Labels come from enums only."""

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

EVENTS: Final = Counter(
    "corral_intake_events_total",
    "Usage deliveries by what became of them: booked, repeated, or the reason of the refusal",
    ["outcome"],
)
UNVERIFIED: Final = Counter(
    "corral_intake_unverified_total", "Events booked although their admission record was gone"
)
CAPPED: Final = Counter(
    "corral_intake_capped_total", "Events that claimed more completion tokens than were held; booked as held"
)
FAILURES: Final = Counter(
    "corral_intake_failures_total", "Passes that ended early; nothing was lost, they are repeated", ["cause"]
)
LAG_S: Final = Gauge("corral_intake_lag_seconds", "Age of the oldest waiting delivery; 0 when none waits")
BOOK_S: Final = Histogram(
    "corral_intake_batch_seconds",
    "From reading a batch to its acknowledgement",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
