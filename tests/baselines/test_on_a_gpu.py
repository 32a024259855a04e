"""Reference formats leave nothing on the CPU when K and V are on a GPU: `sgl-hq gate` and `frontier` take --device cuda.

PyTorch's fake tensors carry a device without having it, and refuse to mix devices as real ones do. What they compute with is
looked at by `tests/gpu/test_lab_gpu.py`.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sgl_hq.baselines import BASELINES


class AllFinite(TorchDispatchMode):
    """Fake values cannot be asked. The formats ask `x.isfinite().all()` and `x.isinf().any()`: yes, and no."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func in (aten.all.default, aten.any.default):
            self.answer = func is aten.all.default
        return self.answer if func is aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_a_prefix_on_a_gpu_is_packed_and_unpacked_there(random_prefix, name):
    codec, k = BASELINES[name](), random_prefix("random")
    codec.unpack(0, codec.pack(0, k, k))  # tables that are made once are made of real numbers
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, AllFinite():
        k = fake.from_tensor(k).to("cuda")
        packed = codec.pack(0, k, k)
        sides = codec.unpack(0, packed)
    assert {t.device.type for t in (*packed.tensors, *sides)} == {"cuda"}
    assert [side.shape for side in sides] == [(2, 128, 64)] * 2
