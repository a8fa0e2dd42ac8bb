"""One request inside a simulation: what the workload says of it, and what became of it."""

from __future__ import annotations

from typing import Final

NEVER: Final = -1.0


class Job:
    """Lengths in tokens, instants in virtual seconds (`NEVER` = not yet).

    n_output is the true length, which no policy may read; policies get n_predicted. n_stop: how many tokens it may make
    before the engine puts it aside (all of them, unless a queue deals in quanta). prefix: ids of the prompt's blocks
    of `BLOCK` tokens, leading ones equal where two prompts begin alike. adapter: what it needs beside the model.
    """

    __slots__ = (
        "adapter",
        "arrived_s",
        "band",
        "dispatched_s",
        "ended_s",
        "finish_step",
        "first_s",
        "flow",
        "id",
        "n_attempts",
        "n_cached",
        "n_done",
        "n_output",
        "n_predicted",
        "n_preempted",
        "n_prefill_left",
        "n_prompt",
        "n_shared",
        "n_stop",
        "prefix",
        "replica",
        "seat",
    )

    def __init__(
        self,
        id: int,
        arrived_s: float,
        n_prompt: int,
        n_output: int,
        flow: tuple[str, str, str] = ("o", "p", "k"),
        *,
        n_predicted: int = 0,
        band: int = 0,
        prefix: tuple[int, ...] = (),
        adapter: str = "",
    ) -> None:
        if n_prompt < 1 or n_output < 1:
            raise ValueError(
                f"job {id}: n_prompt = {n_prompt}, n_output = {n_output}: must both be at least 1"
            )
        self.id = id
        self.arrived_s = arrived_s
        self.n_prompt = n_prompt
        self.n_output = self.n_stop = n_output
        self.n_predicted = n_predicted or n_output
        self.flow = flow
        self.band = band
        self.prefix = prefix
        self.adapter = adapter
        self.dispatched_s = self.first_s = self.ended_s = NEVER
        self.replica = -1
        self.n_attempts = 0
        self.n_preempted = 0
        # Inside an engine: tokens produced over all attempts, prompt tokens found in the cache, prompt tokens (and
        # those of earlier attempts) still to be computed, the step at which the last token is made, and the seat it
        # runs in (-1: not running; a new seat per admission tells an old heap entry from a new one).
        self.n_done = 0
        self.n_cached = 0
        self.n_shared = 0
        self.n_prefill_left = 0
        self.finish_step = 0
        self.seat = -1

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.arrived_s

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.arrived_s

    @property
    def itl_s(self) -> float:
        """Mean time between its tokens after the first; 0 for a single token."""
        return (self.ended_s - self.first_s) / (self.n_output - 1) if self.n_output > 1 else 0.0
