"""One GGUF file to safetensors + tokenizer + chat template: `python -m workers.modelcache.gguf_convert GGUF
OUT`.

A process of its own, because it imports transformers and torch and needs memory for the whole model, which
the caller should not keep. Called by importers.py. Prints one JSON line per stage; exit code 0 means OUT is
complete.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def convert(gguf: Path, out: Path) -> None:
    """Dequantise to bfloat16 and save. Some 30 s and 1 GB of memory for 135 million parameters."""
    _report("importing")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _report("reading the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _report("dequantising the weights")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # save_pretrained refuses while the (now pointless) quantizer is attached.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    _report("writing safetensors")
    model.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)
    _report("converted")


def _report(stage: str) -> None:
    print(json.dumps({"stage": stage}), flush=True)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
