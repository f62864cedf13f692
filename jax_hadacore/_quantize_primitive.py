"""hadamard_quantize_p: the transform of the last axis and its quantisation in one, and its rules."""

import functools
import math

import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir, xla

from . import _ffi, _primitive, _quantize_reference
from ._formats import Quantizer
from ._orders import decompose
from ._primitive import StaticArray, hadamard_p
from ._signs import pack

# Its operands are x, perhaps packed signs (uint32), and perhaps the given scale (float32), a scalar; its results codes
# in x's shape, scales unless they are given, and zero points where there are any.
hadamard_quantize_p = Primitive("hadamard_quantize")
hadamard_quantize_p.multiple_results = True
hadamard_quantize_p.def_impl(functools.partial(xla.apply_primitive, hadamard_quantize_p))


def transform_and_quantize(
    x: jax.Array,
    *,
    quantizer: Quantizer,
    scale: float,
    length: int,
    negative: np.ndarray | jax.Array | None = None,
    given: jax.Array | None = None,
    matrix: StaticArray | None = None,
    transpose: bool = False,
) -> list[jax.Array]:
    """Transforms blocks of the last axis as `_primitive.transform` does, and quantises the float32 result.

    `quantizer` and `given` are those of `_quantize_reference.quantize`, whose results these are.
    """
    words = None if negative is None else pack(negative)
    static = isinstance(words, np.ndarray)
    return hadamard_quantize_p.bind(
        x,
        *(operand for operand in (None if static else words, given) if operand is not None),
        quantizer=quantizer,
        scale=scale,
        length=length,
        signs=StaticArray.of(words) if static else None,
        matrix=matrix,
        transpose=transpose,
    )


def fuses(platform: str, x, *words, quantizer: Quantizer, length: int, signs, matrix, **_) -> bool:
    """Whether a kernel transforms and quantises in one pass; else XLA quantises what the transform's kernel returns."""
    size, group = x.shape[-1], quantizer.group
    if x.dtype == np.float64:
        return False
    # XLA cannot make pairs of codes out of bytes where a size is symbolic (jax.export).
    if quantizer.format.bits == 4 and (group % 2 or not all(isinstance(size, int) for size in x.shape)):
        return False
    if platform == "cpu":
        return True
    if x.dtype.itemsize != 2 or words or signs or matrix or length != size:
        return False
    longest = _longest_cuda_group(length)
    if longest is None or (quantizer.format.dtype == jnp.float8_e5m2 and length.bit_count() > 1):
        return False
    return group == length or quantizer.given or (group.bit_count() == 1 and 16 <= group <= longest)


@functools.cache
def _longest_cuda_group(length: int) -> int | None:
    """The longest group within a row that the CUDA kernels know; None where they do not quantise such rows.

    As FusesCodes in ffi/cuda/quantized_plan.cc has it.
    """
    *factors, power = decompose(length)
    if not factors:
        return None if not 32 <= length <= 32768 else 256 if length <= 1024 else 128 if length < 32768 else 0
    return 128 if len(factors) == 1 and factors[0] % 2 == 0 and power % 128 == 0 and length <= 32768 else None


@hadamard_quantize_p.def_abstract_eval
def _abstract_eval(x, *operands, quantizer, **params):
    del operands, params
    format = quantizer.format
    per_group = functools.partial(x.update, shape=(*x.shape[:-1], x.shape[-1] // quantizer.group), weak_type=False)
    results = [x.update(dtype=format.dtype, weak_type=False)]
    if not quantizer.given:
        results.append(per_group(dtype=format.scale_dtype))
    if quantizer.asymmetric:
        results.append(per_group(dtype=np.dtype(np.int8)))
    return results


def _two_steps(x, *operands, quantizer, **params):
    words, given = _told_apart(operands)
    wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    y = hadamard_p.bind(wide, *words, inplace=False, behind=0, **params)
    return _quantize_reference.quantize(y.astype(jnp.float32), quantizer, given=given[0] if given else None)


def _told_apart(operands):
    """The operands that are signs, and those that are scales."""
    return tuple([o for o in operands if o.dtype == kind] for kind in (np.uint32, np.float32))


# Every axis but the last is a batch axis already. A call has one set of signs and one scale, which the steps need not.
def _batch(args, dims, **params):
    (x, *operands), (mapped, *others) = args, dims
    if any(dim is not None for dim in others):
        results = jax.vmap(functools.partial(_two_steps, **params), in_axes=dims)(*args)
        return results, [0] * len(results)
    if mapped == x.ndim - 1:
        x, mapped = jnp.moveaxis(x, mapped, 0), 0
    results = hadamard_quantize_p.bind(x, *operands, **params)
    return results, [mapped] * len(results)


batching.primitive_batchers[hadamard_quantize_p] = _batch


def _for_the_partitioner(x, *operands, quantizer, length, **params):
    """The same by a call that XLA's partitioner can split along the last axis, too, without cutting anything."""
    unit = math.lcm(length, quantizer.group)
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // unit, unit)
    results = hadamard_quantize_p.bind(parts, *operands, quantizer=quantizer, length=length, **params)
    return [result.reshape(*x.shape[:-1], math.prod(result.shape[-2:])) for result in results]


_lower_two_steps = mlir.lower_fun(_two_steps, multiple_results=True)
_lower_for_the_partitioner = mlir.lower_fun(_for_the_partitioner, multiple_results=True)


def _lower(ctx, x, *operands, platform, **params):
    aval, *others = ctx.avals_in
    words, _ = _told_apart(others)
    quantizer, length = params["quantizer"], params["length"]
    exporting = ctx.module_context.lowering_parameters.for_export
    local = _primitive.is_local(ctx)
    if (
        # The partitioner would cut signs into pieces.
        (words and not local)
        or not fuses(platform, aval, *words, **params)
        or not _ffi.serves(platform, exporting=exporting)
    ):
        return _lower_two_steps(ctx, x, *operands, **params)
    if not local and math.lcm(length, quantizer.group) != aval.shape[-1]:
        return _lower_for_the_partitioner(ctx, x, *operands, **params)
    codes, *per_group = ctx.avals_out
    packed = quantizer.format.bits == 4
    if packed:
        codes = codes.update(shape=(*codes.shape[:-1], codes.shape[-1] // 2), dtype=np.dtype(np.uint8))
    results = [codes, *per_group]
    call = jax.ffi.ffi_lowering(
        _ffi.QUANTIZE_TARGET,
        extra_attributes=None if words else _primitive.sharding_attributes(ctx.avals_in, results),
    )
    factors = _primitive.slow_factors(**params)
    attributes = _primitive.call_attributes(aval.shape[-1], factors, has_operand=bool(words), **params)
    written, *rest = call(
        ctx.replace(avals_out=results), x, *operands, **attributes, **_quantizer_attributes(quantizer)
    )
    if packed:
        unpack = mlir.lower_fun(functools.partial(unpacked, dtype=quantizer.format.dtype), multiple_results=False)
        (written,) = unpack(ctx.replace(avals_in=[codes], avals_out=ctx.avals_out[:1]), written)
    return [written, *rest]


def _quantizer_attributes(quantizer: Quantizer):
    """What ffi/quantize_arguments.h reads."""
    return {
        "code": quantizer.format.dtype.name,
        "scale_type": quantizer.scale_type,
        "group": np.int64(quantizer.group),
        "asymmetric": np.bool_(quantizer.asymmetric),
    }


def unpacked(packed: jax.Array, dtype) -> jax.Array:
    """Codes of 4 bits, in order, of bytes (..., n / 2) that hold two each, the first in the low half."""
    return jax.lax.bitcast_convert_type(packed, dtype).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


mlir.register_lowering(hadamard_quantize_p, _lower_two_steps)
for _platform in ("cpu", "cuda"):
    mlir.register_lowering(hadamard_quantize_p, functools.partial(_lower, platform=_platform), platform=_platform)
