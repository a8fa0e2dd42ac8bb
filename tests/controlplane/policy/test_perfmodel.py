"""Step times: closed forms against sums, and a prior that behaves like hardware."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.policy.gpus import GPUS, gpu
from controlplane.policy.models import model
from controlplane.policy.perfmodel import ROOFLINE, ModelShape, StepModel, kv_tokens, pairs, roofline

LLAMA_8B = ModelShape("llama-3.1-8b", 8.03e9, 32, 8, 128, 32)
seconds = st.floats(1e-9, 1e-2)
models = st.builds(StepModel, seconds, seconds, seconds, seconds, seconds, seconds)


@settings(max_examples=200)
@given(models, st.integers(1, 400), st.integers(1, 200), st.integers(0, 200_000))
def test_a_run_of_steps_is_the_sum_of_its_steps(model: StepModel, k: int, n: int, context: int) -> None:
    one_by_one = sum(model.step_s(0, 0.0, n, context + i * n) for i in range(k))
    assert math.isclose(model.decode_s(k, n, context), one_by_one, rel_tol=1e-9)


@settings(max_examples=200)
@given(models, st.floats(0, 20), st.integers(1, 200), st.integers(0, 200_000))
def test_steps_within_a_time_are_all_that_fit(model: StepModel, time_s: float, n: int, context: int) -> None:
    k = model.decode_steps_within(time_s, n, context)
    assert model.decode_s(k, n, context) <= time_s < model.decode_s(k + 1, n, context)


def test_pairs_of_chunks_add_up() -> None:
    assert pairs(0, 10) == 55
    assert pairs(0, 4) + pairs(4, 6) == pairs(0, 10)


def test_a_cached_prefix_saves_its_prefill() -> None:
    model = roofline(LLAMA_8B, gpu("l4"))
    assert model.prefill_s(4000, n_cached=3000) < 0.4 * model.prefill_s(4000)


@pytest.mark.parametrize(("slow", "fast"), [("l4", "a10g"), ("a10g", "a100_sxm"), ("a100_sxm", "h100_sxm")])
def test_more_bandwidth_decodes_faster(slow: str, fast: str) -> None:
    slow_s, fast_s = (roofline(LLAMA_8B, gpu(name)).step_s(0, 0, 32, 40_000) for name in (slow, fast))
    assert fast_s < slow_s


def test_two_gpus_are_faster_than_one_and_less_than_twice() -> None:
    one, two = (roofline(LLAMA_8B, gpu("a100_sxm"), tp) for tp in (1, 2))
    ratio = one.step_s(0, 0, 32, 40_000) / two.step_s(0, 0, 32, 40_000)
    assert 1.2 < ratio < 2


def test_what_does_not_fit_has_no_room_for_kv() -> None:
    big = ModelShape("llama-70b", 70e9, 80, 8, 128, 64)
    assert kv_tokens(big, gpu("a100_sxm")) == 0
    assert kv_tokens(big, gpu("a100_sxm"), tp=4) > 100_000


def test_a_mixture_reads_the_experts_that_its_batch_chose() -> None:
    shape = model("qwen3-30b-a3b")
    step = roofline(shape, gpu("h100_sxm"))
    alone_s, few_s, many_s = (step.step_s(0, 0, n, 0) - step.seq_s * n for n in (1, 8, 400))
    read_s = 2.0 / (3.35e12 * 0.75)
    assert alone_s == pytest.approx(step.base_s + shape.n_params_active * read_s, rel=1e-6)
    assert alone_s < few_s < many_s
    assert step.step_s(400, 0.0, 0, 0) == pytest.approx(step.base_s + shape.n_params * read_s, rel=1e-6)


def test_narrower_weights_read_faster_and_keep_their_kv() -> None:
    wide, narrow = model("llama-3.1-8b"), model("llama-3.1-8b").with_dtype("fp8")
    assert roofline(narrow, gpu("l4")).weights_s == pytest.approx(roofline(wide, gpu("l4")).weights_s / 2)
    assert roofline(narrow, gpu("l4")).token_s < roofline(wide, gpu("l4")).token_s
    # It has no such units.
    assert roofline(narrow, gpu("a100_sxm")).token_s == roofline(wide, gpu("a100_sxm")).token_s
    assert narrow.kv_bytes_per_token == wide.kv_bytes_per_token
    with pytest.raises(ValueError, match="dtype"):
        wide.with_dtype("fp7")


def test_shares_and_overheads_outside_their_range_are_named() -> None:
    with pytest.raises(ValueError, match="memory"):
        replace(ROOFLINE, memory=0.0)
    with pytest.raises(ValueError, match="layer_tp_s"):
        replace(ROOFLINE, layer_tp_s=-1e-6)
    with pytest.raises(ValueError, match=r"llama-3\.1-8b"):
        model("llama")


def test_unknown_gpu_and_impossible_times_are_named() -> None:
    with pytest.raises(ValueError, match="h100_sxm"):
        gpu("h100")
    with pytest.raises(ValueError, match="token_s"):
        StepModel(1, 1, -1, 0, 0, 0)
    assert all(g.memory_bytes > 0 and g.flops_8bit >= g.flops_16bit for g in GPUS.values())
