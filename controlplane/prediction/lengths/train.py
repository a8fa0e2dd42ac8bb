"""Trains the length model: quantile regression by pinball loss (torch), then conformal margins per answering model.

Called by `manage.py train_lengths` and the study; nothing live imports this. Prompts, not answers, are the unit of
every split: two answers to one prompt are never on both sides.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn

from controlplane.prediction.lengths import conformal
from controlplane.prediction.lengths.features import BUCKETS, DENSE, Features, features
from controlplane.prediction.lengths.model import Head, LengthModel, unit

OTHER: Final = ""
_UNKNOWN_SHARE: Final = 0.15  # of the answers in a step are learnt as if their model were unknown
_MAX_GRAD: Final = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a model to a prompt."""

    prompt: str  # its id
    model: str
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """Knobs of training, chosen by out-of-fold loss on the training prompts only."""

    coverage: float = 0.8
    n_steps: int = 120
    rate: float = 0.05
    word_decay: float = 3.0
    dense_decay: float = 0.01
    tail_decay: float = 3.0  # of what text does to the outer quantiles, times the decays above
    n_folds: int = 4


def octaves(n_tokens: int) -> float:
    """The scale of all losses: an error of one is a factor of two."""
    return math.log2(1 + max(n_tokens, 0))


def pinball(predicted: float, value: float, q: float) -> float:
    """Loss of a predicted quantile, in octaves."""
    error = value - predicted
    return max(q * error, (q - 1) * error)


class _Net(nn.Module):  # type: ignore[misc]
    def __init__(self, n_models: int, centre: float) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(BUCKETS, 3, mode="sum")
        self.dense = nn.Linear(len(DENSE), 3, bias=False)
        self.base = nn.Parameter(torch.tensor([centre - 1.2, centre, centre + 1.2]).repeat(n_models, 1))
        self.slope = nn.Parameter(torch.ones(n_models))
        nn.init.zeros_(self.words.weight)
        nn.init.zeros_(self.dense.weight)

    def forward(self, words: Tensor, offsets: Tensor, weights: Tensor, dense: Tensor) -> Tensor:
        """Text scores, one row a prompt: shifts of the lower quantile, the median and the upper quantile."""
        return self.words(words, offsets, per_sample_weights=weights) + self.dense(dense)

    def quantiles(self, text: Tensor, model: Tensor) -> Tensor:
        return self.base[model] + self.slope[model, None] * text


def fit(answers: Sequence[Answer], texts: dict[str, Features], recipe: Recipe, seed: int) -> LengthModel:
    """A model without margins, from all these answers. `texts`: features by prompt."""
    if not answers:
        raise ValueError("no answers to learn from: more prompts are needed")
    torch.manual_seed(seed)
    prompts = sorted({answer.prompt for answer in answers})
    models = [OTHER, *sorted({answer.model for answer in answers})]
    rows = {prompt: i for i, prompt in enumerate(prompts)}
    index = {model: i for i, model in enumerate(models)}
    values = torch.tensor([octaves(answer.n_tokens) for answer in answers])
    of_prompt = torch.tensor([rows[answer.prompt] for answer in answers])
    of_model = torch.tensor([index[answer.model] for answer in answers])
    bags = [texts[prompt].words for prompt in prompts]
    words = torch.tensor([word for bag in bags for word in bag], dtype=torch.long)
    offsets = torch.tensor([0, *(len(bag) for bag in bags)]).cumsum(0)[:-1]
    rarity = _rarity(bags)
    shares = torch.tensor([share for bag in bags for share in unit([rarity[word] for word in bag])])
    dense = torch.tensor([texts[prompt].dense for prompt in prompts])
    # Models with many answers must not drown the others: each weighs alike.
    counts = torch.bincount(of_model, minlength=len(models)).float()
    weights = 1 / counts[of_model]
    weights /= weights.mean()

    net = _Net(len(models), float(values.median()))
    optimiser = torch.optim.Adam(net.parameters(), lr=recipe.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.n_steps)
    decay = torch.tensor([recipe.tail_decay, 1.0, recipe.tail_decay])
    tail = (1 - recipe.coverage) / 2
    levels = torch.tensor([tail, 0.5, 1 - tail])
    for _ in range(recipe.n_steps):
        optimiser.zero_grad()
        unknown = torch.rand(len(answers)) < _UNKNOWN_SHARE
        text = net(words, offsets, shares, dense)[of_prompt]
        predicted = net.quantiles(text, torch.where(unknown, 0, of_model))
        error = values[:, None] - predicted
        loss = (weights[:, None] * torch.maximum(levels * error, (levels - 1) * error)).sum(1).mean()
        loss = loss + recipe.word_decay * (net.words.weight.square() * decay).sum() / len(prompts)
        loss = loss + recipe.dense_decay * (net.dense.weight.T.square() * decay).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), _MAX_GRAD)
        optimiser.step()
        schedule.step()
    heads = {
        model: Head(low, middle, high, net.slope[i].item(), 0.0)
        for (model, i), (low, middle, high) in zip(index.items(), net.base.tolist(), strict=True)
    }
    return LengthModel(
        recipe.coverage,
        tuple(
            (rare, float(low), float(middle), float(high))
            for rare, (low, middle, high) in zip(rarity, net.words.weight.tolist(), strict=True)
        ),
        tuple((float(low), float(middle), float(high)) for low, middle, high in net.dense.weight.T.tolist()),
        {model: head for model, head in heads.items() if model != OTHER},
        heads[OTHER],
    )


def train(answers: Sequence[Answer], texts: dict[str, Features], recipe: Recipe, seed: int) -> LengthModel:
    """A calibrated model: fitted on all answers; its margins from the scores of folds that were held out by prompt, so
    that no answer is wasted on calibration (cross-conformal)."""
    folds = split({answer.prompt for answer in answers}, recipe.n_folds, seed)
    scores: dict[str, list[float]] = defaultdict(list)
    for number, held_out in enumerate(folds):
        part = fit([a for a in answers if a.prompt not in held_out], texts, recipe, seed + number)
        for answer in answers:
            if answer.prompt in held_out:
                for name, head in (
                    (answer.model, part.heads.get(answer.model, part.other)),
                    (OTHER, part.other),
                ):
                    low, _, high = part.octaves(texts[answer.prompt], head)
                    scores[name].append(conformal.score(low, high, octaves(answer.n_tokens)))
    whole = fit(answers, texts, recipe, seed)
    pooled = conformal.margin(scores[OTHER], recipe.coverage)

    def calibrated(name: str, head: Head) -> Head:
        own = scores[name]
        wide = conformal.margin(own, recipe.coverage) if len(own) >= conformal.MIN_SCORES else pooled
        return replace(head, margin=wide)

    return LengthModel(
        recipe.coverage,
        whole.words,
        whole.dense,
        {name: calibrated(name, head) for name, head in whole.heads.items()},
        calibrated(OTHER, whole.other),
    )


def _rarity(bags: Sequence[Sequence[int]]) -> list[float]:
    """Inverse document frequency by bucket, at least a little."""
    n_with = [0] * BUCKETS
    for bag in bags:
        for word in bag:
            n_with[word] += 1
    return [math.log((2 + len(bags)) / (1 + n)) for n in n_with]


def split(prompts: set[str], n_parts: int, seed: int) -> list[frozenset[str]]:
    """Prompts dealt into parts of almost equal size."""
    order = sorted(prompts)
    random.Random(seed).shuffle(order)
    return [frozenset(order[i::n_parts]) for i in range(n_parts)]


def prepare(prompts: dict[str, str]) -> dict[str, Features]:
    """Features by prompt id, of texts by prompt id."""
    return {prompt: features(text) for prompt, text in prompts.items()}
