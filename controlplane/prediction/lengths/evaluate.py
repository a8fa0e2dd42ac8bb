"""What a length model is worth on prompts it has not seen, against quantiles that never look at the text.

Called by `manage.py train_lengths` and `manage.py study lengths`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from controlplane.prediction.lengths import conformal
from controlplane.prediction.lengths.features import Features
from controlplane.prediction.lengths.train import Answer, Recipe, octaves, pinball, split, train


@dataclass(slots=True)
class Score:
    """Of one answering model on one held-out part. Sums over `n` answers, in octaves (a factor of two is 1)."""

    n: int = 0
    n_covered: int = 0
    n_covered_baseline: int = 0
    loss: float = 0.0
    loss_baseline: float = 0.0
    median_loss: float = 0.0
    median_loss_baseline: float = 0.0
    width: float = 0.0
    width_baseline: float = 0.0

    def add(self, other: Score) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, slots=True)
class Baseline:
    """Quantiles of the answers of one model, whatever was asked, with the same margin rule."""

    low: float
    middle: float
    high: float
    ends: tuple[float, float] = field(default=(0.0, 0.0))


def baseline(values: Sequence[float], coverage: float) -> Baseline:
    """From its answers so far, in octaves; `ends` cover a new one with that chance."""
    ordered, n = sorted(values), len(values)
    tail = (1 - coverage) / 2
    low, middle, high = (ordered[min(int(q * n), n - 1)] for q in (tail, 0.5, 1 - tail))
    wide = conformal.margin([conformal.score(low, high, v) for v in ordered], coverage)
    return Baseline(low, middle, high, (low - wide, high + wide))


def repeated(
    answers: Sequence[Answer],
    texts: dict[str, Features],
    recipe: Recipe,
    *,
    n_repeats: int,
    n_parts: int = 4,
    seed: int = 0,
) -> Iterator[dict[str, Score]]:
    """Scores by answering model, once for each random deal of the prompts into parts: each part is measured by a model
    that was trained and calibrated on the others."""
    prompts = {answer.prompt for answer in answers}
    for number in range(seed, seed + n_repeats):
        total: dict[str, Score] = defaultdict(Score)
        for test in split(prompts, n_parts, number):
            part = measure(
                [a for a in answers if a.prompt not in test],
                [a for a in answers if a.prompt in test],
                texts,
                recipe,
                number,
            )
            for name, score in part.items():
                total[name].add(score)
        yield dict(total)


def measure(
    seen: Sequence[Answer], unseen: Sequence[Answer], texts: dict[str, Features], recipe: Recipe, seed: int
) -> dict[str, Score]:
    """Train on one side, score on the other. Models with no answer on the first side are left out."""
    model = train(seen, texts, recipe, seed)
    known: dict[str, list[float]] = defaultdict(list)
    for answer in seen:
        known[answer.model].append(octaves(answer.n_tokens))
    plain = {
        name: baseline(values, recipe.coverage)
        for name, values in known.items()
        if len(values) >= conformal.MIN_SCORES
    }
    tail = (1 - recipe.coverage) / 2
    found: dict[str, Score] = defaultdict(Score)
    for answer in unseen:
        base = plain.get(answer.model)
        if base is None:
            continue
        value, head = octaves(answer.n_tokens), model.heads[answer.model]
        low, middle, high = model.octaves(texts[answer.prompt], head)
        score = found[answer.model]
        score.n += 1
        score.n_covered += conformal.score(low, high, value) <= head.margin
        score.n_covered_baseline += base.ends[0] <= value <= base.ends[1]
        for predicted, plainly, q in (
            (low, base.low, tail),
            (middle, base.middle, 0.5),
            (high, base.high, 1 - tail),
        ):
            score.loss += pinball(predicted, value, q)
            score.loss_baseline += pinball(plainly, value, q)
        score.median_loss += pinball(middle, value, 0.5)
        score.median_loss_baseline += pinball(base.middle, value, 0.5)
        score.width += max(high - low + 2 * head.margin, 0.0)
        score.width_baseline += base.ends[1] - base.ends[0]
    return dict(found)
