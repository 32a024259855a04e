"""The platform class SGLang asks for its CPU parts (sglang/srt/platforms/interface.py)."""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class HQCPUPlatform(CpuDeviceMixin, SRTPlatform):
    """`_enum` must be OOT: SGLang's own CPU platform expects kernels that the wheel does not have."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def init_backend(self) -> None:
        """Put our attention behind the name `torch_native`.

        The name decides more than the class: with any other one SGLang writes `req_to_token` with Triton
        (`utils/common.py` support_triton).
        """
        from sglang.srt.layers.attention.attention_registry import register_attention_backend

        @register_attention_backend("torch_native")
        def create(runner):
            from sgl_hq.platform_cpu.attention import CPUAttnBackend

            return CPUAttnBackend(runner)

    def apply_server_args_defaults(self, server_args) -> None:
        """An idle scheduler polls at full speed; on a CPU it would take a core from the model."""
        server_args.sleep_on_idle = True

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        from sgl_hq.platform_cpu.allocator import CPUPagedAllocator

        return CPUPagedAllocator

    def get_dispatch_key_name(self) -> str:
        return "native"
