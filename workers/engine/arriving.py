"""vLLM's loading of weights that are still being fetched: each tensor as soon as its bytes are there.

`register()` is called by vllm.py before the configuration is made; vLLM then makes `ArrivingLoader` in its engine core.
The order is the fetcher's: files by name, tensors by their place in the file. It returns only when the whole version is
verified, so that a core which is ready has loaded nothing else. What needs all files at once waits for them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from workers.failure import check_safetensors
from workers.modelcache.arrival import Arrival

if TYPE_CHECKING:
    import torch

FORMAT: Final = "corral_arriving"
_N_HEAD: Final = 8  # bytes that say how long the header is


def tensors(
    arrival: Arrival,
    files: Sequence[Path],
    is_skipped: Callable[[str], bool] = lambda name: False,
    framework: str = "pt",
) -> Generator[tuple[str, torch.Tensor], None, None]:
    """Name and tensor, in the order in which they arrive. Raises ArrivalFailed, ReplicaFailure.

    A tensor shares memory with the file's map: copy what is to stay.
    """
    from safetensors import safe_open

    for path in files:
        arrival.ready(path.name, _N_HEAD)
        with path.open("rb") as file:
            n_header = int.from_bytes(file.read(_N_HEAD), "little")
        arrival.ready(path.name, min(_N_HEAD + n_header, path.stat().st_size))
        ends = check_safetensors(path)
        with safe_open(path, framework=framework) as weights:
            for name in weights.offset_keys():
                if not is_skipped(name):
                    arrival.ready(path.name, ends[name])
                    yield name, weights.get_tensor(name)
    arrival.verified()


def register() -> None:
    """Make the format known to vLLM in this process and its forks. As often as one likes."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader

    if FORMAT not in _LOAD_FORMAT_TO_MODEL_LOADER:
        register_model_loader(FORMAT)(_loader_class())


def _loader_class() -> type[Any]:
    """Made on demand: its base is vLLM's."""
    from vllm.model_executor.model_loader import default_loader
    from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
    from vllm.model_executor.model_loader.weight_utils import _natural_sort_key

    base: Any = default_loader.DefaultModelLoader

    class ArrivingLoader(base):  # type: ignore[misc]
        """vLLM's default loader, with another source of tensors."""

        def __init__(self, load_config: Any) -> None:
            known = copy.copy(load_config)
            known.load_format = "safetensors"  # for all that asks which files to take
            super().__init__(known)

        def _get_weights_iterator(self, source: Any) -> Generator[tuple[str, Any], None, None]:
            directory = Path(source.model_or_path)
            arrival = Arrival(directory)
            if source.subfolder or self.load_config.safetensors_load_strategy not in (None, "lazy"):
                arrival.verified()
                yield from super()._get_weights_iterator(source)
                return
            _, files, _, _ = self._prepare_weights(
                source.model_or_path,
                source.subfolder,
                source.revision,
                source.fall_back_to_pt,
                source.allow_patterns_overrides,
            )
            if not self.counter_before_loading_weights:  # type: ignore[has-type]
                self.counter_before_loading_weights = time.perf_counter()
            paths = [Path(file) for file in sorted(files, key=_natural_sort_key)]
            for name, tensor in tensors(
                arrival, paths, lambda name: should_skip_weight(name, self.local_expert_ids)
            ):
                yield source.prefix + name, tensor
            arrival.close()

    return ArrivingLoader
