"""Fits what share of its peaks an engine reaches, and what a step costs besides, to measured times.

A step's time is linear in the inverse shares and the overheads, but for the knee between reading and multiplying; so
it is fitted by non-negative least squares on relative errors, the knee's side taken from the solution before. Ridge
pulls the shares towards the roofline prior, so that what the measurements cannot tell apart stays physical. Kernels
measured alone (kernels.py) say how one GPU differs from another; where a GPU's engine was measured, its own shares are
fitted too, pulled towards what all GPUs have in common. Called by `manage.py perf_fit`; nothing live calls it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from controlplane.policy.gpus import gpu
from controlplane.policy.models import model
from controlplane.policy.perfmodel import ROOFLINE, Efficiency, pairs, step_model
from controlplane.prediction.perf.data import PEAK, Observation
from controlplane.prediction.perf.kernels import KernelShares
from controlplane.prediction.perf.nnls import Array, nnls

SHARES: Final = ("memory", "flops_16bit", "flops_8bit", "flops_4bit", "attention", "kv", "link")
OVERHEADS: Final = ("base_s", "layer_s", "layer_tp_s", "layer_expert_s", "seq_s")
RIDGE: Final = 0.02  # of all rows together, by share: pulls towards ROOFLINE
RIDGE_GPU: Final = 0.2  # a GPU's own shares towards what all have in common
MIN_ROWS_GPU: Final = 20  # fewer do not say what is the GPU and what is the model
ENGINE: Final = "vllm"  # whose overheads are kept
_ROUNDS: Final = 40
_HUBER: Final = 0.25  # relative error from which a row counts less: measurements have mistakes of their own


@dataclass(frozen=True, slots=True)
class Fitted:
    """`common` for GPUs never measured, `by_gpu` for those that were; `engines`: overheads of the others."""

    common: Efficiency
    by_gpu: Mapping[str, Efficiency]
    engines: Mapping[str, tuple[float, ...]]

    def of(self, name: str, engine: str = ENGINE) -> Efficiency:
        found = self.by_gpu.get(name, self.common)
        if engine == ENGINE:
            return found
        return replace(found, **dict(zip(OVERHEADS, self.engines[engine], strict=True)))


@dataclass(frozen=True, slots=True)
class Columns:
    """Rows as seconds at the peaks: what is read, multiplied by the step's own tokens and by prompts that come in, by
    width of weights (1, 2, 3: columns of SHARES), and what is linear anyway. `costs` counts the overheads."""

    read_s: Array
    own_s: Array
    more_s: Array
    width: Array
    rest: Array
    costs: Array


def columns(rows: Sequence[Observation]) -> Columns:
    """See Columns; the sum of all terms at some Efficiency is data.predicted_s at it (a test holds it)."""
    found = [_terms(row) for row in rows]
    return Columns(*(np.array(part, dtype=float) for part in zip(*found, strict=True)))


def _terms(row: Observation) -> tuple[float, float, float, int, list[float], list[float]]:
    shape, card = model(row.model).with_dtype(row.dtype), gpu(row.gpu)
    peak = step_model(shape, card, row.tp, PEAK)
    n_seqs, n_context, more_tokens, n_pairs = row.n_seqs, row.n_context, 0.0, 0.0
    n = row.n_seqs
    if row.kind == "prefill":
        n, n_seqs, n_context, n_pairs = row.n_prompt, 0, 0, pairs(0, row.n_prompt)
    elif row.kind == "serve":
        # as capacity.itl_s: a decoding step, and the prompts that come in while it decodes
        n_context = round(row.n_seqs * (row.n_prompt + row.n_output / 2))
        prompts = row.n_seqs / row.n_output
        more_tokens, n_pairs = row.n_prompt * prompts, pairs(0, row.n_prompt) * prompts
    read_s = peak.weights_s + peak.expert_s * (1 - (1 - peak.expert_share) ** n)
    width = 3 if shape.bytes_per_param < 0.75 else 2 if shape.bytes_per_param <= 1 else 1
    rest = [peak.pair_s * n_pairs, peak.context_s * n_context, peak.reduce_s * (n + more_tokens)]
    n_layers = float(shape.n_layers)
    costs = [
        1.0,
        n_layers,
        n_layers if row.tp > 1 else 0.0,
        n_layers if shape.expert_share else 0.0,
        float(n_seqs),
    ]
    return read_s, peak.token_s * n, peak.token_s * more_tokens, width, rest, costs


def shares_at(found: Columns, inverse: Array) -> Array:
    """Seconds at the peak by row and share, on the side of the knee where `inverse` (by row and share) puts it."""
    at = np.arange(len(found.read_s))
    width = found.width.astype(int)
    reads = found.read_s * inverse[:, 0] >= found.own_s * inverse[at, width]
    out = np.zeros((len(at), len(SHARES)))
    out[:, 0] = np.where(reads, found.read_s, 0.0)
    out[at, width] = np.where(reads, 0.0, found.own_s) + found.more_s
    out[:, 4:] = found.rest
    return out


def fit(rows: Sequence[Observation], kernels: Mapping[str, KernelShares]) -> Fitted:
    """ValueError without rows of the engine whose overheads are wanted."""
    if not any(row.engine == ENGINE for row in rows):
        raise ValueError(f"no measurement of {ENGINE}, whose overheads are wanted")
    engines = sorted({row.engine for row in rows})
    factors = np.array([_factors(row.gpu, kernels) for row in rows])
    prior = np.array([1 / getattr(ROOFLINE, name) for name in SHARES])
    common, overheads = _solve(rows, engines, factors, prior, RIDGE)
    mine = overheads[engines.index(ENGINE)]
    by_gpu: dict[str, Efficiency] = {}
    for name in sorted({row.gpu for row in rows} | set(kernels)):
        shares = common * _factors(name, kernels)
        own = [row for row in rows if row.gpu == name and row.engine == ENGINE]
        if len(own) >= MIN_ROWS_GPU:
            ones = np.ones((len(own), len(SHARES)))
            shares, _ = _solve(own, [ENGINE], ones, shares, RIDGE_GPU, kept=mine)
        by_gpu[name] = _efficiency(shares, mine)
    others = {name: tuple(float(v) for v in overheads[i]) for i, name in enumerate(engines)}
    return Fitted(_efficiency(common, mine), by_gpu, others)


def _factors(name: str, kernels: Mapping[str, KernelShares]) -> Array:
    """Inverse shares of this GPU's kernels over those of the reference GPUs; 1 where nothing was measured."""
    found = kernels.get(name)
    return np.ones(len(SHARES)) if found is None else np.array([found.factor(share) for share in SHARES])


def _solve(
    rows: Sequence[Observation],
    engines: list[str],
    factors: Array,
    prior: Array,
    ridge: float,
    kept: Array | None = None,
) -> tuple[Array, Array]:
    """Inverse shares, and overheads by engine; `kept` overheads are not fitted."""
    n_shares, n_over = len(SHARES), len(OVERHEADS)
    terms = columns(rows)
    seconds = np.array([row.seconds for row in rows])
    counts = Counter((row.engine, *row.pair) for row in rows)
    # A pair measured a hundred times shall not outvote the others.
    balance = np.array([counts[(row.engine, *row.pair)] ** -0.5 for row in rows])
    balance *= np.sqrt(len(rows) / float((balance**2).sum()))
    given = np.zeros(len(rows)) if kept is None else terms.costs @ kept
    costs = np.zeros((len(rows), 0 if kept is not None else n_over * len(engines)))
    if kept is None:
        for i, row in enumerate(rows):
            at = n_over * engines.index(row.engine)
            costs[i, at : at + n_over] = terms.costs[i]
    pull = float(np.sqrt(ridge * len(rows)))
    towards = np.zeros((n_shares, n_shares + costs.shape[1]))
    towards[:, :n_shares] = np.diag(pull / prior)
    solution, weight = prior, balance
    over = np.zeros((len(engines), n_over))
    for _ in range(_ROUNDS):
        found = np.hstack([shares_at(terms, solution * factors) * factors, costs])
        scale = weight / seconds
        a = np.vstack([found * scale[:, None], towards])
        x = nnls(a, np.concatenate([(seconds - given) * scale, np.full(n_shares, pull)]))
        error = np.abs(found @ x + given - seconds) / seconds
        weight = balance * np.sqrt(np.minimum(1.0, _HUBER / np.maximum(error, 1e-9)))
        moved = float(np.abs(x[:n_shares] - solution).max())
        solution = np.maximum(x[:n_shares], 1e-6)
        if kept is None:
            over = x[n_shares:].reshape(len(engines), n_over)
        if moved < 1e-4:
            break
    return solution, over


def _efficiency(inverse: Array, overheads: Array) -> Efficiency:
    shares = [float(f"{1 / value:.4g}") for value in inverse]
    return Efficiency(*shares, *(float(f"{value:.4g}") for value in overheads))
