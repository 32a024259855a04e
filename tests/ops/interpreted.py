"""Triton's interpreter in a process of its own: it cannot be switched off again."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def checks_of(module: str) -> Iterator[Callable]:
    """Calls functions of a module of checks by name, in the interpreting process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=start) as process:
        yield lambda check, *args, **options: process.submit(_run, module, check, args, options).result()
    assert "TRITON_INTERPRET" not in os.environ


def start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_as_hardware_does(values, source, target, mode):
        """Triton 3.6's interpreter rounds to bfloat16 half up, loses the carry, and loses subnormals both ways."""
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(values.astype(numpy.float32)).bfloat16().view(torch.int16)
            return rounded.numpy().view(numpy.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return values.view(numpy.uint16).astype(numpy.uint32) << 16
        return convert(values, source, target, mode)

    def fused(self, x, y, z):
        """One rounding, as in hardware: float64 holds the product of two float32 exactly, and the sum to 53 bits."""
        exact = x.data.astype(numpy.float64) * y.data.astype(numpy.float64) + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    interpreter._convert_float = convert_as_hardware_does
    interpreter.InterpreterBuilder.create_fma = fused


def _run(module: str, check: str, args: tuple, options: dict) -> None:
    getattr(importlib.import_module(module), check)(*args, **options)
