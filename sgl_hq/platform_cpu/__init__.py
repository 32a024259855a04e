"""SGLang on a CPU: an out-of-tree platform, active only when SGLANG_PLATFORM names it.

SGLang 0.5.17 from the package index cannot serve on an x86 CPU by itself: its CPU kernels are not in the wheel and
its paged allocator is Triton. The platform supplies the allocator and attention, for vanilla and HypercubeQuant alike.
"""

from __future__ import annotations

import os

from sgl_hq.config import CPU_PLATFORM


def activate() -> str | None:
    """SGLang's entry point `sglang.srt.platforms`; None leaves SGLang's own choice of platform alone.

    A platform that answers without being asked would take over every process of a machine with a GPU.
    """
    if os.environ.get("SGLANG_PLATFORM") != CPU_PLATFORM:
        return None
    # OpenMP threads that spin for long starve SGLang's other processes on few cores, and each other: 30 layers of small
    # matrix products took 3,136 ms with the default (about 0.1 s of spinning) and 146 ms without on a busy 2-core machine.
    # Not spinning at all costs 15 % on a quiet one. The scheduler reads this when it loads OpenMP.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    return "sgl_hq.platform_cpu.platform:HQCPUPlatform"
