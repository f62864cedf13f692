"""hadamard_p: the linear primitive behind hadamard(), and its rules."""

import functools

import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from . import _ffi, _reference

hadamard_p = Primitive("hadamard")
hadamard_p.def_impl(functools.partial(xla.apply_primitive, hadamard_p))

# The CUDA kernel transforms 16-bit rows up to this length in one pass. Longer ones take two, with a float32 workspace
# between them; it is a result of the call, because XLA owns all memory.
_CUDA_ONE_PASS = 32768


@hadamard_p.def_abstract_eval
def _hadamard_abstract_eval(x, *, scale, inplace):
    del scale, inplace
    # Everything but the values is the operand's: shape, dtype, sharding, varying manual axes, memory space.
    return x.update(weak_type=False)


# H_n is symmetric, so the map is its own transpose. A cotangent may be in use elsewhere: never transform it in place.
def _hadamard_transpose(cotangent, x, *, scale, inplace):
    del x, inplace
    return [hadamard_p.bind(cotangent, scale=scale, inplace=False)]


ad.deflinear2(hadamard_p, _hadamard_transpose)


# Every axis but the last is a batch axis already, so only a mapped last axis has to move.
def _hadamard_batch(args, dims, **params):
    (x,), (mapped,) = args, dims
    if mapped == x.ndim - 1:
        x, mapped = jnp.moveaxis(x, mapped, 0), 0
    return hadamard_p.bind(x, **params), mapped


batching.primitive_batchers[hadamard_p] = _hadamard_batch


def _reference_impl(x, *, scale, inplace):
    del inplace
    return _reference.transform(x, scale=scale)


_lower_reference = mlir.lower_fun(_reference_impl, multiple_results=False)


def _lower_kernel(ctx, x, *, platform, scale, inplace):
    if not _ffi.serves(platform, exporting=ctx.module_context.lowering_parameters.for_export):
        return _lower_reference(ctx, x, scale=scale, inplace=inplace)
    (aval,) = ctx.avals_out
    results = [aval]
    if platform == "cuda" and aval.dtype.itemsize == 2 and aval.shape[-1] > _CUDA_ONE_PASS:
        results.append(aval.update(dtype=np.dtype(np.float32)))  # the workspace
    call = jax.ffi.ffi_lowering(
        _ffi.HADAMARD_TARGET,
        operand_output_aliases={0: 0} if inplace else None,
        extra_attributes=_sharding_attributes(aval, len(results)),
    )
    return call(ctx.replace(avals_out=results), x, scale=np.float64(scale))[:1]


def _sharding_attributes(aval, results):
    """What lets XLA shard the call over its batch dimensions without communication.

    `num_batch_dims` lets the partitioner split the call; the Shardy rule propagates shardings through it. The rule has
    one factor for each dimension (letters from i on) and wants the last one replicated. Symbolic sizes (jax.export)
    cannot be written into a rule; the partitioner alone then still avoids gathering.
    """
    attributes = {"mhlo.frontend_attributes": mlir.ir_attribute({"num_batch_dims": str(aval.ndim - 1)})}
    letters = "ijklmnopqrstuvwxyz"[: aval.ndim]
    if len(letters) == aval.ndim and all(isinstance(size, int) for size in aval.shape):
        array = f"[{', '.join(letters)}]"
        sizes = ", ".join(f"{letter}={size}" for letter, size in zip(letters, aval.shape, strict=True))
        attributes["sdy.sharding_rule"] = mlir.ir.Attribute.parse(
            f"#sdy.op_sharding_rule<([{', '.join(letters)}])->({', '.join([array] * results)}) "
            f"{{{sizes}}} need_replication={{{letters[-1]}}}>"
        )
    return attributes


mlir.register_lowering(hadamard_p, _lower_reference)
for _platform in ("cpu", "cuda"):
    mlir.register_lowering(hadamard_p, functools.partial(_lower_kernel, platform=_platform), platform=_platform)
