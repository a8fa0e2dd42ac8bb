"""When something that failed may be tried again: exponential back-off, a bound, then a cool-down.

The count is not remembered but read from what failed since the last success, so that losing the memory cannot
start an endless loop. Serves replicas and machines alike. Pure.
"""

from dataclasses import dataclass

from autoscaler.types import Failure, ScalerSpec

# Another attempt on the same weights, profile and machine type ends the same way: clients are told at once.
PERMANENT = frozenset(
    {
        "bad_digest",
        "bad_weights",
        "disk_full",
        "engine_missing",
        "invalid_profile",
        "out_of_memory",
        "source_missing",
        "unknown_source",
    }
)


@dataclass(frozen=True, slots=True)
class Gate:
    """`n` failures in a row; the next attempt not before `retry_at_s`."""

    n: int = 0
    retry_at_s: float = 0.0
    delay_s: float = 0.0
    exhausted: bool = False
    last: Failure | None = None

    def is_open(self, now_s: float) -> bool:
        return now_s >= self.retry_at_s

    @property
    def tells_clients(self) -> bool:
        """Whether waiting clients should hear of it, rather than wait for the next attempt."""
        return self.last is not None and (self.exhausted or self.last.code in PERMANENT)

    def describe(self, spec: ScalerSpec) -> str:
        """One sentence for the owner, the same until the next attempt has failed; '' when nothing failed."""
        if self.last is None:
            return ""
        head = f"failed: {self.last.code}: {self.last.message}".rstrip(" :.")
        if self.exhausted:
            return (
                f"{head}; gave up after {self.n} attempts, one more every {self.delay_s:.0f} s "
                "while requests wait, or change the deployment"
            )
        when = f"in {self.delay_s:.0f} s" if self.delay_s else "at once"
        return f"{head}; retrying {when} ({self.n} of {spec.max_failures})"


def gate(failures: tuple[Failure, ...], last_good_at_s: float | None, spec: ScalerSpec) -> Gate:
    """State after these failures, those up to `last_good_at_s` forgiven.

    The first death of something that did serve is met at once, and so is nothing else: a replica killed in
    operation should be replaced without delay, one that cannot start should not.
    """
    counted = [f for f in failures if last_good_at_s is None or f.at_s > last_good_at_s]
    if not counted:
        return Gate()
    last = max(counted, key=lambda f: (f.at_s, f.subject_id))
    n = len(counted)
    if n >= spec.max_failures:
        delay_s, exhausted = spec.cooldown_s, True
    else:
        steps = n - 1 if last.ready_s == 0 else n - 2
        delay_s = 0.0 if steps < 0 else min(spec.backoff_first_s * 2.0**steps, spec.backoff_max_s)
        exhausted = False
    return Gate(n, last.at_s + delay_s, delay_s, exhausted, last)
