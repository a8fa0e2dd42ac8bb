"""Predicted answer lengths: features, conformal margins, the artefact, and training on a world whose truth is known."""

from __future__ import annotations

import gzip
import io
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError
from hypothesis import given
from hypothesis import strategies as st

from controlplane.prediction.lengths import conformal
from controlplane.prediction.lengths.features import BUCKETS, DENSE, Features, features
from controlplane.prediction.lengths.model import ArtefactError, Head, LengthModel, load, save

# -- features


@given(st.text(max_size=3000))
def test_features_are_bounded_and_repeatable(text: str) -> None:
    found = features(text)
    assert found == features(text)
    assert all(0 <= word < BUCKETS for word in found.words)
    assert len(found.dense) == len(DENSE)
    assert all(math.isfinite(value) and -2 <= value <= 6 for value in found.dense)


def test_what_is_asked_is_seen_at_both_ends_and_material_between_is_not() -> None:
    material = " ".join(f"filler{n}" for n in range(500))
    assert features("Summarise: " + material).words != features("Translate: " + material).words
    assert set(features("brief").words) < set(features(material * 20 + " brief").words)
    assert len(features("begin " + "x1 y2 z3 " * 3000).words) < 20
    said = dict(zip(DENSE, features("Write a 300-word essay?").dense, strict=True))
    assert said["log_size_asked"] == pytest.approx(math.log(301) / 5)
    assert said["is_question"] == 1.0


# -- conformal margins (CQR, arXiv:1905.03222)


def test_a_score_is_the_distance_outside_and_negative_inside() -> None:
    assert conformal.score(2, 5, 7) == 2
    assert conformal.score(2, 5, 1) == 1
    assert conformal.score(2, 5, 4) == -1


def test_the_margin_is_the_finite_sample_quantile() -> None:
    # Nine scores: eight of ten places lie below the eighth, so that a tenth falls below it with a chance of 0.8.
    assert conformal.margin([float(n) for n in range(1, 10)], 0.8) == pytest.approx(8.0)
    assert conformal.margin([1.0, 2.0, 3.0, 4.0], 0.7) == pytest.approx(3.5)
    with pytest.raises(ValueError, match="too few"):
        conformal.margin([1.0, 2.0], 0.8)
    with pytest.raises(ValueError, match="too few"):
        conformal.margin([], 0.8)


def test_intervals_of_a_bad_model_cover_as_promised() -> None:
    """Whatever the interval: off by ten on one side, the margin mends it."""
    chance, n_in, n = random.Random(3), 0, 0
    for _ in range(300):
        known = [conformal.score(10, 11, chance.gauss(0, 1)) for _ in range(60)]
        wide = conformal.margin(known, 0.8)
        for _ in range(20):
            n_in += conformal.score(10, 11, chance.gauss(0, 1)) <= wide
            n += 1
    assert 0.78 < n_in / n < 0.82


# -- the model that runs


def small() -> LengthModel:
    words = [(0.0, 0.0, 0.0, 0.0)] * BUCKETS
    words[7] = (2.0, 0.5, 1.0, 1.5)
    return LengthModel(
        0.8,
        tuple(words),
        ((0.0, 0.0, 0.0),) * (len(DENSE) - 1) + ((0.1, 0.2, 0.3),),
        {"m": Head(5.0, 6.0, 7.0, 1.0, 0.25)},
        Head(4.0, 6.0, 8.0, 0.5, 1.0),
    )


def test_a_prediction_is_head_plus_slope_times_text_and_never_crosses() -> None:
    model, nothing = small(), Features((), (0.0,) * len(DENSE))
    known = model.of(nothing, model.heads["m"])
    assert (known.low, known.middle, known.high) == pytest.approx((2**4.75 - 1, 2**6 - 1, 2**7.25 - 1))
    word = Features((7,), (0.0,) * (len(DENSE) - 1) + (2.0,))
    assert model.octaves(word, model.heads["m"]) == pytest.approx((5.7, 7.4, 9.1))
    assert model.octaves(word, model.other) == pytest.approx((4.35, 6.7, 9.05))
    crossed = Head(9.0, 6.0, 3.0, 1.0, 0.0)
    assert model.octaves(nothing, crossed) == (6.0, 6.0, 6.0)
    narrow = model.of(nothing, Head(5.0, 6.0, 7.0, 1.0, -3.0))
    assert narrow.low <= narrow.high


def test_an_artefact_comes_back_as_it_was_written_and_any_other_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lengths.json.gz"
    n_bytes = save(small(), path, {"prompts": 3})
    assert n_bytes == path.stat().st_size < 2000
    assert load(path) == small()
    assert load(path).predict("seven", "unheard of") == small().predict("seven", "m2")
    document = json.loads(gzip.decompress(path.read_bytes()))
    for changed, said in (
        ({"version": 99}, "version 99"),
        ({"words": {"99999": [1, 1, 1, 1]}}, "not a length model"),
        ({"other": [1]}, "not a length model"),
    ):
        path.write_bytes(gzip.compress(json.dumps(document | changed).encode()))
        with pytest.raises(ArtefactError, match=said):
            load(path)
    path.write_bytes(b"no")
    with pytest.raises(ArtefactError, match="not a length model"):
        load(path)


def test_predicting_imports_neither_torch_nor_numpy() -> None:
    heavy = "[m for m in ('torch', 'numpy') if m in sys.modules]"
    code = f"import sys, controlplane.prediction.lengths.model; print({heavy})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.strip() == "[]"


# -- training


def world(folder: Path, n: int = 160) -> list[str]:
    """Answers to `essay` are eight times as long as those to `word`; the model `wordy` doubles both; a spread around
    them that is known."""
    chance = random.Random(5)
    lines = ["prompt_id,model,output_tokens"]
    with gzip.open(folder / "prompts.jsonl.gz", "wt") as prompts:
        for number in range(n):
            kind = chance.choice(["essay", "word"])
            text = f"{kind} about {chance.choice('abcdefgh')} {chance.randrange(9)}"
            prompts.write(json.dumps({"prompt_id": f"p{number}", "prompt": text}) + "\n")
            for model, factor in (("terse", 1), ("wordy", 2)):
                n_tokens = factor * (400 if kind == "essay" else 50) * 2 ** chance.gauss(0, 0.3)
                lines.append(f"p{number},{model},{round(n_tokens)}")
    (folder / "lengths.csv").write_text("\n".join(lines) + "\n")
    return ["--prompts", str(folder / "prompts.jsonl.gz"), "--lengths", str(folder / "lengths.csv")]


def test_the_command_learns_what_the_text_says_and_covers_what_it_has_not_seen(tmp_path: Path) -> None:
    out = io.StringIO()
    call_command("train_lengths", *world(tmp_path), "--out", str(tmp_path / "made"), stdout=out)
    said = out.getvalue()
    assert "320 answers of 2 models to 160 prompts" in said
    covered = float(said.split("intervals cover ")[1].split("%")[0])
    assert 73 <= covered <= 87, "320 answers: three deviations"
    loss, plain = (float(part.split()[0]) for part in said.split("pinball loss ")[1].split(" octaves, "))
    assert loss < 0.45 * plain
    model = load(tmp_path / "made" / "lengths.json.gz")
    essay, word = (model.predict(f"{kind} about c 4", "terse") for kind in ("essay", "word"))
    assert 280 < essay.middle < 560
    assert 35 < word.middle < 75
    assert 1.5 < model.predict("word about c 4", "wordy").middle / word.middle < 2.6
    assert math.log2(essay.high / essay.low) < 3.3, "without the text 3.8 octaves would be needed"
    unknown = model.predict("word about c 4", "another")
    assert math.log2(unknown.high / unknown.low) > math.log2(word.high / word.low), "knows less, says less"


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("prompts.jsonl.gz", None, r"prompts.jsonl.gz: No such file"),
        ("lengths.csv", "prompt_id,model\n", "needs columns prompt_id, model and one of output_tokens"),
        ("lengths.csv", "prompt_id,model,output_tokens\np1,m,many\n", "line 2, output_tokens"),
        ("lengths.csv", "prompt_id,model,output_tokens\nq1,m,4\n", "no answer to any"),
        ("lengths.csv", "prompt_id,model,output_tokens\np1,m,4\n", "no answers to learn from"),
    ],
)
def test_refusals_name_file_line_and_field(tmp_path: Path, file: str, text: str | None, said: str) -> None:
    argv = world(tmp_path, n=8)
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    with pytest.raises(CommandError, match=said):
        call_command("train_lengths", *argv, stdout=io.StringIO())


def test_margins_come_from_folds_whose_prompts_were_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from controlplane.prediction.lengths import train

    seen: list[set[str]] = []

    def fit(answers: list[train.Answer], *_: object) -> LengthModel:
        seen.append({answer.prompt for answer in answers})
        return small()

    monkeypatch.setattr(train, "fit", fit)
    answers = [train.Answer(f"p{n}", model, 63) for n in range(40) for model in ("m", "rare")[: 1 + (n < 8)]]
    texts = {f"p{n}": Features((), (0.0,) * len(DENSE)) for n in range(40)}
    model = train.train(answers, texts, train.Recipe(n_folds=4), seed=1)
    every = {f"p{n}" for n in range(40)}
    assert seen[4] == every
    assert [len(every - part) for part in seen[:4]] == [10] * 4
    assert set.union(*(every - part for part in seen[:4])) == every
    # 63 tokens are 6 octaves: one octave inside m's interval, two inside that of a model with few answers (pooled).
    assert model.heads["m"].margin == pytest.approx(-1.0)
    assert model.other.margin == pytest.approx(-2.0)
