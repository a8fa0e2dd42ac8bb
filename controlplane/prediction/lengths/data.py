"""Reads the two files that a length model is trained on; refuses what it cannot use by file, line and field."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import IO, Final

from controlplane.prediction.lengths.train import Answer

_MAX_LINE: Final = 4_000_000
_TOKENS: Final = ("output_tokens", "output_tokens_gpt2", "generated_tokens")


class DataError(ValueError):
    """A file that is not what it should be."""


def read_prompts(path: Path) -> dict[str, str]:
    """Texts by prompt id: JSON lines with `prompt_id` and `prompt`, gzipped or not."""
    found: dict[str, str] = {}
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if len(line) > _MAX_LINE:
                    raise ValueError(f"longer than {_MAX_LINE} characters")
                row = json.loads(line)
                found[str(row["prompt_id"])] = str(row["prompt"])
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path.name}, line {number}: {type(error).__name__}: {error}") from None
    if not found:
        raise DataError(f"{path.name}: no prompt in it")
    return found


def read_answers(path: Path, prompts: dict[str, str]) -> list[Answer]:
    """Answers to these prompts: CSV with `prompt_id`, `model` and a count of output tokens. Those to other prompts are
    left out."""
    with _open(path) as lines:
        reader = csv.DictReader(lines)
        columns = reader.fieldnames or ()
        tokens = next((c for c in _TOKENS if c in columns), None)
        if tokens is None or "prompt_id" not in columns or "model" not in columns:
            raise DataError(
                f"{path.name}: needs columns prompt_id, model and one of {', '.join(_TOKENS)}; "
                f"has {', '.join(columns) or 'none'}"
            )
        found = []
        for number, row in enumerate(reader, start=2):
            try:
                n_tokens = int(row[tokens])
            except (TypeError, ValueError) as error:
                raise DataError(f"{path.name}, line {number}, {tokens}: {error}") from None
            if row["prompt_id"] in prompts and n_tokens >= 0:
                found.append(Answer(row["prompt_id"], row["model"], n_tokens))
    if not found:
        raise DataError(f"{path.name}: no answer to any of the {len(prompts)} prompts")
    return found


def _open(path: Path) -> IO[str]:
    try:
        if path.name.endswith(".gz"):
            return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8", newline="")
        return path.open(encoding="utf-8", newline="")
    except OSError as error:
        raise DataError(f"{path.name}: {error.strerror or error}") from None
