"""The five limits that a key, a project and an organization can each carry, as one value.

Imports no Django. None means "not limited at this level"; the tightest of the three levels refuses.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Limits:
    rpm: int | None = None  # requests per minute
    input_tpm: int | None = None  # prompt tokens per minute
    output_tpm: int | None = None  # completion tokens per minute
    max_concurrency: int | None = None  # requests in flight
    budget_nano: int | None = None  # money that may be spent, nano-dollars

    def problems(self) -> Iterator[tuple[str, str]]:
        """(field, sentence) for each value out of range; the database has the same ranges as constraints."""
        for item in fields(self):
            value = getattr(self, item.name)
            top = (1 << 63) - 1 if item.name == "budget_nano" else (1 << 31) - 1
            if value is not None and not 0 <= value <= top:
                yield item.name, f"{item.name}={value}: must be from 0 to {top}, or null for no limit"


NO_LIMITS = Limits()
