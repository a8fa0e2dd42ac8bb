"""Which request of one key goes first."""

from hypothesis import given
from hypothesis import strategies as st

from controlplane.policy.ordering import GAMMA, QueueOrder, order_key, predicted_ms

NOW = 1_800_000_000_000


def key(order: QueueOrder, at_ms: int, ttft_ms: int = 1_000, job_ms: float = 100.0) -> int:
    return order_key(order, at_ms, ttft_ms=ttft_ms, predicted_ms=job_ms)


def test_deadline_first_lets_a_batch_request_of_long_ago_before_an_interactive_one_of_now() -> None:
    edf = QueueOrder.EDF
    assert key(edf, NOW - 700_000, 600_000) < key(edf, NOW, 1_000) < key(edf, NOW, 600_000)


def test_first_come_first_served_looks_at_nothing_else() -> None:
    fcfs = QueueOrder.FCFS
    assert key(fcfs, NOW, 60_000, 9_000) < key(fcfs, NOW + 1, 1, 1)


def test_shortest_first_until_the_long_one_has_waited_in_proportion() -> None:
    sjf = QueueOrder.SJF
    long, short = 60_000.0, 1_000.0
    assert key(sjf, NOW, job_ms=short) < key(sjf, NOW, job_ms=long)
    overtaken_ms = (long - short) / GAMMA
    assert key(sjf, int(NOW + overtaken_ms - 100), job_ms=short) < key(sjf, NOW, job_ms=long)
    assert key(sjf, int(NOW + overtaken_ms + 100), job_ms=short) > key(sjf, NOW, job_ms=long)


@given(st.integers(0, 10**5), st.integers(0, 10**5), st.integers(1, 10**4))
def test_a_job_is_longer_with_more_of_either_kind_of_token(n_prompt: int, n_output: int, more: int) -> None:
    base = predicted_ms(n_prompt, n_output, 50.0)
    assert (
        base < predicted_ms(n_prompt + more, n_output, 50.0) < predicted_ms(n_prompt, n_output + more, 50.0)
    )
