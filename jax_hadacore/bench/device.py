"""Device time of the kernels beside copies of the same bytes, by the native modules' own timing entry points."""

import functools
import statistics
from collections.abc import Generator, Iterable, Sequence
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np

from .. import _ffi
from .._measure import definition, error_in_roundings
from .._orders import order_matrix, orders
from .._signs import pack
from .._transform import hadamard
from .grid import Case, Replays

_LINE = 64  # bytes


def rows(platform: str, cases: Iterable[Case], *, inplace: bool) -> Generator[dict]:
    """Times each case; the cases of a dtype, in sequence, share their buffers."""
    timer = {"gpu": _Gpu, "cpu": _Cpu}[platform]
    for dtype, group in groupby(cases, key=lambda case: case.dtype):
        same = list(group)
        timed = timer(dtype, same, inplace=inplace)
        yield from map(timed.row, same)
        del timed  # frees its buffers before the next are made


class _Gpu:
    """Graphs of transforms and of copies, replayed in turn."""

    def __init__(self, dtype: np.dtype, cases: Sequence[Case], *, inplace: bool) -> None:
        size = max(case.elements * Replays.of(case).sets for case in cases)
        self._x = jax.random.normal(jax.random.key(0), (size,), dtype)
        self._y = self._x if inplace else jnp.ones_like(self._x)
        self._workspace = jnp.zeros(max(case.elements for case in cases), jnp.float32)
        self._inplace = inplace
        self._native = native("cuda")
        jax.block_until_ready((self._x, self._y, self._workspace))  # the library's stream does not wait for JAX's

    def row(self, case: Case) -> dict:
        """Medians in microseconds, the ratio of the best copy to the transform, and the error."""
        plan = Replays.of(case)
        buffers = [buffer.unsafe_buffer_pointer() for buffer in (self._x, self._y, self._workspace)]
        asked = problem(self._native, case)
        times = self._native.measure(asked, *buffers, plan.sets, plan.launches, plan.replays)
        if self._inplace:
            del times["cudaMemcpyAsync"]  # undefined from a buffer to itself
        before = self._last(self._x, case)
        self._native.transform(asked, *buffers)
        error = error_in_roundings(self._last(self._y, case), definition(before))
        return {
            **case.row(cold=plan.cold),
            "inplace": self._inplace,
            "sets": plan.sets,
            **summary(times),
            "error": error,
        }

    def _last(self, buffer: jax.Array, case: Case) -> np.ndarray:
        return np.asarray(_slice(buffer, case.elements - case.checked, case.checked)).reshape(-1, case.n)


class _Cpu:
    """Calls of the kernel and of memcpy by one thread, on the same buffers every time."""

    def __init__(self, dtype: np.dtype, cases: Sequence[Case], *, inplace: bool) -> None:
        elements = max(case.elements for case in cases)
        some = np.random.default_rng(0).standard_normal(min(elements, 1 << 20)).astype(dtype)
        self._x = _aligned(elements, dtype)
        self._x[:] = np.resize(some, elements)
        self._y = self._x if inplace else _aligned(elements, dtype)
        self._inplace = inplace
        self._native = native("cpu")

    def row(self, case: Case) -> dict:
        """Medians in microseconds, the ratio of memcpy to the transform, and the error."""
        asked = problem(self._native, case)
        repetitions = max(5, min(100, (1 << 27) // case.elements))
        sample = self._x[: case.checked].reshape(-1, case.n).copy()
        addresses = [buffer.ctypes.data for buffer in (self._x, self._y)]
        times = self._native.measure(asked, *addresses, threads=1, repetitions=repetitions)
        error = error_in_roundings(np.asarray(hadamard(sample)), definition(sample))
        return {
            **case.row(cold=case.exceeds_caches),
            "inplace": self._inplace,
            "threads": 1,
            **summary(times),
            "error": error,
        }


def _aligned(elements: int, dtype: np.dtype) -> np.ndarray:
    """A written array on a cache line's boundary, as XLA's are: from elsewhere a copy may take 20 times as long."""
    memory = np.ones(elements * dtype.itemsize + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + elements * dtype.itemsize].view(dtype)


def native(platform: str):
    """The module of the kernels of a platform."""
    module = {"cuda": _ffi.CUDA, "cpu": _ffi.CPU}[platform].module
    assert module is not None, f"the caller has to ask _ffi.problem({platform!r}) first"
    return module


def problem(native, case: Case):
    """What a native module is asked for: the orthonormal transform of the rows of a case."""
    dtype, rows, factors = getattr(native.Dtype, case.dtype.name), case.elements // case.n, orders(case.n)
    if not factors:
        return native.Problem(dtype, case.n, rows, case.n**-0.5)
    words = _factor_words(factors)
    return native.Problem(dtype, case.n, rows, case.n**-0.5, orders=factors, factors=words.ctypes.data)


@functools.cache  # which keeps them: a problem knows their address only
def _factor_words(orders: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([pack(order_matrix(k) < 0).ravel() for k in orders])


def summary(times: dict[str, list[float]]) -> dict:
    """Medians of milliseconds, in microseconds, and the time of the fastest other / that of the transform."""
    micros = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    roof = min(value for name, value in micros.items() if name != "transform")
    return {"microseconds": micros, "ratio": roof / micros["transform"]}


@functools.partial(jax.jit, static_argnums=2)
def _slice(x, start, size):
    return jax.lax.dynamic_slice_in_dim(x, start, size)
