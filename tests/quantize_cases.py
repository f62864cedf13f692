"""What the tests of quantisation run over: formats, granularities, scales, and groups that are hard to round."""

from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
import quantize_oracle
from cases import rng
from quantize_oracle import LARGEST, Format

F32 = np.float32
# The formats of hadamard_quantize, and the blocks of those that have some of their own.
FORMATS = {
    "float8_e4m3fn": (Format("float8_e4m3fn"), None),
    "float8_e5m2": (Format("float8_e5m2"), None),
    "int8": (Format("int8"), None),
    "int4": (Format("int4"), None),
    "mxfp8": (Format("float8_e4m3fn", "float8_e8m0fnu"), 32),
    "mxfp4": (Format("float4_e2m1fn", "float8_e8m0fnu"), 32),
    "nvfp4": (Format("float4_e2m1fn", "float8_e4m3fn"), 16),
}


class Quantized(NamedTuple):
    """What the oracle says: in float32 codes, zero points, and what each element is in units of; the stored scales."""

    codes: np.ndarray
    scales: np.ndarray | None
    zero_points: np.ndarray | None
    units: np.ndarray
    zeros: np.ndarray

    def dequantized(self, codes):
        with np.errstate(invalid="ignore", over="ignore"):
            return (codes - self.zeros) * self.units

    @property
    def values(self):
        return self.dequantized(self.codes)


class Case(NamedTuple):
    """A format with what goes with it."""

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
    def form(self):
        form, _ = FORMATS[self.qtype]
        scale = form.scale if self.given is None or self.qtype == "nvfp4" else "given"
        return form._replace(asymmetric=self.asymmetric, scale=scale)

    @property
    def bits(self):
        return self.form.bits

    @property
    def largest(self):
        return LARGEST[self.form.code]

    @property
    def numbers(self):
        """Every number that codes can be, in order."""
        if self.form.code == "int8":
            return np.arange(-127.0, 128)
        if self.form.code == "int4":
            return np.arange(-8.0 if self.asymmetric else -7.0, 8)
        return numbers(self.form.dtype)

    def oracle(self, w):
        group = FORMATS[self.qtype][1] or self.block or w.shape[-1]
        codes, scales, zero_points = quantize_oracle.quantize(w, self.form, group, self.given)
        codes, zero_points = (None if array is None else array.astype(F32) for array in (codes, zero_points))
        units = np.ones(w.shape, F32) if scales is None else np.repeat(scales.astype(F32), group, axis=-1)
        if self.given is not None:
            units = units * F32(self.given)
        zeros = np.zeros(w.shape, F32) if zero_points is None else np.repeat(zero_points, group, axis=-1)
        return Quantized(codes, scales, zero_points, units, zeros)


def numbers(dtype):
    """Every finite number of a floating type of 8 or 4 bits, in order."""
    values = np.arange(16 if dtype == ml_dtypes.float4_e2m1fn else 256).astype(np.uint8).view(dtype).astype(float)
    return np.unique(values[np.isfinite(values)])


CHOOSABLE = tuple(qtype for qtype, (_, block) in FORMATS.items() if block is None)
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


def assert_agrees(result, expected):
    """Compares a QuantizedArray, or the arrays of one, with the oracle's: every number, NaN with NaN."""
    values, scales, zero_points = result
    np.testing.assert_array_equal(np.asarray(values).astype(F32), expected.codes)
    if expected.scales is not None:
        assert np.asarray(scales).dtype == expected.scales.dtype
        np.testing.assert_array_equal(np.asarray(scales).astype(F32), expected.scales.astype(F32))
    if expected.zero_points is not None:
        np.testing.assert_array_equal(np.asarray(zero_points).astype(F32), expected.zero_points)


def ties(case):
    """Groups of 32 with a scale of 1 whose elements are on, between, and next to what is between two codes."""
    grid, largest = case.numbers, case.largest
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
    grid = numbers(ml_dtypes.float8_e4m3fn)
    grid = grid[grid >= 0]
    amax = np.concatenate([6 * grid, 3 * (grid[1:] + grid[:-1]), [2.0**-30, 2.0**-12, 1e5, 1e30]]).astype(F32)
    w = np.linspace(-1, 1, 16, dtype=F32) * amax[:, None]
    return w[: len(w) // 2 * 2].reshape(-1, 32)
