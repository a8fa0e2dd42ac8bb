"""Measurements of engines and kernels as rows that the fit understands.

`observations` reads a folder of public measurements (docs/simulator.md lists the sources), `read_sample` the small
excerpt beside this file that tests run on. Only what the model can speak of is taken: attention over all of the
context, one replica without pipeline or data parallelism, batches whose KV fits.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final

from controlplane.policy.capacity import Mix, itl_s
from controlplane.policy.gpus import GPUS, gpu
from controlplane.policy.models import model
from controlplane.policy.perfmodel import Efficiency, StepModel, kv_tokens, pairs, step_model

SAMPLE: Final = Path(__file__).with_name("sample.csv.gz")
# The data sheet itself: all of every peak, no overhead.
PEAK: Final = Efficiency(1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0)
# Names of the source: those of the catalogue. Left out: latent or sparse attention, unstated parallelism inside.
_MODELS: Final = {
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b",
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "Qwen/Qwen3-235B-A22B-FP8": "qwen3-235b-a22b",
    "openai/gpt-oss-120b": "gpt-oss-120b",
    "MiniMaxAI/MiniMax-M2.5": "minimax-m2.5",
}
_SPLITWISE: Final = {"llama2-70b": "llama-2-70b", "bloom-176b": "bloom-176b"}
_DISTSERVE: Final = {"facebook/opt-13b": "opt-13b", "facebook/opt-66b": "opt-66b"}


@dataclass(frozen=True, slots=True)
class Observation:
    """One measured time. kind: `serve` (mean gap between tokens of `n_seqs` requests kept running), `decode` (one step
    of `n_seqs` over `n_context` tokens of KV), `prefill` (a prompt alone). engine: whose overheads these are."""

    engine: str
    kind: str
    model: str
    gpu: str
    tp: int
    dtype: str
    n_seqs: int
    n_prompt: int
    n_output: int
    n_context: int
    seconds: float

    @property
    def pair(self) -> tuple[str, str, str]:
        return self.model, self.gpu, self.dtype


def predicted_s(found: Observation, step: StepModel) -> float:
    """What the model says of the same."""
    if found.kind == "serve":
        return itl_s(step, Mix(found.n_prompt, found.n_output), found.n_seqs)
    if found.kind == "decode":
        return step.step_s(0, 0.0, found.n_seqs, found.n_context)
    return step.step_s(found.n_prompt, pairs(0, found.n_prompt), 0, 0)


def observations(folder: Path) -> list[Observation]:
    """All of the folder's; FileNotFoundError names what is missing, ValueError a file that reads wrongly."""
    found = [
        *_serving(folder / "e2e_silicon_samples.csv"),
        *_splitwise(folder / "splitwise_perf_model.csv"),
        *_distserve(folder / "distserve_a100_vllm_fit.json"),
    ]
    found = _possible(found)
    if not found:
        raise ValueError(f"{folder}: holds no measurement that the model can speak of")
    return found


def _possible(found: list[Observation]) -> list[Observation]:
    """Without series that beat the hardware: where a tenth of the rows is faster than the peaks allow, the requests
    were not what the rows say (answers from a cache, a share of the prompt)."""
    series: dict[tuple[str, str, str, str], list[Observation]] = defaultdict(list)
    for row in found:
        series[(row.engine, *row.pair)].append(row)
    kept = []
    for rows_of in series.values():
        n_beyond = sum(
            predicted_s(row, step_model(model(row.model).with_dtype(row.dtype), gpu(row.gpu), row.tp, PEAK))
            > row.seconds
            for row in rows_of
        )
        if n_beyond < 0.1 * len(rows_of):
            kept += rows_of
    return kept


def rows(path: Path) -> Iterator[dict[str, str]]:
    """Of a CSV file, gzipped or not."""
    if path.name.endswith(".gz"):
        with gzip.open(path, "rt", newline="") as packed:
            yield from csv.DictReader(packed)
    else:
        with path.open(newline="") as plain:
            yield from csv.DictReader(plain)


def _serving(path: Path) -> Iterator[Observation]:
    for row in rows(path):
        name = _MODELS.get(row["model_path"])
        is_plain = row["attention_dp_size"] in ("", "1") and row["pp_size"] in ("", "1")
        if row["mode"] != "agg" or name is None or not is_plain or row["system"] not in GPUS:
            continue
        n = int(row["concurrency"] or row["batch_size"])
        tp, n_prompt, n_output = int(row["tp_size"]), int(row["isl"]), int(row["osl"])
        dtype = row["precision"] or "bf16"
        shape = model(name).with_dtype(dtype)
        if n * (n_prompt + n_output) > kv_tokens(shape, gpu(row["system"]), tp):
            continue  # not all of them ran at once
        seconds = float(row["silicon_tpot_ms"]) / 1000
        yield Observation(
            row["backend"], "serve", name, row["system"], tp, dtype, n, n_prompt, n_output, 0, seconds
        )


def _splitwise(path: Path) -> Iterator[Observation]:
    """Medians of 15 repeats. Prompts of several requests at once are left out: they ran one after the other."""
    found: dict[tuple[str, str, int, int, int], list[tuple[float, float]]] = defaultdict(list)
    for row in rows(path):
        name, card = _SPLITWISE.get(row["model"]), row["hardware"].replace("-80gb", "_sxm")
        if name is not None and card in GPUS:
            key = (name, card, int(row["tensor_parallel"]), int(row["prompt_size"]), int(row["batch_size"]))
            found[key].append((float(row["prompt_time"]), float(row["token_time"])))
    for (name, card, tp, n_prompt, n), times in sorted(found.items()):
        prompt_s = statistics.median(prompt for prompt, _ in times) / 1000
        token_s = statistics.median(token for _, token in times) / 1000
        if n == 1:
            yield Observation("vllm-2023", "prefill", name, card, tp, "bf16", 1, n_prompt, 0, 0, prompt_s)
        yield Observation(
            "vllm-2023", "decode", name, card, tp, "bf16", n, 0, 0, n * (n_prompt + 64), token_s
        )


def _distserve(path: Path) -> Iterator[Observation]:
    """Points of the source's own fitted curves, within what it measured."""
    for name, by_tp in json.loads(path.read_text()).items():
        shape = _DISTSERVE.get(name)
        for tp_text, curve in by_tp.items():
            if shape is None:
                continue
            tp = int(tp_text)
            for n_prompt in (128, 256, 512, 1024, 2048):
                a, b, c = curve["prefill"]
                seconds = (a + b * n_prompt + c * n_prompt**2) / 1000
                yield Observation(
                    "vllm-2023", "prefill", shape, "a100_sxm", tp, "bf16", 1, n_prompt, 0, 0, seconds
                )
            for n in (1, 8, 32, 64):
                a, b, c = curve["decoding_smallbs"]
                n_context = n * 500
                seconds = (a + b * n_context + c * n) / 1000
                yield Observation(
                    "vllm-2023", "decode", shape, "a100_sxm", tp, "bf16", n, 0, 0, n_context, seconds
                )


# -- the excerpt


def read_sample(path: Path = SAMPLE) -> list[Observation]:
    """The committed excerpt; ValueError names a column that is missing."""
    kinds = {f.name: f.type for f in fields(Observation)}
    found = []
    for row in rows(path):
        if set(row) != set(kinds):
            raise ValueError(f"{path.name}: columns must be {', '.join(kinds)}")
        found.append(
            Observation(
                **{
                    name: int(row[name])
                    if kinds[name] == "int"
                    else float(row[name])
                    if kinds[name] == "float"
                    else row[name]
                    for name in kinds
                }  # type: ignore[arg-type]
            )
        )
    return found


def write_sample(found: Iterable[Observation], path: Path = SAMPLE) -> None:
    """Byte for byte the same for the same rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Observation)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in found)
    path.write_bytes(gzip.compress(text.getvalue().encode(), 9, mtime=0))
