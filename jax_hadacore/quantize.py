"""The transform with its result quantised to 8 or 4 bits: fused with it where a kernel can."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from . import _quantize
from ._formats import FORMATS, Granularity
from ._quantized_array import QuantizedArray


def hadamard_quantize(
    x: ArrayLike,
    qtype: str | DTypeLike,
    *,
    granularity: Granularity = None,
    quant_scale: ArrayLike | None = None,
    tensor_scale: ArrayLike | None = None,
    asymmetric: bool = False,
    key: jax.Array | None = None,
    axis: int = -1,
    scale: float | None = None,
    block_size: int | None = None,
    signs: ArrayLike | Sequence[int] | None = None,
    matrix: ArrayLike | Sequence[Sequence[float]] | None = None,
    transpose: bool = False,
) -> QuantizedArray:
    """The Hadamard transform of one axis, quantised: w = hadamard(x, ...) in float32, and w ~ s * code.

    A group of elements shares a scale s. With amax the largest |w| of the group, `rn` rounding to the nearest, of two
    to the even one, qmax the largest code, and every operation in float32:

    | qtype | codes, qmax | group | s |
    |---|---|---|---|
    | "float8_e4m3fn", "float8_e5m2" | 448, 57344 | row, block or tensor | max(amax / qmax, 2^-126) |
    | "int8", "int4" | 127, 7 | row, block or tensor | max(amax / qmax, 2^-126) |
    | "int4", asymmetric | -8 to 7 | row or block | max((hi - lo) / 15, 2^-126) |
    | "mxfp8", "mxfp4" | float8_e4m3fn 448, float4_e2m1fn 6 | 32 | 2^(floor(log2 amax) - floor(log2 qmax)) |
    | "nvfp4" | float4_e2m1fn 6 | 16 | rn(amax / (6 t)) in float8_e4m3fn, times t |

    code = rn(w * (1 / s)), no larger than qmax; a group of zeros has s = 1. With zero points lo = min(w, 0),
    hi = max(w, 0), z = rn(-8 - lo * (1 / s)), code = rn(w * (1 / s)) + z, and w ~ s * (code - z).

    A group with an infinity or NaN is dequantised to NaN, and no other is. With a given scale only NaN itself matters:
    its code is NaN, or 0 in integers.

    Args:
        x: float16, bfloat16, float32 or float64 array, as for `hadamard`.
        qtype: the format, from the table; or the type of its codes.
        granularity: which elements share a scale: "row", all of the axis; ("block", b), b consecutive ones, where b
            divides the axis; "tensor", all, and `quant_scale` is the scale. By default the block of the format if it
            has one, else "row".
        quant_scale: the scale for "tensor", a positive number, constant or traced.
        tensor_scale: t of nvfp4, a positive number, constant or traced, by default 1; see `nvfp4_tensor_scale`.
        asymmetric: int4 with zero points.
        key: a key of `jax.random`, for stochastic rounding of 4-bit codes: up with the probability of the fraction, by
            bits that depend on the key and the index in the array alone, so they are the same on every platform.
        axis: as for `hadamard`, and so are all the others: the axis to transform and to quantise along.
        scale: a static real number.
        block_size: transform blocks of so many elements, whatever the groups.
        signs: +1 and -1.
        matrix: the slow factor of the transform.
        transpose: apply the adjoint.

    Returns:
        A `QuantizedArray` of x's shape, sharded like x along the other axes. What is fused on which platform is in
        docs/quantization.md; the result is the same, but for the order of the float32 sums of the transform.

    Raises:
        TypeError: as for `hadamard`, x is complex; and when it is differentiated: `hadamard_fake_quantize` has the
            straight-through gradient.
        ValueError: as for `hadamard`, and where qtype, granularity, asymmetric and the scales do not go together.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_hadacore import hadamard_quantize
        >>> q = hadamard_quantize(jnp.array([[1.0, 2.0, 3.0, 4.0]]), "int8")
        >>> q.values, q.scales
        (Array([[127, -25, -51,   0]], dtype=int8), Array([[0.03937008]], dtype=float32))

    Micro-scaling formats: OCP Microscaling Formats (MX) Specification 1.0 (2023); nvfp4: NVIDIA Blackwell (2024);
    rotations before quantisation: QuaRot (Ashkboos et al., 2024, arXiv:2404.00456).
    """
    arrays, request = _quantize.parsed(
        x,
        qtype,
        granularity=granularity,
        quant_scale=quant_scale,
        tensor_scale=tensor_scale,
        asymmetric=asymmetric,
        key=key,
        axis=axis,
        scale=scale,
        block_size=block_size,
        signs=signs,
        matrix=matrix,
        transpose=transpose,
    )
    return _quantize.quantize_program(*arrays, request)


def hadamard_fake_quantize(x: ArrayLike, qtype: str | DTypeLike, **options) -> jax.Array:
    """What is left of the Hadamard transform after quantisation, with the gradient of the transform.

    hadamard_quantize(x, qtype, **options).dequantize(x.dtype); its gradient is straight-through: that of
    `hadamard(x, ...)`, so the cotangent goes through the transposed transform. A `QuantizedArray` cannot have it, as
    its codes are integers or too coarse for a cotangent.

    Args:
        x: as for `hadamard_quantize`.
        qtype: as for `hadamard_quantize`.
        **options: of `hadamard_quantize`. No gradient flows into any of them.

    Returns:
        An array of x's shape and dtype.

    Raises:
        TypeError, ValueError: as `hadamard_quantize` does.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax_hadacore import hadamard, hadamard_fake_quantize
        >>> x, ct = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([1.0, 0.0, 0.0, 0.0])
        >>> y, vjp = jax.vjp(lambda x: hadamard_fake_quantize(x, "int4"), x)
        >>> y
        Array([ 5.        , -0.71428573, -2.142857  ,  0.        ], dtype=float32)
        >>> (vjp(ct)[0] == hadamard(ct)).all()
        Array(True, dtype=bool)

    The straight-through estimator is from Bengio et al. (2013, arXiv:1308.3432).
    """
    arrays, request = _quantize.parsed(x, qtype, **options)
    return _quantize.fake_quantize_program(*arrays, request)


def nvfp4_tensor_scale(w: ArrayLike) -> jax.Array:
    """The tensor scale of nvfp4 that makes the largest block's scale the largest of float8_e4m3fn: max|w| / (6 * 448).

    Args:
        w: what is quantised: `hadamard(x)`, not x.

    Returns:
        A float32 scalar, 1 for zeros.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_hadacore import hadamard, hadamard_quantize, nvfp4_tensor_scale
        >>> x = jnp.arange(16.0)
        >>> q = hadamard_quantize(x, "nvfp4", tensor_scale=nvfp4_tensor_scale(hadamard(x)))
        >>> q.scales
        Array([448], dtype=float8_e4m3fn)
    """
    format = FORMATS["nvfp4"]
    largest = jnp.max(jnp.abs(jnp.asarray(w))).astype(jnp.float32)
    scale = largest / np.float32(format.largest * float(jnp.finfo(format.scale_dtype).max))
    return jnp.where(largest == 0, np.float32(1), jnp.maximum(scale, np.float32(2**-126)))
