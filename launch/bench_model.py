"""The model of `sgl-hq bench serve`: the shape of Qwen2.5-7B with dummy weights, or a real one.

Speed depends on the shape alone. The vocabulary is that of the demo model's tokenizer, which is small enough to carry along.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from sgl_hq.launch.bench_facts import BenchError
from sgl_hq.launch.kv_accounts import BF16_BYTES

QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,  # 32768 in the original: 32,000 random tokens come back as 33,500
    "vocab_size": 49152,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class BenchModel:
    """path: what the server loads; name: what rows call it; token_bytes: KV bytes of one bfloat16 token, all layers."""

    path: str
    name: str
    tokenizer: str
    token_bytes: int
    dummy: bool

    @property
    def server_args(self) -> list[str]:
        return ["--load-format", "dummy"] if self.dummy else []


def shape_with_dummy_weights(folder: Path, tokenizer: Path | None) -> BenchModel:
    """Write the configuration and a copy of the tokenizer into `folder`. tokenizer: None takes the demo model's."""
    source = tokenizer or _demo_tokenizer()
    missing = [name for name in TOKENIZER_FILES if not (source / name).is_file()]
    if missing:
        raise BenchError(f"--tokenizer: {source} has no {' and no '.join(missing)}")
    for name in TOKENIZER_FILES:
        shutil.copy(source / name, folder / name)
    (folder / "config.json").write_text(json.dumps(QWEN_7B, indent=1))
    kv = QWEN_7B["num_hidden_layers"] * QWEN_7B["num_key_value_heads"] * QWEN_7B["head_dim"]
    return BenchModel(str(folder), "qwen2.5-7b-shape, dummy weights", str(folder), 2 * kv * BF16_BYTES, True)


def real_model(model: str, tokenizer: Path | None) -> BenchModel:
    """A checkpoint folder or a hub name, with its own tokenizer unless another is given."""
    from transformers import AutoConfig

    from sgl_hq.launch.kv_accounts import bytes_per_token

    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        raise BenchError(f"--model: no model at {model!r} ({str(error).splitlines()[0]})") from error
    return BenchModel(model, Path(model).name, str(tokenizer or model), bytes_per_token(config), False)


def _demo_tokenizer() -> Path:
    from sgl_hq.launch.demo_model import ensure_demo_model

    try:
        return ensure_demo_model()
    except Exception as error:
        files = " and ".join(TOKENIZER_FILES)
        raise BenchError(f"No demo model here, so no tokenizer ({error}): give --tokenizer a folder with {files}") from error
