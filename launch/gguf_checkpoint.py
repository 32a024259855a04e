"""Turn one GGUF file into a checkpoint folder that SGLang loads in seconds; the GGUF takes half a minute each time.

Run as `python -P -m sgl_hq.launch.gguf_checkpoint FILE.gguf FOLDER`: a process of its own, so that torch and the
gigabytes a dequantisation needs are gone when it ends. Weights become bf16; tokenizer and chat template come along.
"""

from __future__ import annotations

import sys
from pathlib import Path


def convert(gguf: Path, folder: Path) -> None:
    """Write config, bf16 safetensors and tokenizer of `gguf` into `folder` (created). Needs `accelerate` and `gguf`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
