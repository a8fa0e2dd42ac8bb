"""Engine profiles: what is chosen, what is refused, and that each says why."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from controlplane.policy.engineprofile.catalogue import known_model
from controlplane.policy.engineprofile.compiling import compile_profile
from controlplane.policy.engineprofile.modelconfig import model_config
from controlplane.policy.engineprofile.types import (
    Compiled,
    Hardware,
    ImpossibleError,
    ModelConfig,
    Override,
    Promise,
    Scalar,
    Wish,
)
from controlplane.policy.gpus import GIB, GPUS, gpu
from controlplane.policy.models import MODELS
from workers.engine.base import EngineProfile

INTERACTIVE = Promise("interactive", 1_000, 100)
BATCH = Promise("batch", 600_000, 2_000)
LLAMA_8B = ModelConfig(
    "llama-3.1-8b", "LlamaForCausalLM", 8.03e9, 8.03e9, 32, 32, 8, 128, 4096, 14336, 128256, 131072
)
LLAMA_70B = ModelConfig(
    "llama-3.1-70b", "LlamaForCausalLM", 70.6e9, 70.6e9, 80, 64, 8, 128, 8192, 28672, 128256, 131072
)
QWEN_30B = ModelConfig(
    "qwen3-30b-a3b", "Qwen3Moe", 30.5e9, 3.3e9, 48, 32, 4, 128, 2048, 768, 151936, 40960,
    n_experts=128, n_experts_used=8,
)  # fmt: skip


def compiled(
    model: ModelConfig, place: str, promise: Promise = INTERACTIVE, n: int = 1, **overrides: Scalar
) -> Compiled:
    wish = Wish(overrides={name: Override(value, "a test wants it") for name, value in overrides.items()})
    return compile_profile(
        model, Hardware(gpu(place), n) if place != "cpu" else Hardware(None), promise, wish
    )


def refusal(model: ModelConfig, place: str, n: int = 1, **overrides: Scalar) -> tuple[str, str, str]:
    with pytest.raises(ImpossibleError) as refused:
        compiled(model, place, INTERACTIVE, n, **overrides)
    first = refused.value.refusals[0]
    assert first.message
    return first.field, first.code, first.remedy


def test_every_value_says_why_and_is_a_knob_of_the_worker() -> None:
    for place, n in (("cpu", 1), ("l4", 1), ("h100_sxm", 2)):
        found = compiled(LLAMA_8B, place, n=n)
        assert all(len(value.reason) > 10 for value in found.values)
        profile = EngineProfile.from_json({**found.as_dict(), "engine": "vllm"})
        assert profile.max_num_seqs == found.as_dict()["max_num_seqs"]


@pytest.mark.parametrize(
    ("model", "place", "n", "field", "code"),
    [
        (LLAMA_70B, "h100_sxm", 1, "gpu", "weights_do_not_fit"),
        (LLAMA_8B, "v100", 1, "gpu", "weights_do_not_fit"),
        (replace(LLAMA_8B, quantization="fp8", weight_bits=8), "v100", 2, "gpu", "no_kernels"),
        (replace(LLAMA_8B, quantization="awq", weight_bits=4.5), "cpu", 1, "model", "quantised_on_cpu"),
        (LLAMA_8B, "l4", 16, "n_gpus", "too_many_gpus"),
    ],
)
def test_what_cannot_run_is_refused_with_field_and_remedy(
    model: ModelConfig, place: str, n: int, field: str, code: str
) -> None:
    found = refusal(model, place, n)
    assert found[:2] == (field, code)
    assert found[2]


@pytest.mark.parametrize(
    ("place", "n", "overrides", "field", "code"),
    [
        ("t4", 2, {"dtype": "bfloat16"}, "dtype", "no_bf16"),
        ("a10g", 1, {"kv_cache_dtype": "fp8"}, "kv_cache_dtype", "no_fp8"),
        ("l4", 1, {"max_model_len": 100_000}, "max_model_len", "context_does_not_fit"),
        ("h100_sxm", 1, {"max_model_len": 200_000}, "max_model_len", "beyond_the_model"),
        ("h100_sxm", 3, {"tensor_parallel_size": 3}, "tensor_parallel_size", "heads_not_divisible"),
        ("h100_sxm", 2, {"tensor_parallel_size": 4}, "tensor_parallel_size", "gpus_do_not_multiply"),
        ("h100_sxm", 2, {"data_parallel_size": 2}, "data_parallel_size", "dense_copies"),
        ("h100_sxm", 2, {"enable_expert_parallel": True}, "enable_expert_parallel", "no_experts"),
        ("h100_sxm", 1, {"max_num_batched_tokens": 100, "max_num_seqs": 200},
         "max_num_batched_tokens", "chunk_below_batch"),
        ("h100_sxm", 1, {"max_loras": 2, "max_lora_rank": 600}, "max_lora_rank", "rank_too_large"),
    ],
)  # fmt: skip
def test_an_override_is_held_to_the_same_rules(
    place: str, n: int, overrides: dict[str, Scalar], field: str, code: str
) -> None:
    assert refusal(LLAMA_8B, place, n, **overrides)[:2] == (field, code)


def test_an_override_keeps_the_operators_reason_and_what_it_replaced() -> None:
    found = compiled(LLAMA_8B, "h100_sxm", max_num_seqs=64)
    value = next(v for v in found.values if v.name == "max_num_seqs")
    assert (value.value, value.reason, value.overridden) == (64, "a test wants it", True)
    assert value.inputs["instead_of"] == compiled(LLAMA_8B, "h100_sxm").as_dict()["max_num_seqs"]


def test_a_chunk_keeps_the_promised_pace_and_the_next_larger_one_would_not() -> None:
    """Sarathi's rule, recomputed from the performance model."""
    from controlplane.policy.engineprofile import batch
    from controlplane.policy.engineprofile.memory import Layout
    from controlplane.policy.perfmodel import ROOFLINE

    found = compiled(LLAMA_8B, "h100_sxm").as_dict()
    n, chunk = int(found["max_num_seqs"] or 0), int(found["max_num_batched_tokens"] or 0)
    pace = batch.pace(LLAMA_8B, gpu("h100_sxm"), Layout(), ROOFLINE, 2.0)
    assert pace.step_ms(chunk - n, n, 1152) <= 100 < pace.step_ms(chunk + 64 - n, n, 1152)
    assert chunk >= n


def test_a_tighter_promise_never_gets_a_larger_step() -> None:
    steps = [
        compiled(LLAMA_8B, "a100_sxm", Promise("x", 1_000, itl_ms)).as_dict()
        for itl_ms in (30, 60, 100, 250, 900)
    ]
    for tight, loose in pairwise(steps):
        assert int(tight["max_num_seqs"] or 0) <= int(loose["max_num_seqs"] or 0)


def test_a_short_prompt_finds_room_beside_a_long_one() -> None:
    for place in ("l4", "a100_sxm", "h100_sxm"):
        values = {value.name: int(value.value or 0) for value in compiled(LLAMA_8B, place).values if value.name in (
            "max_num_seqs", "max_num_batched_tokens", "long_prefill_token_threshold")}  # fmt: skip
        n_running = min(values["max_num_seqs"], values["max_num_batched_tokens"] // 2)
        left = values["max_num_batched_tokens"] - n_running - values["long_prefill_token_threshold"]
        assert left >= values["long_prefill_token_threshold"] > 0
    relaxed = compiled(LLAMA_8B, "h100_sxm", BATCH).values
    assert next(v.value for v in relaxed if v.name == "long_prefill_token_threshold") == 0


def test_memory_adds_up_on_every_gpu_for_every_model_that_fits() -> None:
    """Whatever is accepted leaves KV for one whole context, and weights and KV stay below the GPU's memory."""
    n_fit = 0
    for name in MODELS:
        model = known_model(name)
        assert model is not None
        for card in GPUS.values():
            for n in (1, 2, 4, 8):
                try:
                    found = compile_profile(model, Hardware(card, n), INTERACTIVE, Wish())
                except ImpossibleError as error:
                    assert all(r.field and r.remedy for r in error.refusals)
                    continue
                n_fit += 1
                told, chosen = found.forecast, found.as_dict()
                assert told["weights_gib_per_gpu"] + told["kv_gib_per_gpu"] < card.memory_bytes / GIB
                assert told["kv_tokens"] >= int(chosen["max_model_len"] or 0) > 0
                split = [int(chosen[f"{what}_parallel_size"] or 0) for what in ("tensor", "pipeline", "data")]
                assert split[0] * split[1] * split[2] == n
                assert model.n_heads % split[0] == 0
                assert int(chosen["max_num_batched_tokens"] or 0) >= int(chosen["max_num_seqs"] or 0)
    assert n_fit > 500


def test_more_memory_than_weights_need_goes_to_copies_of_attention_for_experts_only() -> None:
    assert compiled(LLAMA_8B, "h100_sxm", n=4).as_dict()["data_parallel_size"] == 1
    moe = compiled(QWEN_30B, "h100_sxm", n=2, data_parallel_size=2).as_dict()
    assert (moe["tensor_parallel_size"], moe["enable_expert_parallel"]) == (1, True)


def test_bf16_weights_run_as_float16_where_there_is_no_bf16() -> None:
    found = next(v for v in compiled(LLAMA_8B, "t4", n=2).values if v.name == "dtype")
    assert found.value == "float16"
    assert "t4" in found.reason


def test_speculation_needs_a_measured_acceptance_and_has_to_pay() -> None:
    place = Hardware(gpu("h100_sxm"))
    off = compile_profile(LLAMA_8B, place, INTERACTIVE, Wish()).as_dict()
    poor = compile_profile(LLAMA_8B, place, INTERACTIVE, Wish(acceptance=0.05)).as_dict()
    good = compile_profile(LLAMA_8B, place, INTERACTIVE, Wish(acceptance=0.8)).as_dict()
    eagle = compile_profile(
        LLAMA_8B, place, INTERACTIVE, Wish(acceptance=0.8, draft_model="head", draft_params=0.25e9)
    ).as_dict()
    assert (off["speculative_method"], poor["speculative_method"]) == ("", "")
    assert good["speculative_method"] == "ngram"
    assert int(good["num_speculative_tokens"] or 0) >= 1
    assert (eagle["speculative_method"], eagle["speculative_model"]) == ("eagle", "head")


def test_adapters_get_slots_and_the_next_rank_there_are_kernels_for() -> None:
    wish = Wish(n_adapters=3, lora_rank=20)
    with_them = compile_profile(LLAMA_8B, Hardware(gpu("l4")), INTERACTIVE, wish)
    assert (with_them.as_dict()["max_loras"], with_them.as_dict()["max_lora_rank"]) == (3, 32)
    assert with_them.forecast["kv_tokens"] < compiled(LLAMA_8B, "l4").forecast["kv_tokens"]


def test_what_a_gpu_cannot_keep_is_said() -> None:
    found = compiled(LLAMA_70B, "l4", Promise("x", 200, 20), n=8)
    assert [w.split(":")[0] for w in found.warnings] == ["itl", "ttft"]


def test_equal_inputs_give_equal_profiles() -> None:
    assert compiled(QWEN_30B, "h100_sxm", n=4) == compiled(QWEN_30B, "h100_sxm", n=4)


def test_a_configuration_is_read_from_the_models_own_file() -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256,
        "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    found = model_config("llama", config)
    assert found.n_params == pytest.approx(8.03e9, rel=0.01)
    assert (found.head_dim, found.kv_width, found.weight_bits) == (128, 2048, 16)
    fp8 = model_config("q", {**config, "quantization_config": {"quant_method": "fp8"}})
    assert (fp8.quantization, fp8.weight_bits) == ("fp8", 8.0)
    for wrong, entry in (
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": "x"}, "vocab_size"),
    ):
        with pytest.raises(ImpossibleError, match=entry):
            model_config("bad", {**config, **wrong})


def test_a_mixture_reads_few_of_its_parameters() -> None:
    config = {
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "vocab_size": 151936, "max_position_embeddings": 40960,
    }  # fmt: skip
    found = model_config("qwen3-30b-a3b", config)
    assert found.n_params == pytest.approx(30.5e9, rel=0.02)
    assert found.n_params_active == pytest.approx(3.3e9, rel=0.1)


def test_sleeping_is_for_accelerators_and_for_who_asks_for_it() -> None:
    assert refusal(LLAMA_8B, "cpu", sleep_level=1)[:2] == ("sleep_level", "no_sleep_on_cpu")
    assert {v.name: v.value for v in compiled(LLAMA_8B, "h100_sxm").values}["sleep_level"] == 0
    assert {v.name: v.value for v in compiled(LLAMA_8B, "h100_sxm", sleep_level=1).values}["sleep_level"] == 1
