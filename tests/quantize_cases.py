"""What the tests of quantisation run over: formats, granularities, scales, and groups that are hard to round."""

from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from cases import rng
from quantize_oracle import E4M3, FORMATS, GRIDS, quantize

F32 = np.float32


class Case(NamedTuple):
    """A format with what goes with it; `block` and `given` are what the oracle takes."""

    qtype: str
    block: int | None = None
    given: float | None = None
    asymmetric: bool = False

    @property
    def options(self):
        """The arguments of hadamard_quantize."""
        options = {"asymmetric": True} if self.asymmetric else {}
        if self.qtype == "nvfp4":
            return options if self.given is None else {"tensor_scale": self.given}
        if self.given is not None:
            return {"granularity": "tensor", "quant_scale": self.given}
        return options if self.block is None else {"granularity": ("block", self.block), **options}

    @property
    def bits(self):
        return 4 if self.qtype in {"int4", "mxfp4", "nvfp4"} else 8

    def oracle(self, w):
        return quantize(w, self.qtype, block=self.block, given=self.given, asymmetric=self.asymmetric)


CHOOSABLE = tuple(qtype for qtype, (_, _, block) in FORMATS.items() if block is None)
CASES = (
    *(Case(qtype, block) for qtype in CHOOSABLE for block in (None, 32)),
    *(Case(qtype, given=0.037) for qtype in CHOOSABLE),
    Case("int4", None, asymmetric=True),
    Case("int4", 32, asymmetric=True),
    Case("mxfp8"),
    Case("mxfp4"),
    Case("nvfp4"),
    Case("nvfp4", given=0.00037),
)


def _id(case):
    return "-".join(str(part) for part in (case.qtype, case.block, case.given, "asymmetric" * case.asymmetric) if part)


cases = pytest.mark.parametrize("case", CASES, ids=_id)


def assert_agrees(result, expected, ndim=None):
    """Compares a QuantizedArray, or the arrays of one, with the oracle's: every number, NaN with NaN."""
    values, scales, zero_points = result
    np.testing.assert_array_equal(np.asarray(values).astype(F32), expected.codes)
    if expected.scales is not None:
        assert np.asarray(scales).dtype == expected.scales.dtype
        np.testing.assert_array_equal(np.asarray(scales).astype(F32), expected.scales.astype(F32))
    if expected.zero_points is not None:
        np.testing.assert_array_equal(np.asarray(zero_points).astype(F32), expected.zero_points)


def ties(qtype):
    """Groups of 32 with a scale of 1 whose elements are on, between, and next to what is between two codes."""
    dtype, largest, _ = FORMATS[qtype]
    grid = GRIDS[dtype] if dtype in GRIDS else np.arange(-largest, largest + 1, dtype=np.float64)
    middle = ((grid[1:] + grid[:-1]) / 2).astype(F32)
    values = np.concatenate([middle, np.nextafter(middle, F32(0)), np.nextafter(middle, F32(np.inf)), grid.astype(F32)])
    half = np.resize(values, (-(-values.size // 15), 15))
    with_largest = np.concatenate([np.full((len(half), 1), largest, F32), half], axis=-1)
    return np.concatenate([with_largest, -with_largest[:, ::-1]], axis=-1)


def hard(shape, *key):
    """Rows of all magnitudes, some of them zero, subnormal or not finite in one element."""
    generator = rng("hard", shape, *key)
    w = generator.standard_normal(shape) * 10.0 ** generator.uniform(-36, 36, (*shape[:-1], 1))
    w *= 10.0 ** generator.uniform(-3, 0, shape)
    w = w.astype(F32)
    special = (0, np.nan, np.inf, -np.inf, 1e-30, 1e38, F32(2**-126), -0.0)
    for row, value in zip(w, special, strict=False):
        row[...] = 0
        row[..., 5] = value
    for row, value in zip(w[len(special) :], special, strict=False):
        row[..., 7] = value
    return w


def scale_ties():
    """Groups of 16 whose nvfp4 scale lies between two numbers of float8_e4m3fn, on them, beyond and below them all."""
    grid = GRIDS[E4M3]
    grid = grid[grid >= 0]
    amax = np.concatenate([6 * grid, 3 * (grid[1:] + grid[:-1]), [2.0**-30, 2.0**-12, 1e5, 1e30]]).astype(F32)
    w = np.linspace(-1, 1, 16, dtype=F32) * amax[:, None]
    return w[: len(w) // 2 * 2].reshape(-1, 32)


def is_float(dtype):
    return np.dtype(dtype) in {np.dtype(t) for t in GRIDS} or np.dtype(dtype) == np.dtype(ml_dtypes.float8_e8m0fnu)
