"""Recorded rates of many clients as arrivals: days of multi-tenant traffic from windows of ten minutes.

A rate file has one row per client and window (rate, and the fitted distribution of the gaps between its requests); a
length file has quantiles of prompt and answer per client and six hours. Thinning is exact in the second moment: a
renewal process of which each request is kept with chance p has p times its rate, and gaps whose squared coefficient of
variation is p c^2 + 1 - p; they are drawn from a Gamma distribution with these moments, so a bursty client stays as
bursty as its thinned self would be. Clients without recorded lengths take those of another, chosen by the seed.
"""

from __future__ import annotations

import csv
import heapq
import math
import random
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from autoscaler.sim.workload import Arrival, WorkloadError, number_of, open_text

WINDOW_S: Final = 600.0
_COLUMNS: Final = ("client", "t_start_s", "rate_rps", "iat_cv")
_QUANTILES: Final = (
    ("p0", 0.0), ("p1", 0.01), ("p5", 0.05), ("p10", 0.1), ("p20", 0.2), ("p25", 0.25), ("p30", 0.3), ("p40", 0.4),
    ("p50", 0.5), ("p60", 0.6), ("p70", 0.7), ("p75", 0.75), ("p80", 0.8), ("p90", 0.9), ("p95", 0.95),
    ("p99", 0.99), ("p99.9", 0.999), ("p100", 1.0),
)  # fmt: skip


_PROMPT_FIELDS: Final = ("input_tokens", "text_tokens", "image_tokens")


@dataclass(frozen=True, slots=True)
class Rate:
    """One client's traffic in one window."""

    client: str
    start_s: float
    rps: float
    gap_cv: float


class Lengths:
    """Prompt and answer lengths by client and window, drawn from recorded quantiles."""

    def __init__(self, rows: dict[tuple[str, str], list[tuple[float, tuple[float, ...]]]]) -> None:
        self._rows = {key: sorted(windows) for key, windows in rows.items()}
        # A prompt is what it has of these: of a multimodal service text and images are recorded apart.
        self._prompts = {
            client: [field for field in _PROMPT_FIELDS if (client, field) in self._rows]
            for client, field in self._rows
            if field == "output_tokens"
        }
        self._clients = sorted(client for client, fields in self._prompts.items() if fields)

    def draw(self, client: str, at_s: float, chance: random.Random) -> tuple[int, int]:
        """(prompt, answer) tokens. The recording has the two lengths apart, so they are drawn apart."""
        if not self._prompts.get(client):
            if not self._clients:
                raise WorkloadError("no lengths are known: give a length file, or lengths for all")
            client = self._clients[hash_of(client) % len(self._clients)]
        return (
            sum(self._one(client, field, at_s, chance.random()) for field in self._prompts[client]),
            self._one(client, "output_tokens", at_s, chance.random()),
        )

    def _one(self, client: str, field: str, at_s: float, share: float) -> int:
        windows = self._rows[client, field]
        at = max(bisect_right(windows, (at_s, (math.inf,))) - 1, 0)
        values = windows[at][1]
        shares = [q for _, q in _QUANTILES]
        high = min(bisect_right(shares, share), len(shares) - 1)
        low = high - 1
        part = (share - shares[low]) / (shares[high] - shares[low])
        return max(1, round(values[low] + part * (values[high] - values[low])))


def hash_of(text: str) -> int:
    """A number that is the same in every process."""
    value = 2166136261
    for byte in text.encode():
        value = (value ^ byte) * 16777619 % 2**32
    return value


def read_rates(path: Path) -> list[Rate]:
    """Rows of a rate file by time; WorkloadError names line and column of what it cannot read."""
    rates = []
    for number, row in _rows(path, _COLUMNS):
        start_s, rps = (number_of(row, name, path, number) for name in ("t_start_s", "rate_rps"))
        gap_cv = number_of(row, "iat_cv", path, number) if row["iat_cv"] else 1.0
        rates.append(Rate(row["client"], start_s, rps, gap_cv))
    if not rates:
        raise WorkloadError(f"{path.name}: has no rows; one for each client and ten minutes is wanted")
    return sorted(rates, key=lambda r: (r.start_s, r.client))


def read_lengths(path: Path) -> Lengths:
    found: dict[tuple[str, str], list[tuple[float, tuple[float, ...]]]] = defaultdict(list)
    for number, row in _rows(path, ("client", "t_start_s", "field", *(name for name, _ in _QUANTILES))):
        values = tuple(number_of(row, name, path, number) for name, _ in _QUANTILES)
        start_s = number_of(row, "t_start_s", path, number)
        found[row["client"], row["field"]].append((start_s, values))
    known = {field for _, field in found}
    if "output_tokens" not in known or not known & {"input_tokens", "text_tokens"}:
        raise WorkloadError(
            f"{path.name}: needs rows with field output_tokens and input_tokens (or text_tokens, with image_tokens "
            f"beside them); has {', '.join(sorted(known)) or 'none'}"
        )
    return Lengths(found)


def arrivals(
    rates: list[Rate],
    lengths: Lengths,
    *,
    keep: float,
    seed: int,
    start_s: float = 0.0,
    until_s: float = math.inf,
) -> Iterator[Arrival]:
    """Arrivals in order, thinned to a share `keep`, instants from `start_s` on."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep = {keep}: must be above 0 and at most 1")
    by_window: dict[float, list[Rate]] = defaultdict(list)
    for rate in rates:
        if rate.start_s + WINDOW_S > start_s and rate.start_s < until_s:
            by_window[rate.start_s].append(rate)
    for window_s in sorted(by_window):
        streams = []
        for rate in by_window[window_s]:
            if rate.rps > 0:
                chance = random.Random(f"{seed}:{rate.client}:{window_s}")
                streams.append(_client(rate, lengths, keep, chance))
        for arrival in heapq.merge(*streams, key=lambda a: a.at_s):
            if start_s <= arrival.at_s < until_s:
                yield Arrival(arrival.at_s - start_s, arrival.n_prompt, arrival.n_output, arrival.tenant)


def _client(rate: Rate, lengths: Lengths, keep: float, chance: random.Random) -> Iterator[Arrival]:
    """One client's requests in one window: a stationary renewal process."""
    scv = keep * rate.gap_cv**2 + 1 - keep
    shape = 1 / max(scv, 1e-3)
    scale = 1 / (keep * rate.rps * shape)
    at_s = -chance.random() * chance.gammavariate(shape, scale)  # somewhere inside a gap
    while True:
        at_s += chance.gammavariate(shape, scale)
        if at_s >= WINDOW_S:
            return
        if at_s >= 0:
            n_prompt, n_output = lengths.draw(rate.client, rate.start_s, chance)
            yield Arrival(rate.start_s + at_s, n_prompt, n_output, rate.client)


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    with open_text(path) as lines:
        reader = csv.DictReader(lines)
        missing = [c for c in columns if c not in (reader.fieldnames or ())]
        if missing:
            raise WorkloadError(
                f"{path.name}: lacks the columns {', '.join(missing)}; has {', '.join(reader.fieldnames or ())[:200]}"
            )
        yield from enumerate(reader, start=2)
