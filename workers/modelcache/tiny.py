"""A 2.6-million-parameter random Llama (5 MB) with its own tokenizer and chat template, made on the spot.

For tests and the cold-start benchmark: it exercises every joint of a real model and costs nothing to keep.
Its text has no meaning. Deterministic: the same seed gives the same files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('role must be one of system, user, assistant, tool') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
N_VOCAB, N_HIDDEN, N_LAYERS, N_HEADS, N_KV_HEADS, N_INNER = 512, 256, 4, 4, 2, 512

# Enough text for 250 merges; what it says does not matter.
_CORPUS = (
    "A request waits in a fair queue until a replica has a free slot, and then its tokens are streamed back.",
    "The price of an answer is known before it is given, and a tenant never pays for what was not produced.",
    "When a machine is taken away, another continues from the journal where the first one stopped.",
    "What is the capital of France? Where do the numbers come from, and how are they measured and compared?",
    "def decide(observation, spec, memory): return commands, next_memory, reasons  # 0 1 2 3 4 5 6 7 8 9",
)


def make_tiny_model(directory: Path, seed: int = 0, max_model_len: int = 4096) -> Path:
    """Write the model's files into `directory` (made if missing) and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(directory)
    _write_json(directory / "config.json", _config(max_model_len))
    _write_json(
        directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    )
    (directory / "LICENSE").write_text(
        "Random numbers and a byte-pair vocabulary: CC0-1.0, no rights reserved.\n"
    )
    _write_weights(directory / "model.safetensors", seed)
    return directory


def _config(max_model_len: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": N_VOCAB,
        "hidden_size": N_HIDDEN,
        "intermediate_size": N_INNER,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "num_key_value_heads": N_KV_HEADS,
        "head_dim": N_HIDDEN // N_HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": max_model_len,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(name, special=True, normalized=False) for name in SPECIALS]
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": "<|eos|>",
            "pad_token": "<|pad|>",
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _write_weights(path: Path, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)

    def matrix(n_out: int, n_in: int, gain: float = 1.0) -> torch.Tensor:
        weights = torch.randn(n_out, n_in, generator=generator) * (gain / n_in**0.5)
        return weights.to(torch.bfloat16)

    n_kv = N_HIDDEN // N_HEADS * N_KV_HEADS
    ones = torch.ones(N_HIDDEN, dtype=torch.bfloat16)
    tensors = {
        "model.embed_tokens.weight": matrix(N_VOCAB, N_HIDDEN, gain=16.0),
        "model.norm.weight": ones.clone(),
        "lm_head.weight": matrix(N_VOCAB, N_HIDDEN, gain=4.0),
    }
    for i in range(N_LAYERS):
        layer = f"model.layers.{i}."
        tensors |= {
            layer + "input_layernorm.weight": ones.clone(),
            layer + "post_attention_layernorm.weight": ones.clone(),
            layer + "self_attn.q_proj.weight": matrix(N_HIDDEN, N_HIDDEN),
            layer + "self_attn.k_proj.weight": matrix(n_kv, N_HIDDEN),
            layer + "self_attn.v_proj.weight": matrix(n_kv, N_HIDDEN),
            layer + "self_attn.o_proj.weight": matrix(N_HIDDEN, N_HIDDEN, gain=2.0),
            layer + "mlp.gate_proj.weight": matrix(N_INNER, N_HIDDEN, gain=2.0),
            layer + "mlp.up_proj.weight": matrix(N_INNER, N_HIDDEN, gain=2.0),
            layer + "mlp.down_proj.weight": matrix(N_HIDDEN, N_INNER, gain=2.0),
        }
    save_file(tensors, str(path), metadata={"format": "pt"})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
