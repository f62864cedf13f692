"""What hadamard_quantize() does with its arguments, in one program: checks, axes, signs and scales, derivatives."""

import functools
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from . import _formats, _options, _quantize_primitive, _quantize_reference, _shardings, _transform
from ._formats import Format, Granularity, Quantizer
from ._quantized_array import QuantizedArray


class Request(NamedTuple):
    """What is static in a call: what a compiled program is found by."""

    options: _options.Options
    format: Format
    granularity: Granularity
    asymmetric: bool


class Arrays(NamedTuple):
    """What is not: x, where traced signs are minus, the scale that is given, and the key."""

    x: jax.Array
    negative: jax.Array | None
    given: jax.Array | None
    key: jax.Array | None


def parsed(
    x,
    qtype,
    *,
    granularity=None,
    quant_scale=None,
    tensor_scale=None,
    asymmetric=False,
    key=None,
    axis=-1,
    scale=None,
    block_size=None,
    signs=None,
    matrix=None,
    transpose=False,
) -> tuple[Arrays, Request]:
    """The arguments, as far as they can be checked without an axis."""
    options, negative = _options.parsed(
        axis=axis,
        scale=scale,
        block_size=block_size,
        signs=signs,
        matrix=matrix,
        transpose=transpose,
        axis_name=None,
        inplace=False,
    )
    format = _formats.parse(qtype)
    if not isinstance(asymmetric, bool):
        raise TypeError(f"hadamard_quantize: asymmetric must be True or False, got {asymmetric!r}.")
    granularity = tuple(granularity) if isinstance(granularity, list) else granularity
    if (quant_scale is not None) != (granularity == "tensor"):
        raise ValueError(
            'hadamard_quantize: quant_scale is the scale for granularity="tensor", and goes with nothing else; got '
            f"granularity {granularity!r} {'without' if quant_scale is None else 'with'} one."
        )
    if tensor_scale is not None and format.name != "nvfp4":
        raise ValueError(f"hadamard_quantize: tensor_scale is for nvfp4, got {format.name}.")
    if key is not None and format.bits != 4:
        raise ValueError(f"hadamard_quantize: a key, for stochastic rounding, is for 4-bit codes, got {format.name}.")
    given = quant_scale if tensor_scale is None else tensor_scale
    arrays = Arrays(jnp.asarray(x), negative, None if given is None else _parsed_scale(given), key)
    return arrays, Request(options, format, granularity, asymmetric)


def _parsed_scale(scale) -> jax.Array:
    if jnp.size(scale) != 1:
        raise ValueError(f"hadamard_quantize: a given scale must be one number, got shape {jnp.shape(scale)}.")
    array = jnp.asarray(scale).astype(jnp.float32).reshape(())
    if not isinstance(array, jax.core.Tracer) and not np.finfo(np.float32).tiny <= array < np.inf:
        raise ValueError(f"hadamard_quantize: a given scale must be positive, finite and at least 2^-126, got {scale}.")
    return array


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def quantize(x, negative, given, key, request: Request) -> QuantizedArray:
    if jnp.iscomplexobj(x):
        raise TypeError(f"hadamard_quantize: x must be real, got dtype {x.dtype.name}. Quantise both parts.")
    task = _options.resolved(x, negative, request.options)
    y = jnp.moveaxis(x, task.axis, -1)
    split = _shardings.split_last_axis(y)
    if split:
        y = _shardings.whole(y, split)
    quantizer = _formats.quantizer(request.format, request.granularity, y.shape[-1], asymmetric=request.asymmetric)
    codes, *per_group = _quantize_last(y, given, key, task=task, options=request.options, quantizer=quantizer)
    if split:
        codes = jax.sharding.reshard(codes, split)
    codes = _codes_moved(codes, task.axis, quantizer.format.bits)
    per_group = [jnp.moveaxis(values, -1, task.axis) for values in per_group]
    one = [] if given is None else [given.reshape((1,) * x.ndim)]
    scales, *zero_points = one if quantizer.given else per_group
    return QuantizedArray(
        codes,
        scales,
        zero_points[0] if zero_points else None,
        qtype=request.format.name,
        axis=task.axis - x.ndim,
        block=None if quantizer.group == y.shape[-1] else quantizer.group,
        tensor_scale=one[0] if one and not quantizer.given else None,
    )


def _codes_moved(codes: jax.Array, axis: int, bits: int) -> jax.Array:
    """Codes with their last axis elsewhere.

    jaxlib 0.8 writes beyond the memory of a 4-bit result that it transposes on the CPU, so bytes are transposed.
    """
    if axis == codes.ndim - 1 or bits == 8:
        return jnp.moveaxis(codes, -1, axis)
    nibbles = jax.lax.bitcast_convert_type(codes, jnp.uint4)
    moved = jax.lax.optimization_barrier(jnp.moveaxis(nibbles.astype(jnp.uint8), -1, axis))
    return jax.lax.bitcast_convert_type(moved.astype(jnp.uint4), codes.dtype)


@quantize.defjvp
def _no_derivative(request, primals, tangents):
    raise TypeError(
        "hadamard_quantize: the result has no derivative. hadamard_fake_quantize has the straight-through one, and "
        "jax.lax.stop_gradient(x) makes x a constant."
    )


def _quantize_last(
    y: jax.Array, given, key, *, task: _options.Task, options: _options.Options, quantizer: Quantizer
) -> list[jax.Array]:
    """Transforms and quantises the last axis, in one where signs and scales can be part of a call."""
    signs_fit = task.minus is None or _transform.fits_a_call(y, task.minus, task.n)
    scale_fits = given is None or _shardings.varying(given) <= _shardings.varying(y)
    if key is None and signs_fit and scale_fits:
        return _quantize_primitive.transform_and_quantize(
            y,
            quantizer=quantizer,
            scale=_options.checked_scale(options, task.n, y.dtype),
            length=task.n,
            negative=task.minus,
            given=given,
            matrix=options.matrix and options.matrix.entries,
            transpose=options.transpose,
        )
    wide = y if y.dtype == jnp.float64 else y.astype(jnp.float32)
    w = _transform.transform_last(wide, task=task, options=options).astype(jnp.float32)
    # A function of the key and the element's index alone, which the compiler shards like w.
    random = None if key is None else jax.random.bits(key, w.shape, jnp.uint32)
    return _quantize_reference.quantize(w, quantizer, given=given, random=random)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def fake_quantize(x, negative, given, key, request: Request) -> jax.Array:
    return quantize(x, negative, given, key, request).dequantize(x.dtype)


@fake_quantize.defjvp
def _straight_through(request, primals, tangents):
    _, negative, *_ = primals
    return fake_quantize(*primals, request), _transform.apply(tangents[0], negative, options=request.options)


quantize_program = jax.jit(quantize, static_argnums=4, inline=True)
fake_quantize_program = jax.jit(fake_quantize, static_argnums=4, inline=True)
