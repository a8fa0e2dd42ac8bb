"""Counters of one gateway process as plain integers, and the collector that shows them to Prometheus.

The hot path adds to integers and lists; everything that formats runs when /metrics is asked. Every series
carries the process's name, because processes that share a port answer a scrape in turn. Labels are enums and
codes, never tenants.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

_TTFT_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_ITL_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0)
_DURATION_S: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)


Figures = dict[str, tuple[str, Callable[[], float]]]  # name -> (help, read at scrape time)


class Histogram:
    """Counts per bucket and the sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus wants them."""
        names = [*(repr(bound) for bound in self.bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self.counts)), strict=True))


class GatewayMetrics:
    """What a gateway counts; a prometheus_client collector. `sources` are read at scrape time."""

    def __init__(self, gateway: str) -> None:
        self.gateway = gateway
        self.requests: Counter[tuple[str, int, str]] = Counter()  # endpoint, status, code
        self.n_prompt = self.n_cached = self.n_completion = 0
        self.n_disconnects = 0
        self.ttft_s = Histogram(_TTFT_S)
        self.itl_s = Histogram(_ITL_S)
        self.duration_s = Histogram(_DURATION_S)
        self.gauges: Figures = {}
        self.counters: Figures = {}

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "corral_gateway_requests",
            "Finished requests by endpoint, HTTP status and error code.",
            labels=("gateway", "endpoint", "status", "code"),
        )
        for (endpoint, status, code), n in self.requests.items():
            requests.add_metric((self.gateway, endpoint, str(status), code), n)
        yield requests
        tokens = CounterMetricFamily("corral_gateway_tokens", "Tokens by kind.", labels=("gateway", "kind"))
        for kind, n in (
            ("prompt", self.n_prompt),
            ("cached", self.n_cached),
            ("completion", self.n_completion),
        ):
            tokens.add_metric((self.gateway, kind), n)
        yield tokens
        for name, text, histogram in (
            ("corral_gateway_ttft_seconds", "Admission to the first token.", self.ttft_s),
            ("corral_gateway_itl_seconds", "Mean time between tokens of a request.", self.itl_s),
            ("corral_gateway_duration_seconds", "Admission to the end.", self.duration_s),
        ):
            family = HistogramMetricFamily(name, text, labels=("gateway",))
            family.add_metric((self.gateway,), histogram.buckets(), histogram.total)
            yield family
        disconnects: Figures = {
            "corral_gateway_disconnects": ("Clients that left.", lambda: self.n_disconnects)
        }
        for name, (text, read) in (disconnects | self.counters).items():
            counter = CounterMetricFamily(name, text, labels=("gateway",))
            counter.add_metric((self.gateway,), read())
            yield counter
        for name, (text, read) in self.gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=("gateway",))
            gauge.add_metric((self.gateway,), read())
            yield gauge
