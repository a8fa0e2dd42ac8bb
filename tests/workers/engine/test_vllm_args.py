"""What is passed to vLLM is what the installed vLLM takes."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from controlplane.policy.engineprofile.compiling import compile_profile
from controlplane.policy.engineprofile.numbers import METHODS_FROM
from controlplane.policy.engineprofile.types import Hardware, ModelConfig, Override, Promise, Wish
from controlplane.policy.gpus import gpu
from workers.engine.base import EngineProfile
from workers.engine.vllm_args import argv, engine_args

LLAMA_8B = ModelConfig("8b", "LlamaForCausalLM", 8.03e9, 8.03e9, 32, 32, 8, 128, 4096, 14336, 128256, 131072)
PROMISE = Promise("interactive", 1_000, 100)
WISHES = (
    Wish(),
    Wish(acceptance=0.8, n_adapters=2, lora_rank=16),
    Wish(overrides={"kv_cache_dtype": Override("fp8"), "attention_backend": Override("FLASH_ATTN")}),
)


def _profiles() -> list[EngineProfile]:
    found = [compile_profile(LLAMA_8B, Hardware(gpu("l4"), 2), PROMISE, wish) for wish in WISHES]
    found.append(compile_profile(LLAMA_8B, Hardware(None), PROMISE, Wish()))
    return [EngineProfile.from_json({**each.as_dict(), "engine": "vllm"}) for each in found]


def _source(module: str) -> Path:
    spec = importlib.util.find_spec("vllm")  # of the package: nothing is imported
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / module


def test_every_argument_is_a_field_of_the_installed_engine_args() -> None:
    tree = ast.parse(_source("engine/arg_utils.py").read_text())
    fields = {
        node.target.id
        for body in ast.walk(tree)
        if isinstance(body, ast.ClassDef) and body.name == "EngineArgs"
        for node in body.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert len(fields) > 100
    for profile in _profiles():
        assert engine_args(profile).keys() <= fields


def test_minimal_compute_capabilities_are_the_installed_kernels() -> None:
    """`get_min_capability` of each method, read from its source."""
    files = {
        "fp8": "fp8", "fbgemm_fp8": "fbgemm_fp8", "awq": "auto_awq", "gptq": "auto_gptq", "mxfp4": "mxfp4",
        "experts_int8": "experts_int8",
    }  # fmt: skip
    for method, file in files.items():
        tree = ast.parse(_source(f"model_executor/layers/quantization/{file}.py").read_text())
        told = [
            node.body[-1].value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            and node.name == "get_min_capability"
            and isinstance(node.body[-1], ast.Return)
            and isinstance(node.body[-1].value, ast.Constant)
        ]
        assert METHODS_FROM[method] in told, method


@pytest.mark.engine
@pytest.mark.full
def test_vllms_own_parser_takes_what_is_produced() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    for profile in _profiles():
        args = engine_args(profile)
        parsed = AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", "m", *argv(args)]))
        for name, value in args.items():
            got = getattr(parsed, name)
            if isinstance(value, dict) and not isinstance(got, dict):
                got = {key: getattr(got, key) for key in value}
            assert str(getattr(got, "name", got)) == str(value), name
