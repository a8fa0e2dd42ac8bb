"""How well answer lengths are predicted: from the text, and from what a tenant's answers were before."""

from __future__ import annotations

import time
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoscaler.sim.statistics import interval
from autoscaler.sim.studies.base import Column, Goal, Progress, Study, Table

if TYPE_CHECKING:
    from controlplane.prediction.lengths.evaluate import Score

HELP = "predicted answer lengths: coverage per model on unseen prompts, loss against no text, cost of a prediction"
_BAND = (0.78, 0.82)
_MIN_ANSWERS = 200


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--prompts", type=Path, help="default: lengths/arena_prompts.jsonl.gz of the traces")
    parser.add_argument(
        "--lengths", type=Path, help="default: lengths/arena_response_lengths.csv of the traces"
    )


def run(options: dict[str, Any], progress: Progress) -> Study:
    # torch takes seconds to import: only this study pays.
    import torch

    from controlplane.prediction.lengths.data import read_answers, read_prompts
    from controlplane.prediction.lengths.evaluate import repeated
    from controlplane.prediction.lengths.train import Recipe, prepare, train

    torch.set_num_threads(1)
    folder = options["traces"] / "lengths"
    prompts = read_prompts(options["prompts"] or folder / "arena_prompts.jsonl.gz")
    answers = read_answers(options["lengths"] or folder / "arena_response_lengths.csv", prompts)
    texts, recipe = prepare(prompts), Recipe()
    runs: list[dict[str, Score]] = []
    began = time.process_time()
    for scores in repeated(answers, texts, recipe, n_repeats=options["seeds"]):
        runs.append(scores)
        progress(f"deal {len(runs)} of {options['seeds']}")
    per_deal_s = (time.process_time() - began) / len(runs)
    began = time.process_time()
    model = train(answers, texts, recipe, 0)
    train_s = time.process_time() - began
    sample = list(prompts.values())
    began = time.process_time()
    for text in sample:
        model.predict(text, "gpt-4-0613")
    cost_us = (time.process_time() - began) / len(sample) * 1e6

    rows = _rows(runs)
    counts = {name: score.n for name, score in runs[0].items()}
    large = [row for row in rows if counts[str(row[0])] >= _MIN_ANSWERS]
    outside = [str(row[0]) for row in large if not _BAND[0] <= row[2].mean <= _BAND[1]]
    shown = [row[2].mean for row in large]
    loss = (
        sum(s.loss for run in runs for s in run.values()),
        sum(s.loss_baseline for run in runs for s in run.values()),
    )
    return Study(
        "Predicted answer lengths",
        {
            "data": f"{len(answers):,} answers of {len(counts)} models to {len(prompts):,} Arena prompts, GPT-2 tokens",
            "split": f"by prompt: dealt into four parts, each measured by a model trained and calibrated on the other "
            f"three; {len(runs)} deals, intervals over deals (the same answers each time: they show what the deal "
            "changes, not what other prompts would)",
            "model": "additive quantile regression (10, 50, 90 %) on hashed words and seven counts, torch; margins "
            "conformal, by answering model, from four inner folds by prompt (CQR, Mondrian)",
            "baseline": "the same model's quantiles whatever the prompt, with the same margin rule",
            "scale": "octaves: log2(1 + tokens); a loss of one is a factor of two",
            "cost": f"training on all answers {train_s:.1f} s, a deal {per_deal_s:.1f} s of CPU; a prediction "
            f"{cost_us:.0f} us (mean prompt {sum(map(len, sample)) / len(sample):.0f} characters; pure Python)",
        },
        [
            Table(
                "80 % intervals on unseen prompts",
                [
                    Column("answering model"),
                    Column("answers", "{:,}"),
                    Column("covered", "{:.1%}"),
                    Column("without text", "{:.1%}"),
                    Column("width, octaves", "{:.2f}"),
                    Column("without text", "{:.2f}"),
                    Column("pinball loss", "{:.4f}"),
                    Column("without text", "{:.4f}"),
                    Column("less, median", "{:.1%}"),
                ],
                rows,
            ),
        ],
        [
            Goal(
                "80 % intervals cover 78 to 82 % for each model with 200 answers or more",
                f"{min(shown):.1%} to {max(shown):.1%} over {len(large)} models",
                not outside,
                f"outside: {', '.join(outside)}" if outside else "",
            ),
            Goal(
                "lower pinball loss than without text",
                f"{loss[0] / loss[1] - 1:+.1%}",
                loss[0] < loss[1],
            ),
        ],
    )


def _rows(runs: Sequence[dict[str, Score]]) -> list[list[Any]]:
    by_model: dict[str, list[Score]] = defaultdict(list)
    for run in runs:
        for name, score in run.items():
            by_model[name].append(score)
    rows = []
    for name, found in sorted(by_model.items()):
        rows.append(
            [
                name,
                found[0].n,
                interval([s.n_covered / s.n for s in found]),
                interval([s.n_covered_baseline / s.n for s in found]),
                interval([s.width / s.n for s in found]).mean,
                interval([s.width_baseline / s.n for s in found]).mean,
                interval([s.loss / s.n for s in found]).mean,
                interval([s.loss_baseline / s.n for s in found]).mean,
                1 - sum(s.median_loss for s in found) / sum(s.median_loss_baseline for s in found),
            ]
        )
    return rows
