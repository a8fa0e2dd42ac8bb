"""Recorded workloads as jobs: request files, rate files, and the rule that thins days of traffic.

Formats are told by their columns (docs/simulator.md lists them), so that another span, model or tenant of the same kind
reads the same way. Streams: a file is read row by row, never whole where it can be long.
"""

from __future__ import annotations

import csv
import gzip
import heapq
import io
import json
import math
import random
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Final

from autoscaler.sim.job import Job


class WorkloadError(ValueError):
    """A file that is not what its name promises: says which file, line and column."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One recorded request. Instants in seconds from the trace's start, lengths in tokens."""

    at_s: float
    n_prompt: int
    n_output: int
    tenant: str = "all"
    prefix: tuple[int, ...] = ()
    n_predicted: int = 0  # 0: not said
    band: int = 0


_MAX_LINE: Final = 4_000_000  # characters: a request with a million blocks is no request


def read_requests(path: Path, *, start_s: float = 0.0, until_s: float = math.inf) -> Iterator[Arrival]:
    """Arrivals of a request file between two instants, in its order; WorkloadError for anything it cannot read.

    CSV with `arrival_s`, `context_tokens` or `prompt_tokens` or `input_tokens`, `generated_tokens` or
    `output_tokens`, optionally `tenant`, `predicted_tokens`, `priority` (0 is served first); or JSON lines with
    `timestamp` (ms), `input_length`, `output_length`, optionally `hash_ids`. Either may be gzipped. Requests without
    prompt or answer count as one token. Rows may be out of order by some thousands; time counts from the earliest.
    """
    with open_text(path) as lines:
        name = path.name.removesuffix(".gz")
        rows = _jsonl(lines, path) if name.endswith((".jsonl", ".json")) else _csv(lines, path)
        is_empty = True
        for arrival in _in_order(rows, path):
            is_empty = False
            if arrival.at_s >= until_s:
                return
            if arrival.at_s >= start_s:
                yield arrival
        if is_empty:
            raise WorkloadError(f"{path.name}: has no request; one line for each is wanted")


_OUT_OF_ORDER: Final = 10_000  # requests that may stand between a row and its place in time


def _in_order(rows: Iterator[Arrival], path: Path) -> Iterator[Arrival]:
    """By instant, those at one instant as they stand, counted from the first."""
    waiting: list[tuple[float, int, Arrival]] = []
    first_s, last_s = math.nan, -math.inf

    def placed(arrival: Arrival) -> Arrival:
        nonlocal first_s, last_s
        if math.isnan(first_s):
            first_s = arrival.at_s
        last_s = arrival.at_s
        return replace(arrival, at_s=arrival.at_s - first_s) if first_s else arrival

    for number, arrival in enumerate(rows, start=1):
        if arrival.at_s < last_s:
            raise WorkloadError(
                f"{path.name}, request {number}: came {last_s - arrival.at_s:g} s before one that stands more than "
                f"{_OUT_OF_ORDER:,} rows above it; sort the file by time"
            )
        entry = (arrival.at_s, number, arrival)
        if len(waiting) < _OUT_OF_ORDER:
            heapq.heappush(waiting, entry)
        else:
            yield placed(heapq.heappushpop(waiting, entry)[2])
    while waiting:
        yield placed(heapq.heappop(waiting)[2])


def thin(arrivals: Iterator[Arrival], keep: float, seed: int) -> Iterator[Arrival]:
    """A share `keep` of the requests, chosen independently of everything else: a thinned Poisson process stays one, and
    rates, mixes and lengths keep their proportions. Prefix sharing does not, so conversations are kept or dropped
    whole: by their first two blocks, because one alone may be a system prompt that all of them share."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep = {keep}: must be above 0 and at most 1")
    chance = random.Random(seed)
    for arrival in arrivals:
        if arrival.prefix:
            kept = random.Random(f"{seed}:{arrival.prefix[:2]}").random() < keep
        else:
            kept = chance.random() < keep
        if kept:
            yield arrival


def jobs(arrivals: Iterator[Arrival], *, speed: float = 1.0) -> Iterator[Job]:
    """Jobs in order of arrival; `speed` 2 replays twice as fast."""
    if speed <= 0:
        raise ValueError(f"speed = {speed}: must be positive")
    last_s = 0.0
    for number, arrival in enumerate(arrivals):
        at_s = max(arrival.at_s / speed, last_s)
        last_s = at_s
        flow = (arrival.tenant, arrival.tenant, arrival.tenant)
        yield Job(
            number,
            at_s,
            arrival.n_prompt,
            arrival.n_output,
            flow,
            n_predicted=arrival.n_predicted,
            band=arrival.band,
            prefix=arrival.prefix,
        )


_PROMPT: Final = ("context_tokens", "prompt_tokens", "input_tokens")
_OUTPUT: Final = ("generated_tokens", "output_tokens")


def _csv(lines: IO[str], path: Path) -> Iterator[Arrival]:
    reader = csv.DictReader(lines)
    columns = reader.fieldnames or ()
    prompt = next((c for c in _PROMPT if c in columns), None)
    output = next((c for c in _OUTPUT if c in columns), None)
    if "arrival_s" not in columns or prompt is None or output is None:
        raise WorkloadError(
            f"{path.name}: needs columns arrival_s, one of {', '.join(_PROMPT)} and one of {', '.join(_OUTPUT)}; "
            f"has {', '.join(columns)[:200] or 'none'}. Rates of clients go to --rates"
        )
    for number, row in enumerate(reader, start=2):
        at_s = number_of(row, "arrival_s", path, number)
        n_prompt, n_output = (int(number_of(row, name, path, number)) for name in (prompt, output))
        n_predicted, band = (
            int(number_of(row, name, path, number)) if row.get(name) else 0
            for name in ("predicted_tokens", "priority")
        )
        yield Arrival(
            at_s,
            max(n_prompt, 1),
            max(n_output, 1),
            row.get("tenant") or "all",
            n_predicted=n_predicted,
            band=band,
        )


_FIELDS: Final = ("timestamp", "input_length", "output_length")


def number_of(row: Mapping[str, object], name: str, path: Path, line: int) -> float:
    """A finite number, not negative, of a row; WorkloadError names file, line, field and what stands there."""
    value = row.get(name)
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0 or isinstance(value, bool):
        raise WorkloadError(
            f"{path.name}, line {line}: {name} = {value!r}: give a finite number, not negative"
        )
    return number


def _jsonl(lines: IO[str], path: Path) -> Iterator[Arrival]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if len(line) > _MAX_LINE:
            raise WorkloadError(f"{path.name}, line {number}: longer than {_MAX_LINE} characters")
        try:
            row = json.loads(line)
        except ValueError as error:
            raise WorkloadError(f"{path.name}, line {number}: is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise WorkloadError(f"{path.name}, line {number}: needs an object with {', '.join(_FIELDS)}")
        missing = [name for name in _FIELDS if name not in row]
        if missing:
            raise WorkloadError(
                f"{path.name}, line {number}: lacks {', '.join(missing)}; a request has {', '.join(_FIELDS)} and "
                "optionally hash_ids"
            )
        at_ms = number_of(row, "timestamp", path, number)
        n_prompt, n_output = (int(number_of(row, name, path, number)) for name in _FIELDS[1:])
        blocks = row.get("hash_ids", [])
        if not isinstance(blocks, list) or not all(isinstance(block, int) for block in blocks):
            raise WorkloadError(f"{path.name}, line {number}: hash_ids: give a list of whole numbers")
        prefix = tuple(blocks)
        yield Arrival(at_ms / 1000, max(n_prompt, 1), max(n_output, 1), prefix=prefix)


def read_sizes(path: Path) -> list[tuple[int, int]]:
    """(prompt, answer) lengths of a request file, or of a table that has only the two columns of lengths."""
    if path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        return [(a.n_prompt, a.n_output) for a in read_requests(path)]
    with open_text(path) as lines:
        reader = csv.DictReader(lines)
        prompt, output = (
            next((c for c in names if c in (reader.fieldnames or ())), None) for names in (_PROMPT, _OUTPUT)
        )
        if prompt is None or output is None:
            raise WorkloadError(
                f"{path.name}: needs one of {', '.join(_PROMPT)} and one of {', '.join(_OUTPUT)}"
            )
        found = []
        for number, row in enumerate(reader, start=2):
            sizes = (int(number_of(row, name, path, number)) for name in (prompt, output))
            n_prompt, n_output = sizes
            found.append((max(n_prompt, 1), max(n_output, 1)))
    if not found:
        raise WorkloadError(f"{path.name}: has no rows")
    return found


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """A text file, gzipped or not; WorkloadError when it cannot be opened, and for what it turns out not to be while it
    is read."""
    try:
        with path.open("rb") as plain:
            # By content: a name may lie after a download.
            is_gzipped = plain.read(2) == b"\x1f\x8b" or path.name.endswith(".gz")
            plain.seek(0)
            with gzip.open(plain) if is_gzipped else nullcontext(plain) as binary:
                yield io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
    except UnicodeDecodeError:
        raise WorkloadError(
            f"{path.name}: is no text in UTF-8; give a CSV or JSON lines, gzipped or not"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise WorkloadError(f"{path.name}: is cut off or not gzipped at all; fetch it again") from None
    except csv.Error as error:
        raise WorkloadError(f"{path.name}: {error}; give a CSV with a header line") from None
    except OSError as error:
        raise WorkloadError(f"{path}: {error.strerror or error}") from None
