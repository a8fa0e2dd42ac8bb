"""How long a step takes at another batch size: a line through what was measured, by least squares.

Kept by the slots controller for each replica. It fades within some ten seconds, and ends at once when the load takes
another shape (longer contexts, another host).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_DECAY: Final = 0.95  # per beat: some ten seconds
_MAX_WEIGHT: Final = 20.0
_MIN_WEIGHT: Final = 20.0
_SURPRISE: Final = 0.25  # a beat so far from the line ends it: the load has another shape now


@dataclass(frozen=True, slots=True)
class StepFit:
    """Step time over batch size: a line through the decayed beats, by least squares. Sums of weight w."""

    w: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def plus(self, batch: float, step_ms: float, n_steps: int) -> StepFit:
        """One beat: its mean batch, its typical step."""
        slope_ms = self.slope_ms
        if slope_ms is not None:
            expected_ms = self.y / self.w + slope_ms * (batch - self.x / self.w)
            if abs(step_ms - expected_ms) > _SURPRISE * expected_ms:
                return StepFit().plus(batch, step_ms, n_steps)
        w, d = min(float(n_steps), _MAX_WEIGHT), _DECAY
        return StepFit(
            self.w * d + w,
            self.x * d + w * batch,
            self.y * d + w * step_ms,
            self.xx * d + w * batch * batch,
            self.xy * d + w * batch * step_ms,
        )

    @property
    def slope_ms(self) -> float | None:
        """Milliseconds per sequence; None while the batch has hardly varied. Never negative."""
        if self.w < _MIN_WEIGHT:
            return None
        mean_x, mean_y = self.x / self.w, self.y / self.w
        variance = self.xx / self.w - mean_x * mean_x
        if variance < max(0.25, (0.08 * mean_x) ** 2):
            return None
        slope = (self.xy / self.w - mean_x * mean_y) / variance
        return min(max(slope, 0.0), mean_y / mean_x)
