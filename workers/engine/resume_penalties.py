"""Presence and frequency penalties that outlive an attempt: a logits processor inside vLLM's engine core.

vLLM counts these penalties over output tokens only, and the output of earlier attempts is prompt to it, so a
resumed request would repeat itself and leave the text it had begun. `vllm.py` therefore takes both penalties
of a resumed request from vLLM and gives them to this processor, which counts earlier output too, with the
same arithmetic in the same order. Requests that were never resumed do not come here. Imports vLLM: only
vllm.py may import this module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

EXTRA_ARG: Final = "corral_resume"


def extra_args(prior_token_ids: list[int], presence: float, frequency: float) -> dict[str, Any]:
    """What SamplingParams.extra_args carries to the core."""
    return {EXTRA_ARG: {"prior": prior_token_ids, "presence": presence, "frequency": frequency}}


class ResumePenalties(AdapterLogitsProcessor):
    """Made by vLLM once per worker; asks for a function per request, None for nearly all."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(
        self, params: Any
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        spec = (params.extra_args or {}).get(EXTRA_ARG)
        if spec is None:
            return None
        return _Penalties(spec["prior"], spec["presence"], spec["frequency"]).apply


class _Penalties:
    """Counts of one request's output, earlier attempts included, kept up to date as it grows."""

    def __init__(self, prior: list[int], presence: float, frequency: float) -> None:
        self._prior, self._presence, self._frequency = prior, presence, frequency
        self._counts: torch.Tensor | None = None
        self._n_counted = 0

    def apply(self, output_token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        """`output_token_ids` is this attempt's output so far; -1 marks a token still on its way from the
        device.
        """
        if self._counts is None:
            self._counts = torch.zeros(logits.shape[-1], dtype=torch.int64, device=logits.device)
            self._count(self._prior)
        fresh = output_token_ids[self._n_counted :]
        if -1 in fresh:
            fresh = fresh[: fresh.index(-1)]
        self._count(fresh)
        self._n_counted += len(fresh)
        logits -= self._frequency * self._counts
        logits -= self._presence * (self._counts > 0)
        return logits

    def _count(self, token_ids: list[int]) -> None:
        if token_ids and self._counts is not None:
            ids = torch.tensor(token_ids, dtype=torch.int64, device=self._counts.device)
            self._counts += torch.bincount(ids, minlength=self._counts.shape[0])
