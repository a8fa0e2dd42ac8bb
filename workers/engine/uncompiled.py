"""Sampling helpers of vLLM as plain functions: nothing is compiled while a request waits.

vLLM wraps the function that ranks log-probabilities in `torch.compile`, which compiles at its first call: when
the first request with `logprobs` arrives, inside an engine step, with a C++ compiler. On two busy cores that
took 17.7 s (measured 2026-11-21), so the front's watchdog ended the engine as hung, and the request ended the
next replica the same way; where no compiler is installed the core dies instead. The plain function takes
0.3 ms for the same rows; what compiling saves is one boolean matrix of the batch's logits (39 MB at 256
requests and 152,000 tokens).

Called by `vllm.py` before the core is forked. Imports vLLM: only vllm.py may import this module.
"""

from __future__ import annotations

from typing import Any, Final

from vllm.v1.sample import sampler
from vllm.v1.sample.ops import logprobs

_WRAPPED: Final = "_torchdynamo_orig_callable"  # where torch.compile keeps what it wraps
_NAME: Final = "batched_count_greater_than"


def uncompile() -> None:
    """Put the plain function wherever vLLM looks for it. Safe to repeat; does nothing where it is plain."""
    compiled: Any = getattr(logprobs, _NAME)
    plain = getattr(compiled, _WRAPPED, compiled)
    for module in (logprobs, sampler):
        setattr(module, _NAME, plain)
