"""Whether a machine image's driver fits what the engine in it was built with: looked at before anything is launched.

The image's builder says what is in it by tags (`corral:driver`, `corral:cuda`, `corral:vllm`). An image that says
nothing is launched; one that says it cannot work is not. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

# Driver branch that each CUDA needs at least (NVIDIA's CUDA compatibility table).
DRIVERS: Final = {"12.4": 550, "12.6": 560, "12.8": 570, "12.9": 575, "13.0": 580}


@dataclass(frozen=True, slots=True)
class Fit:
    """`is_wrong`: it will not run. A remedy without that: nobody knows."""

    found: str
    is_wrong: bool = False
    remedy: str = ""


def judge(tags: Mapping[str, str], prefix: str = "corral") -> Fit | None:
    """None where the image says nothing about itself."""
    driver, cuda, engine = (tags.get(f"{prefix}:{name}", "") for name in ("driver", "cuda", "vllm"))
    if not (driver and cuda):
        return None
    found = f"driver {driver}, CUDA {cuda}, vLLM {engine or '?'}"
    needed, branch = DRIVERS.get(cuda), driver.split(".")[0]
    if needed is None or not branch.isdigit():
        return Fit(found, remedy=f"known are CUDA {', '.join(DRIVERS)}: try this image out first")
    if int(branch) < needed:
        return Fit(found, True, f"CUDA {cuda} needs driver {needed} or later: build a new image")
    return Fit(found)
