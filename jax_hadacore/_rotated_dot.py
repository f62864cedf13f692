"""rotated_dot_general: a product of matrices that are rotated and quantised along the contracted axis."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from . import _quantize, _transform
from ._formats import Granularity
from ._quantized_array import QuantizedArray

Operand = jax.Array | QuantizedArray


def rotated_dot_general(
    lhs: ArrayLike | QuantizedArray,
    rhs: ArrayLike | QuantizedArray,
    dimension_numbers,
    precision=None,
    preferred_element_type: DTypeLike | None = None,
    *,
    out_sharding=None,
    qtype: str | DTypeLike = "float8_e4m3fn",
    granularity: Granularity = None,
    block_size: int | None = None,
    signs: ArrayLike | Sequence[int] | None = None,
    matrix: ArrayLike | Sequence[Sequence[float]] | None = None,
) -> jax.Array:
    """jax.lax.dot_general in 8 or 4 bits: both operands are rotated and quantised along the contracted axis.

    The same rotation H on both sides leaves a product as it is, (x H^T) (H w) = x w, and quantisation errs less on what
    is rotated. With a scale per row, codes of float8 and int8 are multiplied by XLA's own products, summed in float32
    or int32 and then scaled; on a device without such products XLA converts the codes first. Others are dequantised
    first. The gradient is straight-through, that of

        jax.lax.dot_general(hadamard_fake_quantize(lhs, qtype, ...), hadamard_fake_quantize(rhs, qtype, ...), ...)

    Args:
        lhs: an array as for `hadamard_quantize`; or a `QuantizedArray` of the same rotation and format, quantised along
            the contracted axis: weights that are quantised once, to which no gradient flows.
        rhs: the same. float8 products are fastest where both operands contract over their last axis.
        dimension_numbers: as for `jax.lax.dot_general`, with one contracted axis, of a length that `is_supported`.
        precision: of products that are not of codes: of dequantised operands, and in the gradient.
        preferred_element_type: the dtype of the result, by default that of the array operands.
        out_sharding: as for `jax.lax.dot_general`.
        qtype: the format, as for `hadamard_quantize`.
        granularity: "row" or ("block", b), as for `hadamard_quantize`.
        block_size: rotate blocks of so many elements, as for `hadamard`.
        signs: as for `hadamard`.
        matrix: as for `hadamard`.

    Returns:
        An array of the shape of jax.lax.dot_general(lhs, rhs, dimension_numbers).

    Raises:
        TypeError, ValueError: as `hadamard_quantize` does; there is not one contracted axis; or a `QuantizedArray` is
            quantised along another.

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> from jax_hadacore import rotated_dot_general
        >>> x, w = jax.random.normal(jax.random.key(0), (2, 16, 64))
        >>> y = rotated_dot_general(x, w, (((1,), (1,)), ((), ())), qtype="int8")
        >>> float(jnp.max(jnp.abs(y - x @ w.T))) < 0.02 * 64
        True

    In Flax: nnx.Linear(..., dot_general=rotated_dot_general), or functools.partial(rotated_dot_general, qtype="int8").

    Rotated products in few bits are those of QuaRot (Ashkboos et al., 2024, arXiv:2404.00456).
    """
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = dimension_numbers
    arrays = [operand for operand in (lhs, rhs) if not isinstance(operand, QuantizedArray)]
    if not arrays:
        raise TypeError("rotated_dot_general: one operand must be an array, got two QuantizedArrays.")
    dtype = jnp.result_type(*arrays) if preferred_element_type is None else jnp.dtype(preferred_element_type)
    arguments, request = _quantize.parsed(
        arrays[0], qtype, granularity=granularity, block_size=block_size, signs=signs, matrix=matrix
    )
    product = _Product(len(lhs_batch), dtype, precision, out_sharding)
    lhs = _contracted_last(lhs, lhs_contracted, lhs_batch)
    rhs = _contracted_last(rhs, rhs_contracted, rhs_batch)
    return _rotated_program(lhs, rhs, arguments.negative, request, product)


class _Product(NamedTuple):
    """A product over the last axes, with so many leading axes in common."""

    batch: int
    dtype: np.dtype
    precision: jax.lax.PrecisionLike
    out_sharding: object

    def __call__(self, lhs: jax.Array, rhs: jax.Array, dtype=None) -> jax.Array:
        batch = tuple(range(self.batch))
        return jax.lax.dot_general(
            lhs,
            rhs,
            (((lhs.ndim - 1,), (rhs.ndim - 1,)), (batch, batch)),
            precision=self.precision,
            preferred_element_type=dtype or self.dtype,
            **({} if self.out_sharding is None else {"out_sharding": self.out_sharding}),
        )


def _contracted_last(operand, contracted, batch) -> Operand:
    """The operand with the axes of the batch first and the contracted one last."""
    if len(contracted) != 1:
        raise ValueError(f"rotated_dot_general: one axis must be contracted, got {tuple(contracted)}.")
    quantized = isinstance(operand, QuantizedArray)
    ndim = operand.ndim if quantized else jnp.ndim(operand)
    axis, *batch = (axis % ndim for axis in (*contracted, *batch))
    if quantized and operand.axis % ndim != axis:
        raise ValueError(
            f"rotated_dot_general: a QuantizedArray must be quantised along the contracted axis {axis}, got one along "
            f"axis {operand.axis % ndim}."
        )
    order = (*batch, *(i for i in range(ndim) if i != axis and i not in batch), axis)
    moved = jax.tree.map(lambda array: jnp.transpose(array, order), operand)
    return dataclasses.replace(moved, axis=-1) if quantized else moved


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _rotated(lhs: Operand, rhs: Operand, negative, request: _quantize.Request, product: _Product) -> jax.Array:
    left, right = (_quantized(operand, negative, request) for operand in (lhs, rhs))
    if request.format.bits == 8 and left.block is None and right.block is None:
        codes, others, exact = left.values, right.values, jnp.float32
        if request.format.is_integer:
            # XLA tries kernels on random numbers, which are all 0 to a product that includes the conversion to int8: it
            # would not see the wrong results of some (Triton's with 16 contracted elements at a time are doubled).
            (codes, others), exact = jax.lax.optimization_barrier((codes, others)), jnp.int32
        sums = product(codes, others, exact).astype(jnp.float32)
        free = left.ndim - product.batch - 1, right.ndim - product.batch - 1
        scales = _expanded(left.float_scales(), -1, free[1]) * _expanded(right.float_scales(), product.batch, free[0])
        return (sums * scales).astype(product.dtype)
    return product(left.dequantize(product.dtype), right.dequantize(product.dtype))


@functools.partial(_rotated.defjvp, symbolic_zeros=True)
def _rotated_jvp(request, product, primals, tangents):
    lhs, rhs, negative = primals
    rotate = functools.partial(_transform.apply, negative=negative, options=request.options)

    def constant(operand):
        return _quantized(operand, negative, request).dequantize(product.dtype)

    terms = []
    if _is_perturbed(tangents[0]):
        terms.append(product(rotate(tangents[0]).astype(product.dtype), constant(rhs)))
    if _is_perturbed(tangents[1]):
        terms.append(product(constant(lhs), rotate(tangents[1]).astype(product.dtype)))
    result = _rotated(lhs, rhs, negative, request, product)
    return result, functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(result)


def _is_perturbed(tangent) -> bool:
    return isinstance(tangent, jax.Array)


def _quantized(operand: Operand, negative, request: _quantize.Request) -> QuantizedArray:
    if not isinstance(operand, QuantizedArray):
        return _quantize.quantize(operand, negative, None, None, request)
    if operand.qtype != request.format.name:
        raise ValueError(
            f"rotated_dot_general: a QuantizedArray must be of the format {request.format.name}, got {operand.qtype}."
        )
    return operand


def _expanded(scales: jax.Array, axis: int, count: int) -> jax.Array:
    """Scales without their last axis, with `count` axes of one element at `axis`."""
    scales = scales.squeeze(-1)
    start = axis % (scales.ndim + 1)
    return jnp.expand_dims(scales, tuple(range(start, start + count)))


_rotated_program = jax.jit(_rotated, static_argnums=(3, 4), inline=True)
