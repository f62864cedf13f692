"""The quantiser by its definition, in float32 operations of NumPy and casts of ml_dtypes; no code of the library."""

from typing import NamedTuple

import ml_dtypes
import numpy as np

LARGEST = {"int8": 127, "int4": 7, "float8_e4m3fn": 448, "float8_e5m2": 57344, "float4_e2m1fn": 6}
LEAST_SCALE = np.float32(2.0**-126)
ONE = np.float32(1)


class Format(NamedTuple):
    """Codes, and the type of their scales."""

    code: str
    scale: str = "float32"
    asymmetric: bool = False

    @property
    def bits(self):
        return 4 if self.code in {"int4", "float4_e2m1fn"} else 8

    @property
    def dtype(self):
        """That of the codes, before two are packed to a byte."""
        return np.dtype(getattr(ml_dtypes, self.code, self.code))

    @property
    def scale_dtype(self):
        return None if self.scale == "given" else np.dtype(getattr(ml_dtypes, self.scale, self.scale))


def quantize(w, form, group, given=None):
    """The codes of float32 values in w's shape, scales and zero points of groups along the last axis, or None."""
    groups = w.reshape(*w.shape[:-1], -1, group)
    with np.errstate(all="ignore"):
        if form.asymmetric:
            codes, scales, zeros = _asymmetric(groups)
            return codes.reshape(w.shape), scales, zeros
        scales, inverse = _scales(np.abs(groups).max(-1), form, None if given is None else np.float32(given))
        return _codes(groups * inverse[..., None], form).reshape(w.shape), scales, None


def packed(codes):
    """Bytes: of 4-bit codes two, the first in the low half."""
    bytes_ = codes.view(np.uint8)
    if codes.dtype not in (ml_dtypes.int4, ml_dtypes.float4_e2m1fn):
        return bytes_
    return bytes_[..., 0::2] & 15 | bytes_[..., 1::2] << 4


def _codes(products, form):
    limited = np.clip(products, -LARGEST[form.code], LARGEST[form.code])
    if form.code in {"int8", "int4"}:
        limited = np.rint(np.where(np.isnan(products), 0, limited))
    elif form.code == "float4_e2m1fn":
        limited = np.where(np.isnan(products), 0, limited)
    return limited.astype(form.dtype)


def _scales(amax, form, given):
    largest = np.float32(LARGEST[form.code])
    finite, zero = np.isfinite(amax), amax == 0
    if form.scale == "given":
        return None, np.broadcast_to(ONE / given, amax.shape)
    if form.scale == "float32":
        scales = np.where(zero, ONE, np.maximum(amax / largest, LEAST_SCALE))
        return scales, ONE / scales
    if form.scale == "float8_e8m0fnu":
        magnitude = np.where(finite & ~zero, amax, ONE)
        exponent = np.where(magnitude < LEAST_SCALE, -127, np.frexp(magnitude)[1] - 1) - np.frexp(largest)[1] + 1
        exponent = np.where(zero, 0, np.clip(exponent, -127, 127))
        scales = np.where(finite, exponent + 127, 255).astype(np.uint8).view(form.scale_dtype)
        return scales, np.where(finite, np.ldexp(ONE, -exponent), np.float32(np.nan))
    tensor = ONE if given is None else given
    scales = np.minimum(amax / (largest * tensor), np.float32(448)).astype(form.scale_dtype).astype(np.float32)
    scales = np.where(zero, ONE, np.where(scales == 0, np.float32(2.0**-9), scales))
    scales = np.where(finite, scales, np.float32(np.nan))
    return scales.astype(form.scale_dtype), ONE / (scales * tensor)


def _asymmetric(groups):
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scales = np.where(low == high, ONE, np.maximum((high - low) / np.float32(15), LEAST_SCALE))
    inverse, finite = ONE / scales, np.isfinite(scales)
    zeros = np.where(finite, np.rint(np.float32(-8) - low * inverse), 0)
    codes = np.clip(np.rint(groups * inverse[..., None]) + zeros[..., None], -8, 7)
    return np.where(finite[..., None], codes, 0).astype(ml_dtypes.int4), scales, zeros.astype(np.int8)
