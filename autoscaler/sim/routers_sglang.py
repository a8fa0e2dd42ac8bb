"""SGLang's cache-aware router as a baseline, for world.py: an approximate prefix tree and a balance guard.

Rules and names follow sgl-router's `policies/cache_aware.rs` and `tree.rs` (October 2025): while the requests of two
workers differ by more than `balance_abs_threshold` and by the factor `balance_rel_threshold`, the shortest queue; else
the worker with the longest match if that covers more than `cache_threshold` of the prompt, else the one with the
smallest tree. The tree here has one block per edge where theirs has a run of characters; which workers hold a prefix is
the same, and eviction stops at the exact size instead of at the edge's. Nothing tells it what the engines evicted.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final

from autoscaler.sim.job import Job
from autoscaler.sim.world import Replica


@dataclass(slots=True)
class _Node:
    parent: _Node | None
    edge: Hashable
    children: dict[Hashable, _Node] = field(default_factory=dict)
    used_at: dict[int, int] = field(default_factory=dict)  # by worker, in order of arrival


class PrefixTree:
    """Which worker was given which prefix. Sizes count elements (characters there, blocks here)."""

    def __init__(self) -> None:
        self._root = _Node(None, "")
        self.sizes: dict[int, int] = {}
        self._now = 0

    def insert(self, text: Sequence[Hashable], worker: int) -> None:
        self._now += 1
        self.sizes.setdefault(worker, 0)
        node = self._root
        node.used_at[worker] = self._now
        for element in text:
            child = node.children.get(element)
            if child is None:
                child = node.children[element] = _Node(node, element)
            if worker not in child.used_at:
                self.sizes[worker] += 1
            child.used_at[worker] = self._now
            node = child

    def match(self, text: Sequence[Hashable]) -> tuple[int, int | None]:
        """(elements matched by any worker, the worker that was the first to bring the deepest of them)."""
        node, n = self._root, 0
        for element in text:
            child = node.children.get(element)
            if child is None or not child.used_at:
                break
            node, n = child, n + 1
        worker = next(iter(node.used_at), None)
        if worker is not None:
            self._now += 1
            at: _Node | None = node
            while at is not None:
                at.used_at[worker] = self._now
                at = at.parent
        return n, worker

    def smallest(self) -> int | None:
        """The worker with the smallest tree, ties by id."""
        return min(self.sizes, key=lambda worker: (self.sizes[worker], worker), default=None)

    def evict(self, max_size: int) -> None:
        """Drop each worker's least recently used leaves down to `max_size` elements."""
        if all(size <= max_size for size in self.sizes.values()):
            return
        heap: list[tuple[int, int, int, _Node]] = []
        stack = [self._root]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            for worker in node.used_at:
                self._offer(heap, node, worker)
        while heap:
            _, _, worker, node = heapq.heappop(heap)
            if self.sizes[worker] <= max_size or node.parent is None:
                continue
            del node.used_at[worker]
            self.sizes[worker] -= 1
            if not node.used_at and not node.children:
                del node.parent.children[node.edge]
            self._offer(heap, node.parent, worker)

    def remove(self, worker: int) -> None:
        """The worker is gone."""
        stack = [self._root]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            node.used_at.pop(worker, None)
        self.sizes.pop(worker, None)

    @staticmethod
    def _offer(heap: list[tuple[int, int, int, _Node]], node: _Node, worker: int) -> None:
        """It can be dropped when no child is the worker's."""
        if worker in node.used_at and not any(worker in c.used_at for c in node.children.values()):
            heapq.heappush(heap, (node.used_at[worker], id(node), worker, node))


MAX_TREE_TOKENS: Final = 2**26 // 4  # the router's default in characters, four of which are about a token
BLOCK: Final = 512


@dataclass(frozen=True, slots=True)
class SglangKnobs:
    """Defaults of `launch_router`. `miss_by_load`: where nothing matches, the shortest queue (the rule of the later
    model gateway) instead of the smallest tree."""

    cache_threshold: float = 0.3
    balance_abs_threshold: int = 64
    balance_rel_threshold: float = 1.5
    eviction_interval_s: float = 120.0
    max_tree_tokens: int = MAX_TREE_TOKENS
    miss_by_load: bool = False


class Sglang:
    """The router on a simulated deployment; load is the requests bound to a replica."""

    def __init__(self, knobs: SglangKnobs | None = None) -> None:
        self.knobs = knobs or SglangKnobs()
        self.tree = PrefixTree()
        self._evicted_s = 0.0

    def rank(self, job: Job, replicas: list[Replica], now_s: float) -> list[Replica]:
        if not replicas:
            return []
        knobs, tree = self.knobs, self.tree
        self._keep_up(replicas, now_s)
        loads = [replica.used for replica in replicas]
        most, least = max(loads), min(loads)
        if most - least > knobs.balance_abs_threshold and most > least * knobs.balance_rel_threshold:
            chosen = replicas[loads.index(least)]
        else:
            n, worker = tree.match(job.prefix)
            share = n / len(job.prefix) if job.prefix else 0.0
            if share <= knobs.cache_threshold or worker is None:
                worker = replicas[loads.index(least)].id if knobs.miss_by_load else tree.smallest()
            chosen = next((r for r in replicas if r.id == worker), replicas[0])
        tree.insert(job.prefix, chosen.id)
        return [chosen]

    def on_bound(self, job: Job, replica: Replica, now_s: float) -> None:
        pass

    def on_end(self, job: Job, replica: Replica, now_s: float) -> None:
        pass

    def _keep_up(self, replicas: list[Replica], now_s: float) -> None:
        if len(self.tree.sizes) != len(replicas):
            here = {replica.id for replica in replicas}
            for gone in [worker for worker in self.tree.sizes if worker not in here]:
                self.tree.remove(gone)
            for new in sorted(here - self.tree.sizes.keys()):
                self.tree.insert((), new)
        if now_s - self._evicted_s >= self.knobs.eviction_interval_s:
            self._evicted_s = now_s
            self.tree.evict(self.knobs.max_tree_tokens // BLOCK)
