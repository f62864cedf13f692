"""The quantiser by its definition in NumPy and ml_dtypes, sharing no code with the library."""

from typing import NamedTuple

import ml_dtypes
import numpy as np

F32 = np.float32
TINY = F32(2.0**-126)
E4M3, E5M2, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu
E2M1 = ml_dtypes.float4_e2m1fn

# qtype: dtype of the codes, largest code, block of the format.
FORMATS = {
    "float8_e4m3fn": (E4M3, 448, None),
    "float8_e5m2": (E5M2, 57344, None),
    "int8": (np.int8, 127, None),
    "int4": (ml_dtypes.int4, 7, None),
    "mxfp8": (E4M3, 448, 32),
    "mxfp4": (E2M1, 6, 32),
    "nvfp4": (E2M1, 6, 16),
}
# Every number that is no NaN, of each floating type of codes and scales.
GRIDS = {
    dtype: np.unique(values[np.isfinite(values)])
    for dtype in (E4M3, E5M2, E2M1)
    for values in [np.arange(16 if dtype == E2M1 else 256).astype(np.uint8).view(dtype).astype(np.float64)]
}


class Quantized(NamedTuple):
    """Codes and zero points as float32; what is multiplied with them, (..., groups, 1), as float32; stored scales."""

    codes: np.ndarray
    scales: np.ndarray | None
    zero_points: np.ndarray | None
    factors: np.ndarray

    @property
    def values(self):
        zero = 0 if self.zero_points is None else self.zero_points[..., None]
        block = self.codes.shape[-1] // self.factors.shape[-2]
        groups = self.codes.reshape(*self.factors.shape[:-1], block)
        with np.errstate(invalid="ignore", over="ignore"):
            return ((groups - zero) * self.factors).reshape(self.codes.shape)


def to_grid(v, dtype):
    """The nearest number of a type, by comparison with all of them; of two, the one whose bits are even; saturating."""
    grid = GRIDS[dtype]
    v = np.asarray(v, np.float64)
    upper = np.clip(np.searchsorted(grid, v), 1, len(grid) - 1)
    low, high = grid[upper - 1], grid[upper]
    v = np.clip(v, grid[0], grid[-1])
    is_even = np.abs(high).astype(dtype).view(np.uint8) % 2 == 0
    nearer_high = (high - v < v - low) | ((high - v == v - low) & is_even)
    result = np.where(nearer_high, high, low)
    return np.where(np.isnan(v), np.nan, result).astype(F32)


def quantize(w, qtype, *, block=None, given=None, asymmetric=False):
    """Quantises float32 w along its last axis, each operation rounded to float32."""
    dtype, largest, own_block = FORMATS[qtype]
    block = own_block or block or w.shape[-1]
    assert w.dtype == F32
    g = w.reshape(*w.shape[:-1], w.shape[-1] // block, block)
    with np.errstate(all="ignore"):
        if asymmetric:
            return _asymmetric(g, w.shape)
        amax = np.max(np.abs(g), axis=-1, keepdims=True)  # NumPy's maximum propagates NaN
        stored, factor, inverse = _scales(amax, qtype, F32(largest), given)
        v = g * inverse
        assert v.dtype == F32
        if dtype in GRIDS:
            codes = to_grid(v, dtype)
            codes = np.where(np.isnan(codes), F32(0), codes) if dtype == E2M1 else codes
        else:
            codes = np.where(np.isnan(v), F32(0), np.rint(np.clip(v, -F32(largest), F32(largest))))
    scales = None if stored is None else stored[..., 0]
    return Quantized(codes.reshape(w.shape).astype(F32), scales, None, factor)


def _scales(amax, qtype, largest, given):
    """The stored scales, what codes are multiplied by, and what elements are."""
    if qtype in ("mxfp8", "mxfp4"):
        _, exponent = np.frexp(amax)
        e = np.where(amax < TINY, -127, exponent - 1) - (8 if qtype == "mxfp8" else 2)
        e = np.where(amax == 0, 0, np.clip(e, -127, 127))
        finite = np.isfinite(amax)
        stored = np.where(finite, e + 127, 255).astype(np.uint8).view(E8M0)
        factor = np.where(finite, np.ldexp(F32(1), e), F32(np.nan))
        return stored, factor, np.where(finite, np.ldexp(F32(1), -e), F32(np.nan))
    if qtype == "nvfp4":
        t = F32(1) if given is None else F32(given)
        stored = to_grid(np.clip(amax / (F32(6) * t), 0, F32(448)), E4M3)
        stored = np.where((stored == 0) & (amax > 0), F32(2.0**-9), stored)
        stored = np.where(amax == 0, F32(1), np.where(np.isfinite(amax), stored, F32(np.nan)))
        factor = stored * t
        return stored.astype(E4M3), factor, F32(1) / factor
    if given is not None:
        factor = np.full_like(amax, F32(given))
        return None, factor, F32(1) / factor
    scale = np.where(amax == 0, F32(1), np.maximum(amax / largest, TINY))
    return scale, scale, F32(1) / scale


def _asymmetric(g, shape):
    low = np.minimum(np.min(g, axis=-1, keepdims=True), F32(0))
    high = np.maximum(np.max(g, axis=-1, keepdims=True), F32(0))
    scale = np.where(high == low, F32(1), np.maximum((high - low) / F32(15), TINY))
    inverse = F32(1) / scale
    finite = np.isfinite(scale)
    zero = np.where(finite, np.rint(F32(-8) - low * inverse), F32(0))
    codes = np.where(finite, np.clip(np.rint(g * inverse) + zero, -8, 7), F32(0))
    return Quantized(codes.reshape(shape).astype(F32), scale[..., 0], zero[..., 0].astype(F32), scale)
