"""The committed coefficients of the performance model: read once, asked by whoever plans (the simulator, GPU choice).

`manage.py perf_fit --data DIR --write` makes the file. A GPU that is not in it gets what all GPUs had in common.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from controlplane.policy.gpus import Gpu
from controlplane.policy.perfmodel import Efficiency, ModelShape, StepModel, step_model

FILE: Final = Path(__file__).with_name("coefficients.json")


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Efficiencies by GPU name, and of all in common."""

    common: Efficiency
    by_gpu: Mapping[str, Efficiency]

    def step_model(self, shape: ModelShape, gpu: Gpu, tp: int = 1) -> StepModel:
        """Step times of a model on `tp` GPUs of that kind."""
        return step_model(shape, gpu, tp, self.by_gpu.get(gpu.name, self.common))

    def basis(self, gpu: Gpu) -> str:
        """What the times of that GPU rest on, for a list of assumptions."""
        return "fitted" if gpu.name in self.by_gpu else "fitted on other GPUs"


@functools.cache
def coefficients(path: Path = FILE) -> Coefficients:
    """Of the file; ValueError names it and what is wrong with it."""
    try:
        found = json.loads(path.read_text())
        by_gpu = {name: Efficiency(**values) for name, values in found["gpus"].items()}
        return Coefficients(Efficiency(**found["common"]), by_gpu)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name}: {error}; `manage.py perf_fit --write` makes it anew") from error


def as_json(found: Coefficients, told: Mapping[str, Any]) -> str:
    """Text of the file; `told` says what it rests on."""
    values = {"common": asdict(found.common), "gpus": {n: asdict(e) for n, e in found.by_gpu.items()}}
    return json.dumps({**told, **values}, indent=1) + "\n"
