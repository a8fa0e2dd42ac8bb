"""Least squares with solutions that may not be negative (Lawson and Hanson, 1974): an engine has no negative costs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def nnls(a: Array, b: Array) -> Array:
    """The x >= 0 that minimises |a x - b|; for a few dozen columns, in at most ten times as many rounds."""
    size = np.linalg.norm(a, axis=0)
    size[size == 0] = 1.0
    gram, target = (
        (a / size).T @ (a / size),
        (a / size).T @ b,
    )  # columns of length 1: the products stay well scaled
    n = a.shape[1]
    free = np.zeros(n, dtype=bool)
    x = np.zeros(n)
    for _ in range(10 * n):
        worth = np.where(free, -np.inf, target - gram @ x)
        best = int(np.argmax(worth))
        if worth[best] <= 1e-10 * max(1.0, float(np.abs(target).max())):
            break
        free[best] = True
        for _ in range(n):
            trial = np.zeros(n)
            trial[free] = np.linalg.lstsq(gram[np.ix_(free, free)], target[free], rcond=None)[0]
            negative = free & (trial <= 0)
            if not negative.any():
                break
            # As far as the first that reaches zero; that one is held there.
            reach = x[negative] / (x[negative] - trial[negative])
            x = x + float(reach.min()) * (trial - x)
            free &= x > 1e-15
            x[~free] = 0.0
        x = trial
    solution: Array = x / size
    return solution
