"""In which numbers a model is computed: dtype, quantised weights, KV. Refuses what the GPU has no arithmetic for. Pure.

Minimal compute capabilities are those of vLLM 0.32's kernels (`get_min_capability` of each method; a test compares).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from controlplane.policy.engineprofile.types import (
    Hardware,
    ImpossibleError,
    ModelConfig,
    Refusal,
    Scalar,
    Value,
    Wish,
)
from controlplane.policy.gpus import capability

BF16_FROM: Final = 80
FP8_FROM: Final = 89  # 8-bit floating point in hardware; below it weights are widened as they are read
# Method in config.json -> compute capability x 10 from which vLLM 0.32 runs it.
METHODS_FROM: Final = MappingProxyType(
    {
        "fp8": 75,
        "fbgemm_fp8": 80,
        "awq": 75,
        "gptq": 60,
        "compressed-tensors": 75,
        "mxfp4": 80,
        "experts_int8": 80,
    }
)
DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
KV_DTYPES: Final = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2")


def dtype(model: ModelConfig, hardware: Hardware, wish: Wish) -> Value:
    """The dtype of activations, and of weights that are not quantised."""
    asked = wish.get("dtype")
    if asked is not None and asked.value not in DTYPES:
        raise _refused(
            "dtype", "unknown_dtype", f"{asked.value!r} is not known", f"choose one of {', '.join(DTYPES)}"
        )
    if hardware.gpu is None:
        reason = "the only dtype in which an answer resumed elsewhere was measured to go on identically (CPU, 24 of 24)"
        return Value("dtype", "float32", reason, {"model_dtype": model.dtype})
    has = capability(hardware.gpu)
    inputs: dict[str, Scalar] = {"model_dtype": model.dtype, "gpu": hardware.gpu.name, "capability": has / 10}
    wanted = model.dtype if asked is None or asked.value == "auto" else str(asked.value)
    if wanted == "bfloat16" and has < BF16_FROM:
        if asked is not None and asked.value == "bfloat16":
            raise _refused(
                "dtype",
                "no_bf16",
                f"{hardware.gpu.name} (compute capability {has / 10}) has no bfloat16 arithmetic",
                "choose float16, or a GPU from compute capability 8.0 on (A10G, A100, L4, H100)",
            )
        return Value(
            "dtype",
            "float16",
            f"the weights are bfloat16, {hardware.gpu.name} computes 16-bit as float16 only",
            inputs,
        )
    if wanted == "float32" and asked is None:
        return Value(
            "dtype",
            "float16" if has < BF16_FROM else "bfloat16",
            "half the memory and twice the speed of the float32 it is stored in",
            inputs,
        )
    return Value("dtype", wanted, "what the weights were trained and stored in", inputs)


def quantization(model: ModelConfig, hardware: Hardware) -> Value:
    """How the checkpoint is quantised: the checkpoint says, nobody chooses. Refuses a GPU without kernels for it."""
    method = model.quantization
    if not method:
        return Value(
            "quantization", None, "the weights are not quantised", {"weight_bits": model.weight_bits}
        )
    if hardware.gpu is None:
        raise _refused(
            "model", "quantised_on_cpu", f"{method} weights have no tested kernels on the CPU",
            "serve the unquantised model here, or choose a GPU",
        )  # fmt: skip
    least, has = METHODS_FROM.get(method), capability(hardware.gpu)
    inputs = {"weight_bits": model.weight_bits, "capability": has / 10, "needs": (least or 0) / 10}
    if least is not None and has < least:
        raise _refused(
            "gpu", "no_kernels",
            f"{method} weights need compute capability {least / 10}, {hardware.gpu.name} has {has / 10}",
            "choose a newer GPU or another quantisation of the model",
        )  # fmt: skip
    how = "computed in 8 bit" if method == "fp8" and has >= FP8_FROM else "widened to 16 bit as they are read"
    return Value("quantization", method, f"what config.json says the weights are; {how}", inputs)


def kv_dtype(model: ModelConfig, hardware: Hardware, wish: Wish) -> Value:
    """In what the KV cache is kept."""
    asked = wish.get("kv_cache_dtype")
    if asked is not None:
        if asked.value not in KV_DTYPES:
            raise _refused(
                "kv_cache_dtype", "unknown_dtype", f"{asked.value!r} is not known",
                f"choose one of {', '.join(KV_DTYPES)}",
            )  # fmt: skip
        if (
            str(asked.value).startswith("fp8")
            and hardware.gpu is not None
            and capability(hardware.gpu) < FP8_FROM
        ):
            has = capability(hardware.gpu) / 10
            raise _refused(
                "kv_cache_dtype", "no_fp8",
                f"{hardware.gpu.name} (compute capability {has}) has no 8-bit floating point",
                "leave it `auto`, or choose a GPU from compute capability 8.9 on (L4, L40S, H100)",
            )  # fmt: skip
        return Value("kv_cache_dtype", asked.value, asked.reason)
    if model.kv_scales and hardware.gpu is not None and capability(hardware.gpu) >= FP8_FROM:
        return Value(
            "kv_cache_dtype",
            "fp8",
            "the checkpoint brings scales for 8-bit KV: twice the tokens, quality as its makers measured",
        )
    return Value(
        "kv_cache_dtype",
        "auto",
        "as wide as the computation: nobody measured this model's answers with narrower KV",
    )


def kv_bytes(chosen: Value, dtype_name: str) -> float:
    """Bytes of one number of KV."""
    if str(chosen.value).startswith("fp8"):
        return 1.0
    return 4.0 if dtype_name == "float32" else 2.0


def _refused(field: str, code: str, message: str, remedy: str) -> ImpossibleError:
    return ImpossibleError((Refusal(field, code, message, remedy),))
