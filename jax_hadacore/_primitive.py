"""hadamard_p: the linear primitive behind hadamard(), and its rules."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import AxisType

from . import _ffi, _reference
from ._orders import order_matrix, orders
from ._signs import pack, unpack

hadamard_p = Primitive("hadamard")
hadamard_p.def_impl(functools.partial(xla.apply_primitive, hadamard_p))


# The CUDA kernel transforms 16-bit rows of a power of two up to this length in one pass.
_CUDA_ONE_PASS = 32768
# And the lengths, by the size of an element, at which it takes the last axis with others behind it in memory. With
# fewer columns than these, or a row of them that is no multiple of 16 bytes, it would not read whole sectors.
_CUDA_COLUMNS = {2: (8, 256), 4: (8, 128)}
_LEAST_COLUMNS = 32


@dataclass(frozen=True)
class StaticArray:
    """A NumPy array as a parameter that programs are found by: hashable, and equal by value."""

    shape: tuple[int, ...]
    dtype: np.dtype
    data: bytes = field(repr=False)

    @classmethod
    def of(cls, array: np.ndarray) -> "StaticArray":
        return cls(array.shape, array.dtype, array.tobytes())

    @property
    def value(self) -> np.ndarray:
        return np.frombuffer(self.data, self.dtype).reshape(self.shape)


def transform(
    x: jax.Array,
    *,
    scale: float,
    length: int | None = None,
    negative: np.ndarray | jax.Array | None = None,
    matrix: StaticArray | None = None,
    transpose: bool = False,
    inplace: bool = False,
    behind: int = 0,
) -> jax.Array:
    """Transforms blocks of the last axis.

    Args:
        x: a real array.
        scale: what the unnormalised transform is multiplied by.
        length: that of a block; by default the whole axis is one.
        negative: where the signs are minus, booleans of a block's length; NumPy's become part of the program.
        matrix: the slowest factor in place of the orders of `decompose`: +-1 in int8, or float64.
        transpose: apply the adjoint.
        inplace: let the result take the operand's memory.
        behind: of the axes before the last, as many as should lie behind it in memory, because the last was moved from
            there. A kernel that can have them so saves two transpositions.
    """
    words = () if negative is None else (pack(negative),)
    static = StaticArray.of(words[0]) if words and isinstance(words[0], np.ndarray) else None
    return hadamard_p.bind(
        x,
        *(() if static else words),
        scale=scale,
        length=x.shape[-1] if length is None else length,
        signs=static,
        matrix=matrix,
        transpose=transpose,
        inplace=inplace,
        behind=behind,
    )


def with_signs(
    x: jax.Array, *, transform: Callable[[jax.Array], jax.Array], negative: np.ndarray | jax.Array, transpose: bool
) -> jax.Array:
    """A transform with signs applied before it, or after it where it is transposed, by XLA.

    `negative` has the length of a block, and leading axes of x or none.
    """
    blocks = x.shape[-1] // negative.shape[-1]
    negative = jnp.concatenate([negative] * blocks, axis=-1)
    leading = negative.ndim - 1
    negative = jnp.expand_dims(negative, tuple(range(leading, x.ndim - 1)))

    def flip(x):
        # A product with -1 would be the same but for subnormal numbers, which XLA flushes on CPUs.
        return jnp.where(negative, -x, x)

    return flip(transform(x)) if transpose else transform(flip(x))


# The operands of hadamard_p are x and perhaps packed signs. It is linear in x; signs are constants, without a gradient.
@hadamard_p.def_abstract_eval
def _hadamard_abstract_eval(x, *words, **params):
    del words, params
    # Everything but the values is the operand's: shape, dtype, sharding, varying manual axes, memory space.
    return x.update(weak_type=False)


# A cotangent may be in use elsewhere: never transform it in place.
def _hadamard_transpose(cotangent, x, *words, transpose, inplace, **params):
    del x, inplace
    y = hadamard_p.bind(cotangent, *words, transpose=not transpose, inplace=False, **params)
    return [y, *(None for _ in words)]


ad.deflinear2(hadamard_p, _hadamard_transpose)


# deflinear2's own rule takes an operand of integers for a linear one.
def _hadamard_jvp(primals, tangents, **params):
    x, *words = primals
    tangent = ad.instantiate_zeros(tangents[0])
    return hadamard_p.bind(x, *words, **params), hadamard_p.bind(tangent, *words, **params)


ad.primitive_jvps[hadamard_p] = _hadamard_jvp


# Every axis but the last is a batch axis already, so only a mapped last axis has to move, and one between those behind.
def _hadamard_batch(args, dims, **params):
    x, *words = args
    mapped, *signs_mapped = dims
    if words and signs_mapped[0] is not None:
        x = x[None] if mapped is None else jnp.moveaxis(x, mapped, 0)
        return _signs_apart(x, jnp.moveaxis(words[0], signs_mapped[0], 0), **params), 0
    if mapped >= x.ndim - 1 - params["behind"]:
        x, mapped = jnp.moveaxis(x, mapped, 0), 0
    return hadamard_p.bind(x, *words, **params), mapped


batching.primitive_batchers[hadamard_p] = _hadamard_batch


def _signs_apart(x, words, *, length, transpose, **params):
    """The same transform by a call without an operand for signs."""
    call = functools.partial(hadamard_p.bind, length=length, transpose=transpose, **params)
    return with_signs(x, transform=call, negative=unpack(words, length), transpose=transpose)


def _reference_impl(x, *words, scale, length, signs, matrix, transpose, inplace, behind):
    del inplace, behind
    if signs is not None:
        words = (signs.value,)
    return _reference.transform(
        x,
        scale=scale,
        length=length,
        matrix=None if matrix is None else matrix.value,
        signs=1 - 2 * unpack(words[0], length).astype(np.int8) if words else None,
        transpose=transpose,
    )


_lower_reference = mlir.lower_fun(_reference_impl, multiple_results=False)


def _for_the_partitioner(x, *words, length, behind, **params):
    """The same transform by calls that XLA's partitioner can split.

    It can split leading dimensions only, and would cut an operand that lacks them into pieces.
    """
    if words:
        return _signs_apart(x, *words, length=length, behind=behind, **params)
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // length, length)
    return hadamard_p.bind(blocks, length=length, behind=0, **params).reshape(x.shape)


_lower_for_the_partitioner = mlir.lower_fun(_for_the_partitioner, multiple_results=False)


def _lower_kernel(ctx, x, *words, platform, **params):
    if not _ffi.serves(platform, exporting=ctx.module_context.lowering_parameters.for_export):
        return _lower_reference(ctx, x, *words, **params)
    (aval,) = ctx.avals_out
    if not is_local(ctx) and (words or params["length"] != aval.shape[-1]):
        return _lower_for_the_partitioner(ctx, x, *words, **params)
    factors = slow_factors(**params)
    behind = params["behind"] if not words and _takes_columns(platform, aval, factors, **params) else 0
    layout = (*range(aval.ndim - 1 - behind), aval.ndim - 1, *range(aval.ndim - 1 - behind, aval.ndim - 1))[::-1]
    results = [aval]
    if platform == "cuda" and (
        workspace := _cuda_workspace(aval.dtype, params["length"], factors, signs=params["signs"] is not None)
    ):
        results.append(aval.update(dtype=np.dtype(workspace)))
    call = jax.ffi.ffi_lowering(
        _ffi.HADAMARD_TARGET,
        operand_layouts=[layout] if behind else None,
        result_layouts=[layout] if behind else None,
        operand_output_aliases={0: 0} if params["inplace"] else None,
        # Signs are an operand only where there is nothing to shard.
        extra_attributes=None if words else sharding_attributes([aval], results),
    )
    attributes = call_attributes(aval.shape[-1], factors, has_operand=bool(words), **params)
    if behind:
        attributes["behind"] = np.int64(behind)
    return call(ctx.replace(avals_out=results), x, *words, **attributes)[:1]


def is_local(ctx):
    """Whether the call is given what a device holds, which the partitioner leaves alone."""
    mesh = ctx.avals_in[0].sharding.mesh
    kinds = list(zip(mesh.axis_sizes, mesh.axis_types, strict=True))
    if any(kind == AxisType.Manual for _, kind in kinds):
        return all(kind == AxisType.Manual or size == 1 for size, kind in kinds)
    # A program that is exported for one device may be called in one that is sharded.
    exporting = ctx.module_context.lowering_parameters.for_export
    return not exporting and getattr(ctx.module_context.axis_context, "num_devices", None) == 1


def _takes_columns(platform, aval, factors, *, length, signs, behind, **_) -> bool:
    """Whether a kernel transforms the last axis where it lies, before the axes behind it."""
    if platform != "cuda" or factors or signs is not None or length != aval.shape[-1]:
        return False
    least, most = _CUDA_COLUMNS.get(aval.dtype.itemsize, (1, 0))
    sizes = aval.shape[aval.ndim - 1 - behind : -1]
    if not least <= length <= most or not sizes or not all(isinstance(size, int) for size in sizes):
        return False
    columns = math.prod(sizes)
    return columns >= _LEAST_COLUMNS and columns * aval.dtype.itemsize % 16 == 0


def slow_factors(*, length, matrix, transpose, **_) -> list[np.ndarray]:
    """The matrices of the factors that are no power of two, slowest first."""
    if matrix is None:
        return [order_matrix(k) for k in orders(length)]
    return [matrix.value.T if transpose else matrix.value]


def _cuda_workspace(dtype, length, factors, *, signs):
    """The type of the workspace of the operand's shape that the CUDA kernels may need, or None.

    It is a result of the call, because XLA owns all memory.
    """
    if not factors:
        return np.float32 if dtype.itemsize == 2 and length > _CUDA_ONE_PASS else None
    sums = np.float64 if dtype == np.float64 else np.float32
    native = _ffi.CUDA.module
    if native is None:  # exported without the kernels at hand
        return sums
    some = 1  # of signs and values it matters only whether there are any
    problem = native.Problem(
        getattr(native.Dtype, dtype.name),
        length,
        1,
        orders=[len(factor) for factor in factors],
        factors=0 if any(factor.dtype != np.int8 for factor in factors) else some,
        matrix=some if any(factor.dtype != np.int8 for factor in factors) else 0,
        signs=some if signs else 0,
    )
    return sums if native.needs_workspace(problem) else None


def call_attributes(size, factors, *, has_operand, scale, length, signs, transpose, **_):
    """What ffi/arguments.h reads, for a last dimension of this size."""
    attributes: dict[str, np.generic | np.ndarray] = {"scale": np.float64(scale)}
    if length != size:
        attributes["n"] = np.int64(length)
    if factors:
        attributes["orders"] = np.array([len(factor) for factor in factors], np.int64)
        if factors[0].dtype == np.int8:
            attributes["factors"] = np.concatenate([pack(factor < 0).ravel() for factor in factors])
        else:
            attributes["matrix"] = factors[0].ravel()
    if signs is not None:
        attributes["signs"] = signs.value
    if transpose and (has_operand or signs is not None):
        attributes["signs_last"] = np.bool_(True)
    return attributes


def sharding_attributes(operands, results):
    """What lets XLA shard a call over its batch dimensions without communication.

    `num_batch_dims` lets the partitioner split the call; the Shardy rule propagates shardings through it. The rule has
    one factor for each batch dimension (letters from i on), and one for each size of a last dimension, which it wants
    replicated. Scalars have none. Symbolic sizes (jax.export) cannot be written into a rule; the partitioner alone then
    still avoids gathering.
    """
    *batch, _ = operands[0].shape
    attributes = {"mhlo.frontend_attributes": mlir.ir_attribute({"num_batch_dims": str(len(batch))})}
    last = list(dict.fromkeys(aval.shape[-1] for aval in (*operands, *results) if aval.ndim))
    sizes = [*batch, *last]
    letters = "ijklmnopqrstuvwxyz"[: len(sizes)]
    if len(letters) == len(sizes) and all(isinstance(size, int) for size in sizes):
        of_batch, of_last = letters[: len(batch)], dict(zip(last, letters[len(batch) :], strict=True))

        def arrays(avals):
            dims = ([*of_batch, of_last[aval.shape[-1]]] if aval.ndim else [] for aval in avals)
            return ", ".join(f"[{', '.join(names)}]" for names in dims)

        factors = ", ".join(f"{letter}={size}" for letter, size in zip(letters, sizes, strict=True))
        attributes["sdy.sharding_rule"] = mlir.ir.Attribute.parse(
            f"#sdy.op_sharding_rule<({arrays(operands)})->({arrays(results)}) "
            f"{{{factors}}} need_replication={{{', '.join(of_last.values())}}}>"
        )
    return attributes


mlir.register_lowering(hadamard_p, _lower_reference)
for _platform in ("cpu", "cuda"):
    mlir.register_lowering(hadamard_p, functools.partial(_lower_kernel, platform=_platform), platform=_platform)
