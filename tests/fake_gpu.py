"""A GPU for tests of the benchmark: its memory is the host's, its kernel the oracle."""

import ctypes
import math
from types import SimpleNamespace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from kernels import pack
from oracle import decompose, paley, transform

from jax_hadacore import _ffi


class Dtype:
    """Stands for the native modules' enumeration."""

    float16, bfloat16, float32, float64 = "float16", "bfloat16", "float32", "float64"


def problem(dtype, n, rows, scale=1.0, *, orders=(), factors=0, stride=1):
    """Stands for the native modules' Problem."""
    return SimpleNamespace(dtype=dtype, n=n, rows=rows, scale=scale, orders=orders, factors=factors, stride=stride)


class Code:
    """Stands for that of codes."""

    int8, int4, float8_e4m3fn, float4_e2m1fn = "int8", "int4", "float8_e4m3fn", "float4_e2m1fn"


class Scale:
    """Stands for that of scales."""

    float32, float8_e8m0fnu, float8_e4m3fn, given = "float32", "float8_e8m0fnu", "float8_e4m3fn", "given"


class Quantization(NamedTuple):
    """Stands for the native modules' Quantization."""

    code: str
    scale: str
    group: int
    asymmetric: bool = False
    given: int = 0


class QuantizedBuffers(NamedTuple):
    """Stands for that of the addresses of results."""

    codes: int
    scales: int = 0
    zero_points: int = 0


def install(monkeypatch):
    """Puts it in the place of the CUDA module; returns a list of what its timings are asked for."""
    calls = []

    def run(problem, x, y, workspace):
        del workspace
        _check_factors(problem)
        x, y = (_array(address, (problem.rows, problem.n), getattr(jnp, problem.dtype)) for address in (x, y))
        y[:] = transform(x, problem.scale).astype(y.dtype)

    def measure(problem, x, y, workspace, *plan):
        calls.append((x == y, *plan))
        if problem.stride == 1:
            run(problem, x, y, workspace)
        *_, replays = plan
        return {"transform": [0.004] * replays, "copy kernel": [0.003] * replays, "cudaMemcpyAsync": [0.002] * replays}

    def measure_codes(problem, quantization, x, results, *plan):
        calls.append((problem, quantization, x, results, *plan))
        *_, replays = plan
        return {"transform": [0.004] * replays, "one vector": [0.003] * replays, "two vectors": [0.002] * replays}

    native = SimpleNamespace(
        Dtype=Dtype,
        Problem=problem,
        Code=Code,
        Scale=Scale,
        Quantization=Quantization,
        QuantizedBuffers=QuantizedBuffers,
        measure=measure,
        takes_stride=lambda problem: problem.stride == 1 or problem.n <= 256,
        measure_codes=measure_codes,
        transform=run,
        toolkit=13000,
    )
    monkeypatch.setattr(_ffi, "CUDA", _ffi.NativeModule(native))
    return calls


def _check_factors(problem):
    *orders, _ = decompose(problem.n)
    assert list(problem.orders) == orders
    words = [pack(paley(k) < 0).ravel() for k in orders]
    expected = np.concatenate([np.zeros(0, np.uint32), *words])
    if orders:
        np.testing.assert_array_equal(_array(problem.factors, expected.shape, np.uint32), expected)


def _array(address, shape, dtype):
    """The memory at an address."""
    dtype = np.dtype(dtype)
    buffer = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return np.frombuffer(buffer, dtype).reshape(shape)
