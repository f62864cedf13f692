"""QuantizedArray: codes with their scales, a pytree."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ._formats import FORMATS


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedArray:
    """An array as codes of 8 or 4 bits: x ~ scale * (code - zero point).

    A pytree, whose leaves are the arrays. `jax.vmap` and `jax.lax.scan` may add and remove leading axes.

    Attributes:
        values: the codes, of the array's shape: int8, int4, float8_e4m3fn, float8_e5m2 or float4_e2m1fn.
        scales: of the array's shape, but along the axis one for each block, or a single one; for a single scale of the
            whole array, all ones. float32; float8_e8m0fnu in mxfp8 and mxfp4; float8_e4m3fn in nvfp4.
        zero_points: int8 of the shape of the scales, or None for zeros.
        qtype: the name of the format.
        axis: the axis that was transformed, counted from the last: negative.
        block: how many elements of the axis share a scale, or None for all.
        tensor_scale: what the scales are in units of, a float32 array of ones in shape (nvfp4), or None for 1.
    """

    values: jax.Array
    scales: jax.Array
    zero_points: jax.Array | None = None
    qtype: str = field(default="int8", metadata={"static": True})
    axis: int = field(default=-1, metadata={"static": True})
    block: int | None = field(default=None, metadata={"static": True})
    tensor_scale: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Computes scale * (code - zero point) in float32.

        Args:
            dtype: of the result, to which it is rounded.

        Returns:
            An array of the shape of the codes. It has no gradient: see `hadamard_fake_quantize`.

        Example:
            >>> import jax.numpy as jnp
            >>> from jax_hadacore import hadamard_quantize
            >>> hadamard_quantize(jnp.array([1.0, 2.0, 3.0, 4.0]), "int8").dequantize()
            Array([ 5.      , -0.984252, -2.007874,  0.      ], dtype=float32)
        """
        codes = self.values.astype(jnp.float32)
        if self.zero_points is not None:
            codes = codes - self._for_each(self.zero_points.astype(jnp.float32))
        return (codes * self._for_each(self.float_scales())).astype(dtype)

    def to_qwix(self):
        """The same as a `qwix.QArray`, for qwix's quantised operations.

        The scales become float32, those of nvfp4 times the tensor's; zero points take the type of the codes.

        Raises:
            ImportError: qwix is not installed.
        """
        from qwix import QArray  # noqa: PLC0415  # pyright: ignore[reportMissingImports] - optional

        zero_points = None if self.zero_points is None else self.zero_points.astype(self.values.dtype)
        return QArray(self.values, self.float_scales(), zero_points, self.qtype)

    @classmethod
    def from_qwix(cls, array, *, axis: int = -1) -> "QuantizedArray":
        """A `qwix.QArray` as a QuantizedArray.

        Args:
            array: its codes are of one of the formats here; its scales are one for each block of one axis, and there
                is one for each index of all the others, or one in all.
            axis: which axis has the blocks.

        Raises:
            ValueError: it has other codes, or other scales.
        """
        qtype = array.qtype if isinstance(array.qtype, str) else jnp.dtype(array.qtype).name
        if qtype not in FORMATS or array.qvalue.dtype != FORMATS[qtype].dtype:
            raise ValueError(
                f"from_qwix: qtype must be one of {', '.join(FORMATS)}, with codes of its type; got {qtype} with "
                f"{array.qvalue.dtype.name}."
            )
        axis = axis % array.qvalue.ndim - array.qvalue.ndim
        size, count = array.qvalue.shape[axis], array.scale.shape[axis]
        others = list(array.qvalue.shape)
        others[axis] = count
        if array.scale.size != 1 and array.scale.shape != tuple(others):
            raise ValueError(
                f"from_qwix: with blocks along axis {axis}, scales must have shape {tuple(others)} or one element, "
                f"got {array.scale.shape}."
            )
        zero_points = None if array.zero_point is None else array.zero_point.astype(jnp.int8)
        block = None if count == 1 else size // count
        return cls(array.qvalue, array.scale.astype(jnp.float32), zero_points, qtype, axis, block)

    def float_scales(self) -> jax.Array:
        """The scales in float32, those of nvfp4 times the tensor's."""
        scales = self.scales.astype(jnp.float32)
        return scales if self.tensor_scale is None else scales * self.tensor_scale

    def _for_each(self, per_block: jax.Array) -> jax.Array:
        """What there is one of for each block, for each element or for one axis of all."""
        if self.block is None:
            return per_block
        return jnp.repeat(per_block, self.block, axis=self.axis, total_repeat_length=self.shape[self.axis])
