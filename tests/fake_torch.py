"""Packages that do what the benchmark asks of PyTorch and of its peers, on the host."""

import contextlib
import sys

_TORCH = """
import contextlib
import numpy as np
import ml_dtypes

float16, bfloat16, float32 = np.float16, ml_dtypes.bfloat16, np.float32

class Tensor(np.ndarray):
    def float(self):
        return self.astype(np.float32)

    def cpu(self):
        return self

def randn(shape, dtype, device):
    assert device == "cuda"
    return np.random.default_rng(0).standard_normal(shape).astype(dtype).view(Tensor)

class Event:
    def __init__(self, enable_timing):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, stop):
        return 4.5

class CUDAGraph:
    def replay(self):
        pass

class cuda:
    Event, CUDAGraph, graph = Event, CUDAGraph, contextlib.nullcontext

    def synchronize():
        pass

    empty_cache = synchronize
"""
_PEER = """
calls = []

def hadamard_transform(x, scale=None):
    n = x.shape[-1]
    calls.append((x.shape, scale))
    matrix = [[(-1) ** (i & j).bit_count() * n**-0.5 for j in range(n)] for i in range(n)]
    return (x.astype("f4") @ matrix).astype(x.dtype).view(type(x))
"""


@contextlib.contextmanager
def installed(monkeypatch, folder):
    """Importable from a folder."""
    names = {"torch": _TORCH, "fast_hadamard_transform": _PEER, "faster_hadamard_transform": _PEER}
    for name, text in names.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    yield
    for name in names:
        sys.modules.pop(name, None)
