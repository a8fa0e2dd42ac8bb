"""Which kinds of replica serve a mix of request sizes most cheaply: buckets of sizes, throughput under a promise.

A cheap GPU is often the cheapest for small requests and unable to serve long ones in time; so the cheapest fleet mixes
kinds and sends each size where it costs least (Mélange, arXiv 2404.14527). Here are the parts: buckets, what a kind of
replica does of each within the promised times, and plans without a solver. The exact plan is autoscaler/gpumix.py's.
Pure.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from controlplane.policy.capacity import Mix, capacity
from controlplane.policy.perfmodel import StepModel

# Upper edges of buckets, in tokens; the last takes what is longer.
PROMPT_EDGES: Final = (32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
OUTPUT_EDGES: Final = (16, 64, 256, 512, 1024, 2048)
MAX_KINDS: Final = 10  # the greedy plan looks at every set of kinds
MAX_SEQS: Final = 256


@dataclass(frozen=True, slots=True)
class Kind:
    """A replica that can be bought: step times, tokens of KV, USD an hour; at most `n_most` of them."""

    name: str
    usd_per_h: float
    step: StepModel
    kv_tokens: int
    n_most: int = 10_000

    def __post_init__(self) -> None:
        if not (math.isfinite(self.usd_per_h) and self.usd_per_h > 0):
            raise ValueError(f"kind {self.name}: usd_per_h = {self.usd_per_h}: must be above 0")
        if self.n_most < 0:
            raise ValueError(f"kind {self.name}: n_most = {self.n_most}: must not be negative")


@dataclass(frozen=True, slots=True)
class Bucket:
    """Requests of like size (`key`: bucket_of): how many come each second, their means, and the longest."""

    key: tuple[int, int]
    requests_per_s: float
    n_prompt: float
    n_output: float
    n_prompt_most: int
    n_tokens_most: int


@dataclass(frozen=True, slots=True)
class Promise:
    """Times to be kept, in seconds: mean between tokens, and to the first token. Replicas are filled to `utilisation`,
    because requests do not come evenly; a prompt alone may use `prompt_share` of the time to the first token."""

    itl_s: float
    ttft_s: float
    utilisation: float = 0.8
    prompt_share: float = 0.5

    def __post_init__(self) -> None:
        for name, most in (
            ("itl_s", math.inf),
            ("ttft_s", math.inf),
            ("utilisation", 1.0),
            ("prompt_share", 1.0),
        ):
            value = getattr(self, name)
            if not 0 < value <= most:
                raise ValueError(
                    f"{name} = {value}: must be above 0"
                    + (f" and at most {most:g}" if most < math.inf else "")
                )


@dataclass(frozen=True, slots=True)
class Fleet:
    """Replicas by kind, and of each bucket the share that each kind serves. `bound_usd_per_h`: no fleet is cheaper
    (0: not shown)."""

    replicas: Mapping[str, int]
    shares: Sequence[Mapping[str, float]]
    usd_per_h: float
    bound_usd_per_h: float = 0.0
    reason: str = ""


def bucket_of(n_prompt: int, n_output: int) -> tuple[int, int]:
    """Which bucket a size falls into."""
    return bisect_left(PROMPT_EDGES, n_prompt), bisect_left(OUTPUT_EDGES, n_output)


def buckets(sizes: Iterable[tuple[int, int]], requests_per_s: float) -> list[Bucket]:
    """Of (prompt, output) lengths, which stand for all requests that come; shortest first. ValueError for none."""
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
    n = 0
    for n_prompt, n_output in sizes:
        groups.setdefault(bucket_of(n_prompt, n_output), []).append((max(n_prompt, 1), max(n_output, 1)))
        n += 1
    if not n or requests_per_s <= 0:
        raise ValueError(f"{n} sizes at {requests_per_s} requests/s: there must be some")
    return [
        Bucket(
            key,
            requests_per_s * len(group) / n,
            sum(p for p, _ in group) / len(group),
            sum(o for _, o in group) / len(group),
            max(p for p, _ in group),
            max(p + o for p, o in group),
        )
        for key, group in sorted(groups.items())
    ]


def load(kind: Kind, bucket: Bucket, promise: Promise) -> float:
    """Replicas of that kind that the bucket alone would keep filled to the utilisation; infinite where the promise
    cannot be kept: the prompt takes too long, the KV does not fit, or one request alone is too slow."""
    if bucket.n_tokens_most > kind.kv_tokens:
        return math.inf
    if kind.step.prefill_s(bucket.n_prompt_most) > promise.prompt_share * promise.ttft_s:
        return math.inf
    found = capacity(
        kind.step, kind.kv_tokens, Mix(bucket.n_prompt, bucket.n_output), promise.itl_s, MAX_SEQS
    )
    if found.itl_s > promise.itl_s:
        return math.inf
    return bucket.requests_per_s / (found.requests_per_s * promise.utilisation)


def loads(kinds: Sequence[Kind], wanted: Sequence[Bucket], promise: Promise) -> list[list[float]]:
    """`load` by bucket and kind."""
    return [[load(kind, bucket, promise) for kind in kinds] for bucket in wanted]


def single(kinds: Sequence[Kind], table: Sequence[Sequence[float]]) -> Fleet | None:
    """The cheapest fleet of one kind; None when no kind can serve every bucket."""
    plans = [plan for kind in kinds if (plan := _assigned(kinds, table, {kind.name})) is not None]
    return min(plans, key=_order, default=None)


def greedy(kinds: Sequence[Kind], table: Sequence[Sequence[float]]) -> Fleet | None:
    """Of every set of kinds, each bucket where it costs least, replicas rounded up: the cheapest of these. None when a
    bucket cannot be served. ValueError beyond MAX_KINDS kinds."""
    if len(kinds) > MAX_KINDS:
        raise ValueError(f"{len(kinds)} kinds: at most {MAX_KINDS}")
    names = [kind.name for kind in kinds]
    sets = (set(s) for n in range(1, len(names) + 1) for s in itertools.combinations(names, n))
    plans = [plan for chosen in sets if (plan := _assigned(kinds, table, chosen)) is not None]
    return min(plans, key=_order, default=None)


def describe(
    kinds: Sequence[Kind],
    table: Sequence[Sequence[float]],
    shares: Sequence[Mapping[str, float]],
    bound_usd_per_h: float = 0.0,
    reason: str = "",
) -> Fleet | None:
    """The fleet that these shares need; None when a kind has not so many replicas."""
    replicas: dict[str, int] = {}
    usd_per_h = 0.0
    for at, kind in enumerate(kinds):
        # A millionth of a replica is the solver's rounding, no load.
        needed = sum(
            row[at] * share.get(kind.name, 0.0)
            for row, share in zip(table, shares, strict=True)
            if share.get(kind.name)
        )
        n = math.ceil(needed - 1e-6)
        if n > kind.n_most:
            return None
        if n > 0:
            replicas[kind.name] = n
            usd_per_h += n * kind.usd_per_h
    return Fleet(replicas, shares, usd_per_h, bound_usd_per_h, reason)


def _assigned(kinds: Sequence[Kind], table: Sequence[Sequence[float]], chosen: set[str]) -> Fleet | None:
    """Each bucket wholly on that kind of the set on which it costs least."""
    shares: list[dict[str, float]] = []
    for row in table:
        costs = [
            (kind.usd_per_h * row[at], kind.name)
            for at, kind in enumerate(kinds)
            if kind.name in chosen and math.isfinite(row[at])
        ]
        if not costs:
            return None
        shares.append({min(costs)[1]: 1.0})
    return describe(
        kinds, table, shares, reason=f"each size where it costs least among {', '.join(sorted(chosen))}"
    )


def _order(plan: Fleet) -> tuple[float, str]:
    return plan.usd_per_h, " ".join(f"{name}={n}" for name, n in sorted(plan.replicas.items()))
