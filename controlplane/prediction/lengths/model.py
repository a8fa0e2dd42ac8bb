"""How long an answer will be, from the prompt's text: quantiles of its tokens. Needs no torch and no numpy.

Additive in hashed words and a few counts, so that a prediction is some hundred additions. Made by train.py, read from
a small JSON file; a gateway loads it once when it is told to (CORRAL_GATEWAY_LENGTH_MODEL). Predictions concern speed
and order only: whoever uses one must stay right when it is wrong.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from controlplane.prediction.lengths.features import BUCKETS, DENSE, VERSION, Features, features

_MAX_LOG2: Final = 20.0  # a million tokens
MAX_BYTES: Final = 1 << 20


class ArtefactError(ValueError):
    """A file that is no artefact of this version; says which and why."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens: `low` and `high` cover the answer with the calibrated chance, `middle` is its median."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True, slots=True)
class Head:
    """Of one answering model, in octaves of tokens: its quantiles where the text says nothing, how much text moves
    them, and the conformal margin on both sides."""

    low: float
    middle: float
    high: float
    slope: float
    margin: float


@dataclass(frozen=True, slots=True)
class LengthModel:
    """`words[b]`: rarity of a bucket, and what it adds to lower quantile, median and upper quantile; `dense[i]`: what
    a count adds. A prompt's rarities are scaled to a unit vector, so that long prompts do not say more. `heads` by the
    name of the answering model; `other` is for any that is not there."""

    coverage: float
    words: tuple[tuple[float, float, float, float], ...]
    dense: tuple[tuple[float, float, float], ...]
    heads: dict[str, Head]
    other: Head

    def predict(self, text: str, model: str) -> Lengths:
        """Of an answer by `model` to the prompt `text`."""
        return self.of(features(text), self.heads.get(model, self.other))

    def of(self, found: Features, head: Head) -> Lengths:
        low, middle, high = self.octaves(found, head)
        return Lengths(
            _tokens(low - head.margin), _tokens(middle), _tokens(max(high + head.margin, low - head.margin))
        )

    def octaves(self, found: Features, head: Head) -> tuple[float, float, float]:
        """Lower quantile, median and upper quantile as log2(1 + tokens), before the margin."""
        words = self.words
        low = middle = high = square = 0.0
        for bucket in found.words:
            rarity, to_low, to_middle, to_high = words[bucket]
            low += rarity * to_low
            middle += rarity * to_middle
            high += rarity * to_high
            square += rarity * rarity
        if square:
            scale = 1 / math.sqrt(square)
            low, middle, high = low * scale, middle * scale, high * scale
        for value, (to_low, to_middle, to_high) in zip(found.dense, self.dense, strict=True):
            low += value * to_low
            middle += value * to_middle
            high += value * to_high
        middle = head.middle + head.slope * middle
        return min(head.low + head.slope * low, middle), middle, max(head.high + head.slope * high, middle)


def unit(rarities: Sequence[float]) -> list[float]:
    """Scaled to length one; a vector of nothing stays one."""
    norm = math.sqrt(sum(r * r for r in rarities))
    return [r / norm for r in rarities] if norm else list(rarities)


def _tokens(octaves: float) -> float:
    return float(2.0 ** min(max(octaves, 0.0), _MAX_LOG2) - 1)


def save(model: LengthModel, path: Path, notes: dict[str, Any]) -> int:
    """Write the artefact, gzipped JSON; its size in bytes. `notes`: where it comes from."""

    def short(values: tuple[float, ...]) -> list[float]:
        return [round(v, 4) for v in values]

    document = {
        "version": VERSION,
        "coverage": model.coverage,
        "notes": notes,
        "words": {str(i): short(w) for i, w in enumerate(model.words) if any(abs(v) >= 5e-5 for v in w[1:])},
        "dense": dict(zip(DENSE, map(short, model.dense), strict=True)),
        "heads": {name: short(_row(head)) for name, head in sorted(model.heads.items())},
        "other": short(_row(model.other)),
    }
    path.write_bytes(gzip.compress(json.dumps(document).encode(), 9, mtime=0))
    return path.stat().st_size


def load(path: Path) -> LengthModel:
    """ArtefactError for what save() did not write."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ArtefactError(f"{path.name}: larger than {MAX_BYTES} bytes")
        with gzip.open(path) as file:
            document = json.loads(file.read(16 * MAX_BYTES))
        if document["version"] != VERSION:
            raise ArtefactError(
                f"{path.name}: made for version {document['version']} of the features, this is {VERSION}: "
                "train it again"
            )
        words = [(0.0, 0.0, 0.0, 0.0)] * BUCKETS
        for bucket, (rarity, low, middle, high) in document["words"].items():
            words[int(bucket)] = (float(rarity), float(low), float(middle), float(high))
        return LengthModel(
            float(document["coverage"]),
            tuple(words),
            tuple(
                (float(low), float(middle), float(high))
                for low, middle, high in (document["dense"][name] for name in DENSE)
            ),
            {name: Head(*map(float, row)) for name, row in document["heads"].items()},
            Head(*map(float, document["other"])),
        )
    except ArtefactError:
        raise
    except (OSError, EOFError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ArtefactError(f"{path.name}: not a length model ({type(error).__name__}: {error})") from None


def _row(head: Head) -> tuple[float, ...]:
    return head.low, head.middle, head.high, head.slope, head.margin
