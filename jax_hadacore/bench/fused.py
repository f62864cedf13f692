"""Results that leave the transform quantised: device time beside the same bytes, calls beside two steps, and layers."""

import functools
import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _formats, _quantize_primitive
from .._rotated_dot import rotated_dot_general
from .._transform import hadamard
from ..quantize import hadamard_quantize
from . import alternatives, device
from .grid import Case, Choice, Replays


class _Form(NamedTuple):
    """What `hadamard_quantize` is asked for."""

    qtype: str
    granularity: _formats.Granularity = None
    asymmetric: bool = False

    def quantizer(self, n: int) -> _formats.Quantizer:
        return _formats.quantizer(_formats.parse(self.qtype), self.granularity, n, asymmetric=self.asymmetric)


_FORMS = {
    "float8_e4m3fn": _Form("float8_e4m3fn"),
    "int8": _Form("int8"),
    "int4": _Form("int4"),
    "int4 asymmetric": _Form("int4", asymmetric=True),
    "mxfp8": _Form("mxfp8"),
    "mxfp4": _Form("mxfp4"),
    "nvfp4": _Form("nvfp4"),
    "int8, given scale": _Form("int8", "tensor"),
    "float8_e4m3fn by 128": _Form("float8_e4m3fn", ("block", 128)),
}
_LEAST_GROUP = 16  # of them all
_MULTIPLE = 8192  # of elements, which native timings take
_DTYPE = {"gpu": "bfloat16", "cpu": "float32"}
_LENGTHS = [*(1 << bits for bits in range(5, 16)), 3072, 5120, 7168, 9216, 12288, 14336, 20480, 28672]
_ELEMENTS = [1 << 28, 1 << 25]
# Each of these compiles two programs.
_TWO_STEPS_FORMS = ("float8_e4m3fn", "int8", "int4")
_TWO_STEPS_LENGTHS = [128, 1024, 4096, 8192, 14336]
_TWO_STEPS_ELEMENTS = {"gpu": [1 << 28], "cpu": [1 << 22]}
_LAYER_FORMS = ("float8_e4m3fn", "int8")
_LAST_AXES = (((1,), (1,)), ((), ()))  # what XLA multiplies float8 fastest along


class Layer(NamedTuple):
    """A linear layer and its operand."""

    tokens: int
    inputs: int
    outputs: int


LAYERS = {
    "gpu": [Layer(tokens, 4096, outputs) for tokens in (4096, 16384) for outputs in (4096, 14336)],
    "cpu": [Layer(256, 1024, outputs) for outputs in (1024, 3584)],
}


def cases(lengths: Sequence[int] | None, elements: Sequence[int] | None) -> list[tuple[str, Case]]:
    """The cases that a CUDA kernel is fused for, each with the name of a format."""
    choice = Choice([_DTYPE["gpu"]], lengths or _LENGTHS, elements or _ELEMENTS)
    return [
        (name, case)
        for case in choice.cases()
        for name, form in _FORMS.items()
        if _whole(case).elements and _is_fused(form, case)
    ]


def rows(cases: Sequence[tuple[str, Case]]) -> Generator[dict]:
    """Times kernels on a GPU beside ones that only read and write as many bytes."""
    timed = _Gpu([case for _, case in cases])
    for name, case in cases:
        yield timed.row(name, case)


def two_steps_cases(
    platform: str, lengths: Sequence[int] | None, elements: Sequence[int] | None
) -> list[tuple[str, Case]]:
    """Some lengths and formats with a scale per row."""
    choice = Choice([_DTYPE[platform]], lengths or _TWO_STEPS_LENGTHS, elements or _TWO_STEPS_ELEMENTS[platform])
    return [(name, case) for case in choice.cases() for name in _TWO_STEPS_FORMS]


def two_steps_rows(cases: Iterable[tuple[str, Case]]) -> Generator[dict]:
    """Times a call beside one of the transform and what XLA makes of a quantiser in jnp."""
    for name, case in cases:
        operations = {
            "hadamard_quantize": (functools.partial(hadamard_quantize, qtype=name), ()),
            "two steps": (functools.partial(_two_steps, format=_formats.parse(name)), ()),
        }
        times = alternatives.times(case, operations, chained=False)
        yield {**case.row(cold=case.exceeds_caches), "format": name, "microseconds": times}


def layer_rows(platform: str, layers: Iterable[Layer]) -> Generator[dict]:
    """Times x @ w beside products of x, rotated and quantised in the same program, and codes of w."""
    for layer in layers:
        case = Case(np.dtype(_DTYPE[platform]), layer.inputs, layer.tokens * layer.inputs)
        w = jax.random.normal(jax.random.key(1), (layer.inputs, layer.outputs), case.dtype)
        operations: alternatives.Operations = {"x @ w": (jnp.matmul, (w,))}
        for name in _LAYER_FORMS:
            product = functools.partial(rotated_dot_general, dimension_numbers=_LAST_AXES, qtype=name)
            operations[name] = (product, (hadamard_quantize(w.T, name),))
        times = alternatives.times(case, operations, chained=False)
        yield {
            **case.row(cold=case.exceeds_caches),
            "tokens": layer.tokens,
            "outputs": layer.outputs,
            "microseconds": times,
        }


def _whole(case: Case) -> Case:
    """The case with as many of its rows as a native timing takes."""
    rows = math.lcm(case.n, _MULTIPLE)
    return replace(case, elements=case.elements // rows * rows)


def _is_fused(form: _Form, case: Case) -> bool:
    x = jax.ShapeDtypeStruct((case.elements // case.n, case.n), case.dtype)
    try:
        quantizer = form.quantizer(case.n)
    except ValueError:  # blocks longer than the row
        return False
    return _quantize_primitive.fuses("cuda", x, quantizer=quantizer, length=case.n, signs=None, matrix=None)


class _Gpu:
    """Buffers that all the cases share, and graphs of kernels on them, replayed in turn."""

    def __init__(self, cases: Sequence[Case]) -> None:
        size = max(case.elements * Replays.of(case).sets for case in cases)
        self._x = jax.random.normal(jax.random.key(0), (size,), cases[0].dtype)
        self._codes = jnp.ones(size, jnp.uint8)
        self._scales = jnp.ones(size // _LEAST_GROUP, jnp.float32)
        self._zero_points = jnp.ones(size // _LEAST_GROUP, jnp.int8)
        self._given = jnp.full(1, 4 / 127, jnp.float32)
        self._native = device.native("cuda")
        # The library's stream does not wait for JAX's.
        jax.block_until_ready((self._x, self._codes, self._scales, self._zero_points, self._given))

    def row(self, name: str, case: Case) -> dict:
        """Medians in microseconds, and the ratio of the faster of the others to the transform."""
        plan, quantizer = Replays.of(case), _FORMS[name].quantizer(case.n)
        asked = self._native.Quantization(
            getattr(self._native.Code, quantizer.format.dtype.name),
            getattr(self._native.Scale, quantizer.scale_type),
            quantizer.group,
            quantizer.asymmetric,
            self._given.unsafe_buffer_pointer() if quantizer.given else 0,
        )
        results = self._native.QuantizedBuffers(
            self._codes.unsafe_buffer_pointer(),
            0 if quantizer.given else self._scales.unsafe_buffer_pointer(),
            self._zero_points.unsafe_buffer_pointer() if quantizer.asymmetric else 0,
        )
        problem, x = device.problem(self._native, _whole(case)), self._x.unsafe_buffer_pointer()
        times = self._native.measure_codes(problem, asked, x, results, plan.sets, plan.launches, plan.replays)
        return {**case.row(cold=plan.cold), "format": name, "sets": plan.sets, **device.summary(times)}


def _two_steps(x: jax.Array, *, format: _formats.Format) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of rows as a program without this library's quantiser computes them."""
    y = hadamard(x).astype(jnp.float32)
    scales = jnp.maximum(jnp.max(jnp.abs(y), axis=-1, keepdims=True) / format.largest, jnp.finfo(jnp.float32).tiny)
    codes = y / scales
    return (jnp.round(codes) if format.is_integer else codes).astype(format.dtype), scales
