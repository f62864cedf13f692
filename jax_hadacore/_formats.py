"""The formats of quantised results: their codes, their scales, and which elements share one."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Format:
    """A type of codes, a type of scales, and how many elements share one, or None where that can be chosen."""

    name: str
    dtype: np.dtype
    scale_dtype: np.dtype
    block: int | None

    @property
    def is_integer(self) -> bool:
        return jnp.issubdtype(self.dtype, jnp.integer)

    @property
    def bits(self) -> int:
        return (jnp.iinfo if self.is_integer else jnp.finfo)(self.dtype).bits

    @property
    def largest(self) -> float:
        """The largest code; the least is its negative, but for zero points."""
        return float((jnp.iinfo if self.is_integer else jnp.finfo)(self.dtype).max)

    @property
    def largest_exponent(self) -> int:
        return math.floor(math.log2(self.largest))


FORMATS = {
    name: Format(name, np.dtype(getattr(jnp, codes)), np.dtype(getattr(jnp, scales)), block)
    for name, codes, scales, block in [
        ("float8_e4m3fn", "float8_e4m3fn", "float32", None),
        ("float8_e5m2", "float8_e5m2", "float32", None),
        ("int8", "int8", "float32", None),
        ("int4", "int4", "float32", None),
        ("mxfp8", "float8_e4m3fn", "float8_e8m0fnu", 32),
        ("mxfp4", "float4_e2m1fn", "float8_e8m0fnu", 32),
        ("nvfp4", "float4_e2m1fn", "float8_e4m3fn", 16),
    ]
}

Granularity = str | tuple[str, int] | None


@dataclass(frozen=True)
class Quantizer:
    """How the last axis of an array is quantised.

    Attributes:
        format: of the codes and scales.
        group: how many elements share a scale.
        given: whether the scale is given, one for all.
        asymmetric: whether there are zero points.
    """

    format: Format
    group: int
    given: bool = False
    asymmetric: bool = False

    @property
    def scale_type(self) -> str:
        """What the native modules call it."""
        return "given" if self.given else self.format.scale_dtype.name


def parse(qtype) -> Format:
    """The format of a name, or of the type of its codes."""
    name = qtype if isinstance(qtype, str) else getattr(np.dtype(qtype), "name", None)
    if name not in FORMATS:
        raise ValueError(f"hadamard_quantize: qtype must be one of {', '.join(FORMATS)}, got {qtype!r}.")
    return FORMATS[name]


def quantizer(format: Format, granularity: Granularity, size: int, *, asymmetric: bool) -> Quantizer:
    """What is asked for, for an axis of a size.

    Raises:
        ValueError: the format has no such granularity or no zero points, or a block does not divide the axis.
    """
    if asymmetric and (format.name != "int4" or granularity == "tensor"):
        raise ValueError(
            f"hadamard_quantize: asymmetric is for int4 with a scale per row or block, got {format.name} with "
            f"granularity {granularity!r}."
        )
    if format.block is not None and granularity not in (None, ("block", format.block)):
        raise ValueError(
            f"hadamard_quantize: {format.name} has blocks of {format.block}: leave granularity out, got "
            f"{granularity!r}."
        )
    block = format.block if granularity is None else _block(granularity)
    if block is not None and (block < 1 or size % block):
        raise ValueError(
            f"hadamard_quantize: blocks of {block} elements do not divide the axis, which has {size}. Pad it, or "
            "transform and quantise a part of it."
        )
    return Quantizer(format, size if block is None else block, granularity == "tensor", asymmetric)


def _block(granularity) -> int | None:
    match granularity:
        case "row" | "tensor":
            return None
        case ("block", int(block)) if not isinstance(block, bool):
            return block
    raise ValueError(f'hadamard_quantize: granularity must be "row", ("block", b) or "tensor", got {granularity!r}.')
