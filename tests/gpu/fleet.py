"""Servers of tiny random models that the GPU tests share: each arm is started once, all at the same time.

6 layers with Qwen2.5's 7 query heads a kv head, random weights scaled so that attention to the shared prefix decides the
answer; stale KV is NaN in arms that pack (`poisoned_server.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from sgl_hq.launch.server_process import ServerProcess

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, VOCAB = 6, 896, 1536, 14, 2, 49152
LARGEST_GRAPH = 8  # rows of the largest decode graph
ARGS = [
    "--skip-tokenizer-init", "--page-size", "64", "--max-total-tokens", "131072", "--random-seed", "0", "--grammar-backend", "none",
    "--cuda-graph-max-bs-decode", str(LARGEST_GRAPH), "--chunked-prefill-size", "256", "--cuda-graph-max-bs-prefill", "256",
    "--decode-log-interval", "8",
    # Many servers start on one GPU: SGLang subtracts what the others take meanwhile, and an idle scheduler takes a core.
    "--mem-fraction-static", "0.8", "--sleep-on-idle",
]  # fmt: skip


class Arm(NamedTuple):
    """format: of the packed tier, `exact`, or None for vanilla."""

    backend: str
    format: str | None = None
    head_dim: int = 128

    @property
    def packs(self) -> bool:
        return self.format not in (None, "exact")

    @property
    def name(self) -> str:
        return f"{self.format or 'vanilla'}/{self.backend}/{self.head_dim}"


class Fleet:
    """Servers by arm; a server that did not start fails only the tests that ask for it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._servers: dict[Arm, ServerProcess] = {}
        self._failures: dict[Arm, BaseException] = {}

    def start(self, arms: Iterable[Arm]) -> None:
        arms = list(dict.fromkeys(arms))
        models = {dim: _write_model(self._folder / f"random-{dim}", dim) for dim in {arm.head_dim for arm in arms}}
        for arm in arms:
            options = [*ARGS, "--attention-backend", arm.backend]
            options += ["--hq-format", arm.format] if arm.format else []
            options += ["--hq-allow-ungated", "--hq-packed-fraction", "0.5"] if arm.packs else []
            server = self._servers[arm] = ServerProcess(str(models[arm.head_dim]), options, cpu=False, start_timeout_s=300, stop_grace_s=0)
            if arm.packs:
                server.argv[1:3] = [str(Path(__file__).with_name("poisoned_server.py"))]
        with ThreadPoolExecutor(len(arms) or 1) as pool:
            try:
                list(pool.map(self._start, arms))
            except BaseException:  # Ctrl-C, while the pool's threads wait for their servers
                self.stop()
                raise

    def server(self, arm: Arm) -> ServerProcess:
        """Raises what kept the arm's server from starting."""
        if arm in self._failures:
            raise self._failures[arm]
        return self._servers[arm]

    def stop(self) -> None:
        with ThreadPoolExecutor(len(self._servers) or 1) as pool:
            list(pool.map(ServerProcess.stop, self._servers.values()))

    def _start(self, arm: Arm) -> None:
        try:
            self._servers[arm].start()
        except Exception as error:
            self._failures[arm] = error
            print(f"---- {arm.name} did not start\n{self._servers[arm].log_text()[-3000:]}")


def _write_model(folder: Path, head_dim: int) -> Path:
    """A checkpoint of random bf16 weights. Scores q . k / sqrt(head_dim) have standard deviation 4: few tokens take the attention."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(7)

    def normal(std: float, *shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * std).bfloat16()

    ones = torch.ones(HIDDEN).bfloat16()
    weights = {"model.embed_tokens.weight": normal(1.0, VOCAB, HIDDEN), "lm_head.weight": normal(0.05, VOCAB, HIDDEN)}
    weights["model.norm.weight"] = ones
    for i in range(LAYERS):
        layer = {
            "self_attn.q_proj": normal(0.065, HEADS * head_dim, HIDDEN), "self_attn.k_proj": normal(0.065, KV_HEADS * head_dim, HIDDEN),
            "self_attn.v_proj": normal(0.06, KV_HEADS * head_dim, HIDDEN), "self_attn.o_proj": normal(0.05, HIDDEN, HEADS * head_dim),
            "mlp.gate_proj": normal(0.04, INNER, HIDDEN), "mlp.up_proj": normal(0.04, INNER, HIDDEN),
            "mlp.down_proj": normal(0.02, HIDDEN, INNER), "input_layernorm": ones, "post_attention_layernorm": ones,
        }  # fmt: skip
        weights |= {f"model.layers.{i}.{name}.weight": weight.clone() for name, weight in layer.items()}
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": head_dim,
        "vocab_size": VOCAB, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": False,
        "hidden_act": "silu", "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder
