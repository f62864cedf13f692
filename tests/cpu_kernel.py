"""Transforms of random matrices and signs for the CPU kernel without JAX around it."""

import contextlib
import math
from typing import NamedTuple

import numpy as np
import oracle
import pytest
from cases import rng
from kernels import pack

from jax_hadacore import _ffi

CPU = _ffi.CPU.module


class Transform(NamedTuple):
    """What a call of the kernel is given; the matrices are +-1 but for `real`, which is one of other entries."""

    orders: tuple[int, ...]
    power: int
    matrices: tuple[np.ndarray, ...] = ()
    real: bool = False
    signs: np.ndarray | None = None
    signs_last: bool = False

    @property
    def n(self):
        return math.prod(self.orders) * self.power

    @property
    def scale(self):
        """About n**-0.5, but without a rounding of its own in float32."""
        return float(np.float32(self.n**-0.5))

    def run(self, x, threads=1, *, inplace=False):
        """The result, in memory that has held NaN, and where guards stand."""
        memory = np.full(x.size + 64, np.nan, x.dtype)
        y = memory[32 : 32 + x.size].reshape(x.shape)
        if inplace:
            y[:] = x
        self._run(y if inplace else x, y, threads)
        assert np.isnan(memory[:32].astype(np.float32)).all()
        assert np.isnan(memory[32 + x.size :].astype(np.float32)).all()
        return y

    def _run(self, x, y, threads):
        with self.problem(x) as problem:
            CPU.transform(problem, x.ctypes.data, y.ctypes.data, threads)

    @contextlib.contextmanager
    def problem(self, x):
        """For the kernel, of x's rows of n elements."""
        packed = [pack(matrix < 0).ravel() for matrix in self.matrices if not self.real]
        factors = np.concatenate([*packed, np.zeros(0, np.uint32)])
        values = self.matrices[0].copy() if self.real else None
        signs = None if self.signs is None else pack(self.signs < 0)
        yield CPU.Problem(
            getattr(CPU.Dtype, x.dtype.name),
            self.n,
            x.size // self.n,
            self.scale,
            list(self.orders),
            factors=factors.ctypes.data if packed else 0,
            matrix=0 if values is None else values.ctypes.data,
            signs=0 if signs is None else signs.ctypes.data,
            signs_last=self.signs_last,
        )

    def native_call(self):
        """Attributes of a call of the handler, and its operands after x: signs, if they are applied last."""
        attributes = {"scale": np.float64(self.scale), "n": np.int64(self.n), "orders": np.array(self.orders, np.int64)}
        if self.real:
            attributes["matrix"] = self.matrices[0].ravel()
        elif self.orders:
            attributes["factors"] = np.concatenate([pack(matrix < 0).ravel() for matrix in self.matrices])
        if self.signs is None:
            return attributes, []
        words = pack(self.signs < 0)
        attributes["signs_last"] = np.bool_(self.signs_last)
        return (attributes, [words]) if self.signs_last else ({**attributes, "signs": words}, [])

    def exact(self, x):
        """The transform by its definition."""
        if self.signs is not None and not self.signs_last:
            x = x * self.signs.astype(x.dtype)
        y = oracle.transform(x.reshape(-1, self.power), scale=1).reshape(x.shape) * self.scale
        for matrix, inner in zip(self.matrices, self._inner_lengths(), strict=True):
            y = np.matmul(matrix.astype(y.dtype), y.reshape(-1, len(matrix), inner)).reshape(x.shape)
        return y * self.signs if self.signs is not None and self.signs_last else y

    def _inner_lengths(self):
        return [self.n // math.prod(self.orders[: i + 1]) for i in range(len(self.orders))]


def transform(orders, power, *, signs=None, real=False):
    """Random matrices; signs 'first' or 'last'."""
    generator = rng("matrices", orders, power, signs, real)

    def draw(*shape):
        return generator.choice([-1.0, 1.0], shape)

    n = math.prod(orders) * power
    matrices = tuple(generator.standard_normal((k, k)) if real else draw(k, k) for k in orders)
    return Transform(orders, power, matrices, real, None if signs is None else draw(n), signs == "last")


FEW = [
    transform((), 8, signs="first"),
    transform((), 2**15, signs="first"),
    transform((), 2**15, signs="last"),
    transform((9,), 1, signs="last"),
    transform((12,), 1, signs="first"),
    transform((28,), 1024, signs="first"),
    transform((344,), 32, signs="last"),
    transform((344,), 64, signs="last"),
    transform((36, 76), 4, signs="first"),
    transform((44, 84), 8, signs="last"),
    transform((12,), 4, real=True, signs="first"),
    transform((300,), 64, real=True),
]


def over(*choice):
    """Parametrises a test over transforms."""
    return pytest.mark.parametrize(
        "t",
        choice,
        ids=lambda t: (
            f"{'x'.join(map(str, (*t.orders, t.power)))}{'-last' if t.signs_last else ''}{'-real' if t.real else ''}"
        ),
    )


few = over(*FEW)
