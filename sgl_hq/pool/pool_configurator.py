"""SGLang's pool sizing with the byte budget split over two tiers."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator, MemoryPoolConfig
from sglang.srt.runtime_context import get_parallel, get_schedule

from sgl_hq.config import HQConfig
from sgl_hq.page_format import PageLayout
from sgl_hq.pool.chunks import granularity
from sgl_hq.pool.codecs import codecs_of_server
from sgl_hq.pool.sizing import KVShape, TierSizes, split_budget
from sgl_hq.pool.slabs import slabs_of_budget

logger = logging.getLogger(__name__)


class HQPoolConfigurator(DefaultPoolConfigurator):
    """Returns the dense tokens D as `max_total_num_tokens`: the packed tier is invisible to the scheduler.

    `--max-total-tokens N` keeps its meaning of a byte budget: N bf16 tokens' worth of bytes, shared by the tiers,
    so that arms started with the same N hold the same bytes. On a GPU the memory of plans and partial results comes out of
    the budget too: workspace_bytes(layouts, shape, tiers without it, device), None on a CPU.
    """

    def __init__(self, kvc, config: HQConfig, workspace_bytes: Callable[..., int] | None = None):
        super().__init__(kvc)
        self._workspace_bytes, self._device = workspace_bytes, kvc.device
        model = kvc.model_config
        self._config = config
        self._context_tokens = model.context_len
        self._shape = KVShape(
            layers=kvc.layer_info.num_effective_layers,
            kv_heads=model.get_num_kv_heads(get_parallel().attn_tp_size),
            head_dim=model.head_dim,
            v_head_dim=model.v_head_dim,
        )

    def calculate_pool_sizes(self, available_bytes: int, page_size: int) -> MemoryPoolConfig:
        limit = get_schedule().max_total_tokens
        budget = available_bytes if limit is None else min(available_bytes, limit * self._shape.dense_bytes_per_token)
        layouts = [codec.layout for codec in codecs_of_server(self._config, self._shape, "cpu")]
        workspace = 0
        sizes = self._sizes(budget, layouts)
        if self._workspace_bytes is not None:
            workspace = self._workspace_bytes(layouts, self._shape, sizes, self._device)
            sizes = self._sizes(budget, layouts, workspace)
        logger.info(
            "sgl_hq: KV budget %.1f MiB = dense tier of %s%d tokens + packed tier of %s%d pages (%d tokens) in format %s + workspaces of "
            "%.1f MiB",
            budget / 2**20, self._up_to, sizes.dense_tokens, self._up_to, sizes.packed_pages, sizes.packed_pages * page_size,
            self._config.format, workspace / 2**20,
        )
        if sizes.dense_tokens < self._context_tokens:
            logger.warning(
                "sgl_hq: the dense tier holds %d tokens, less than the context length %d: a request of which more is not packed "
                "is refused. %saise the budget to serve it.",
                sizes.dense_tokens, self._context_tokens, "R" if self._config.elastic else "Lower --hq-packed-fraction or r",
            )
        return MemoryPoolConfig(max_total_num_tokens=sizes.dense_tokens)

    @property
    def _up_to(self) -> str:
        return "up to " if self._config.elastic else ""

    def _sizes(self, budget: int, layouts: list[PageLayout], workspace: int = 0) -> TierSizes:
        if not self._config.elastic:
            return split_budget(budget, self._config.packed_fraction, layouts, self._shape, workspace)
        unit = granularity(self._device)
        return slabs_of_budget(budget - workspace, layouts, self._shape, unit).sizes(layouts)
