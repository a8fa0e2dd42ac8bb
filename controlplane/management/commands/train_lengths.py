"""`manage.py train_lengths`: a model of answer lengths from prompts and the answers they got.

Prints what it costs and what it is worth on prompts it has not seen, then writes the model trained on all of them.
Needs no database. Prompts are read, never printed or stored.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser


class Command(BaseCommand):
    help = "Trains the model that predicts answer lengths from prompts; prints coverage and loss on unseen prompts."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--prompts", type=Path, required=True, help="JSON lines: prompt_id, prompt (or .gz)"
        )
        parser.add_argument(
            "--lengths", type=Path, required=True, help="CSV: prompt_id, model, output_tokens"
        )
        parser.add_argument("--out", type=Path, help="folder for lengths.json.gz (default: only measure)")
        parser.add_argument(
            "--repeats", type=int, default=1, help="deals of the prompts to measure on (default 1)"
        )
        parser.add_argument("--seed", type=int, default=0)

    def handle(self, *args: Any, **options: Any) -> None:
        # torch takes seconds to import: only who trains pays.
        import torch

        from controlplane.prediction.lengths.data import DataError, read_answers, read_prompts
        from controlplane.prediction.lengths.evaluate import Score, repeated
        from controlplane.prediction.lengths.model import save
        from controlplane.prediction.lengths.train import Recipe, prepare, train

        if options["repeats"] < 1:
            raise CommandError("--repeats: at least 1")
        torch.set_num_threads(1)  # batches this small only wait for each other
        recipe, seed, began = Recipe(), options["seed"], time.perf_counter()
        try:
            prompts = read_prompts(options["prompts"])
            answers = read_answers(options["lengths"], prompts)
            texts = prepare(prompts)
            total = Score()
            for scores in repeated(answers, texts, recipe, n_repeats=options["repeats"], seed=seed):
                for score in scores.values():
                    total.add(score)
            if not total.n:
                raise CommandError("--lengths: no model has enough answers to measure; 30 are needed")
            measured_s = time.perf_counter() - began
            self.stdout.write(
                f"{len(answers)} answers of {len({a.model for a in answers})} models to {len(prompts)} prompts; "
                f"each prompt measured by a model trained on others, {measured_s:.1f} s\n"
                f"on unseen prompts: {recipe.coverage:.0%} intervals cover {total.n_covered / total.n:.1%}, "
                f"{total.width / total.n:.2f} octaves wide ({total.width_baseline / total.n:.2f} without text)\n"
                f"pinball loss {total.loss / total.n:.4f} octaves, {total.loss_baseline / total.n:.4f} without text "
                f"({1 - total.loss / total.loss_baseline:.1%} less; of the median "
                f"{1 - total.median_loss / total.median_loss_baseline:.1%} less)"
            )
            if options["out"] is None:
                return
            began = time.perf_counter()
            model = train(answers, texts, recipe, seed)
            options["out"].mkdir(parents=True, exist_ok=True)
            path = options["out"] / "lengths.json.gz"
            n_bytes = save(model, path, {"prompts": len(prompts), "answers": len(answers)})
        except (DataError, ValueError, OSError) as error:
            raise CommandError(str(error)) from error
        self.stdout.write(
            f"trained on all in {time.perf_counter() - began:.1f} s: {path}, {n_bytes:,} bytes; a gateway uses it "
            "with CORRAL_GATEWAY_LENGTH_MODEL"
        )
