"""hadamard_quantize: the transform by its definition, then the quantiser by its own."""

import dataclasses
import doctest
import functools
import importlib
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import DTYPES, normal, rng
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import transform
from quantize_cases import CASES, FORMATS, Case, assert_agrees, cases

from jax_hadacore import (
    QuantizedArray,
    hadamard,
    hadamard_quantize,
    nvfp4_tensor_scale,
)

F32 = np.float32
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def integers(shape, dtype, *key):
    """Numbers whose transform is exact in float32, so that the order of its sums does not matter."""
    x = rng("integers", shape, *key).integers(-16, 17, shape)
    x[..., 0] *= rng("outlier", shape, *key).integers(1, 8, shape[:-1])
    return x.astype(dtype)


def arrays(q):
    return q.values, q.scales, q.zero_points


def expected(x, case, axis=-1, **options):
    """The oracle's result, with its groups along the last axis."""
    exact = transform(np.moveaxis(np.asarray(x), axis, -1), **options)
    w = exact.astype(F32)
    assert (w == exact).all()
    return case.oracle(w)


def last(q, axis=-1):
    """The arrays of a QuantizedArray with its axis last."""
    return [None if array is None else np.moveaxis(np.asarray(array), axis, -1) for array in arrays(q)]


def check(x, case, *, axis=-1, **options):
    names = {"length": "block_size"}
    q = hadamard_quantize(x, case.qtype, axis=axis, **{names.get(k, k): v for k, v in options.items()}, **case.options)
    want = expected(x, case, axis, **options)
    assert_agrees(last(q, axis), want)
    assert q.shape == x.shape
    assert q.qtype == case.qtype
    assert q.axis == axis % x.ndim - x.ndim
    values = np.moveaxis(want.values, -1, axis)
    np.testing.assert_array_equal(np.asarray(q.dequantize()), values)
    return q


@cases
class TestEveryNumber:
    """Where the sums of the transform are exact, so is the result."""

    @dtypes
    def test_dtypes(self, case, dtype):
        check(integers((5, 128), dtype), case, scale=2.0**-4)

    @pytest.mark.parametrize("n", [32, 96, 320, 4096, 28 * 512])
    def test_lengths(self, case, n):
        check(integers((3, n), jnp.bfloat16), case, scale=2.0**-6)

    @pytest.mark.parametrize("axis", [0, 1, -2])
    def test_axes(self, case, axis):
        check(integers((32, 64, 3), F32), case, axis=axis, scale=0.25)

    def test_blocks(self, case):
        for block in (16, 12, 64):
            check(integers((3, 192), jnp.float16), case, length=block, scale=0.5)

    @pytest.mark.parametrize("transpose", [False, True])
    def test_signs(self, case, transpose):
        signs = rng("signs").choice(np.array([-1, 1], np.int8), 96)
        x = integers((3, 96), jnp.bfloat16)
        for length, s in ((96, signs), (32, signs[:32])):
            q = check(x, case, signs=s, transpose=transpose, scale=0.5, length=length)
            options = {**case.options, "block_size": length, "transpose": transpose, "scale": 0.5}
            traced = jax.jit(lambda x, s, options=options: hadamard_quantize(x, case.qtype, signs=s, **options))(x, s)
            assert_same_leaves(traced, q)

    @pytest.mark.parametrize("transpose", [False, True])
    def test_matrix(self, case, transpose):
        matrix = rng("matrix").permutation(np.array([[0, 0, 1], [0, -1, 0], [1, 0, 0]]))
        check(integers((3, 96), jnp.bfloat16), case, matrix=matrix, transpose=transpose, scale=0.5)

    def test_one_row_and_none(self, case):
        check(integers((64,), F32), case, scale=1)
        empty, one = (hadamard_quantize(np.zeros((rows, 64), F32), case.qtype, **case.options) for rows in (0, 1))
        assert empty.dequantize().shape == (0, 64)
        assert empty.scales.shape[1:] == one.scales.shape[1:]

    def test_without_the_kernel(self, case, request):
        x = integers((3, 64), jnp.bfloat16)
        q = hadamard_quantize(x, case.qtype, **case.options)
        request.getfixturevalue("no_kernel")
        assert_same_leaves(hadamard_quantize(x, case.qtype, **case.options), q)


def assert_same_leaves(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one).astype(F32), np.asarray(other).astype(F32))


@pytest.mark.parametrize(("block", "size"), [(5, 15), (1, 4), (3, 12), (4, 12)], ids=str)
@pytest.mark.parametrize("qtype", ["int8", "int4", "float8_e4m3fn"])
def test_any_block_that_divides_the_axis(qtype, block, size):
    check(integers((3, size), F32), Case(qtype, block), length=1 if size % 4 else 4, scale=1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@cases
def test_what_is_not_finite_stays_in_its_row(case, value):
    x = integers((5, 128), jnp.bfloat16)
    clean = hadamard_quantize(x, case.qtype, **case.options)
    x[2, 3] = value
    q = hadamard_quantize(x, case.qtype, **case.options)
    others = np.array([0, 1, 3, 4])
    np.testing.assert_array_equal(
        np.asarray(q.values).astype(F32)[others], np.asarray(clean.values).astype(F32)[others]
    )
    values = np.asarray(q.dequantize())
    assert np.isfinite(values[others]).all()
    if case.given is None or case.qtype == "nvfp4":
        assert np.isnan(values[2]).all()


@pytest.mark.parametrize(("case", "largest"), [(case, 1e-3 if case.bits == 8 else 1e-4) for case in CASES], ids=str)
@pytest.mark.parametrize("dtype", [np.dtype(F32), np.dtype(jnp.bfloat16)], ids=str)
@pytest.mark.parametrize("n", [256, 3072])
def test_few_codes_move_by_the_order_of_sums(case, largest, dtype, n):
    if case.given is not None and case.qtype != "nvfp4":
        # Some is saturated, most is not.
        given = {"int8": 0.02, "int4": 0.3, "float8_e4m3fn": 0.005, "float8_e5m2": 4e-5}[case.qtype]
        case = case._replace(given=given)
    x = normal((2**18 // n, n), dtype)
    q = hadamard_quantize(x, case.qtype, **case.options)
    want = case.oracle(transform(x).astype(F32))
    index = np.searchsorted(case.numbers, np.asarray(q.values).astype(float))
    steps = np.abs(index - np.searchsorted(case.numbers, want.codes))
    assert steps.max() <= 1
    assert np.mean(steps > 0) <= largest


@st.composite
def calls(draw):
    """A case, an array and options of the transform that leave its sums exact."""
    case = draw(st.sampled_from(CASES))
    order = draw(st.sampled_from([1, 12, 20]))
    n = order * 2 ** draw(st.integers(0, 7))
    blocks = draw(st.sampled_from([1, 2, 3, 8]))
    size = math.lcm(n * blocks, case.block or FORMATS[case.qtype][1] or 1)
    shape = [*draw(st.lists(st.integers(1, 4), max_size=2)), size]
    dtype = draw(st.sampled_from(DTYPES))
    options = {"length": n, "scale": draw(st.sampled_from([1.0, 0.25, -2.0]))}
    if draw(st.booleans()):
        options["signs"] = rng(n).choice(np.array([-1, 1], np.int8), n)
        options["transpose"] = draw(st.booleans())
    axis = draw(st.integers(-len(shape), -1))
    return integers(tuple(shape), dtype), case, axis, options


@given(calls())
@settings(max_examples=60, deadline=None)
def test_any_combination(call):
    x, case, axis, options = call
    check(np.moveaxis(x, -1, axis), case, axis=axis, **options)


class TestNvfp4TensorScale:
    def test_is_the_smallest_that_does_not_saturate(self):
        w = normal((8, 64), F32)
        t = nvfp4_tensor_scale(w)
        assert t.dtype == jnp.float32
        assert t.shape == ()
        np.testing.assert_allclose(t, np.abs(w).max() / (6 * 448), rtol=1e-6)

    def test_of_zeros(self):
        assert nvfp4_tensor_scale(jnp.zeros((2, 16))) == 1

    def test_keeps_small_tensors(self):
        """Scales of float8_e4m3fn alone are at least 2^-9."""
        x = normal((64, 256), F32) * F32(1e-4)
        w = np.asarray(hadamard(x))
        alone, with_tensor_scale = (
            np.std(np.asarray(hadamard_quantize(x, "nvfp4", tensor_scale=t).dequantize()) - w)
            for t in (None, nvfp4_tensor_scale(w))
        )
        assert with_tensor_scale < alone / 5

    def test_under_jit(self):
        w = normal((8, 64), jnp.bfloat16)
        assert jax.jit(nvfp4_tensor_scale)(w) == nvfp4_tensor_scale(w)


class TestStochastic:
    four_bits = pytest.mark.parametrize("case", [case for case in CASES if case.bits == 4], ids=str)

    @four_bits
    def test_depends_on_the_key_alone(self, case):
        x = normal((8, 128), jnp.bfloat16)
        draw = functools.partial(hadamard_quantize, x, case.qtype, **case.options)
        first, again, other = (draw(key=jax.random.key(seed)) for seed in (0, 0, 1))
        assert_same_leaves(first, again)
        assert_same_leaves(jax.jit(draw)(key=jax.random.key(0)), first)
        assert_same_leaves(draw(key=jax.random.PRNGKey(0)), first)
        assert (np.asarray(first.values) != np.asarray(other.values)).mean() > 0.05

    def test_is_right_on_average(self):
        x = normal((4, 64), F32)
        keys = jax.random.split(jax.random.key(0), 256)
        draws = jax.vmap(lambda key: hadamard_quantize(x, "int4", key=key).dequantize())(keys)
        scale = np.asarray(hadamard_quantize(x, "int4").scales)
        error = np.abs(np.mean(np.asarray(draws), axis=0) - np.asarray(hadamard(x))) / scale
        assert error.max() < 5 / 2 / np.sqrt(len(keys))


class TestQuantizedArray:
    def test_is_a_pytree(self):
        q = hadamard_quantize(normal((4, 64), F32), "int4", granularity=("block", 16), asymmetric=True)
        leaves, structure = jax.tree.flatten(q)
        assert len(leaves) == 3
        assert_same_leaves(jax.tree.unflatten(structure, leaves), q)
        assert_same_leaves(jax.jit(lambda q: q)(q), q)
        assert q.shape == (4, 64)
        assert q.ndim == 2

    @dtypes
    def test_dequantizes_to(self, dtype):
        q = hadamard_quantize(normal((4, 64), F32), "nvfp4", tensor_scale=0.01)
        y = q.dequantize(dtype)
        assert y.dtype == dtype
        np.testing.assert_array_equal(np.asarray(y), np.asarray(q.dequantize()).astype(dtype))

    @cases
    def test_vmap_and_scan_may_add_an_axis(self, case):
        x = integers((3, 4, 64), F32)
        quantize = functools.partial(hadamard_quantize, qtype=case.qtype, **case.options)
        whole = quantize(x).dequantize()
        np.testing.assert_array_equal(jax.vmap(quantize)(x).dequantize(), whole)
        _, stacked = jax.lax.scan(lambda _, row: (None, quantize(row)), None, x)
        np.testing.assert_array_equal(stacked.dequantize(), whole)
        _, rows = jax.lax.scan(lambda _, q: (None, q.dequantize()), None, stacked)
        np.testing.assert_array_equal(rows, whole)

    def test_types_of_codes(self):
        x = normal((2, 64), F32)
        for qtype, (form, block) in FORMATS.items():
            assert hadamard_quantize(x, qtype).values.dtype == form.dtype
            assert block or hadamard_quantize(x, form.dtype).qtype == qtype

    def test_bytes(self):
        """Codes of 4 bits are packed in pairs, the first of each in the low half."""
        from jax_hadacore._quantize_primitive import unpacked  # noqa: PLC0415

        packed = np.arange(256, dtype=np.uint8).reshape(2, 128)
        nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(2, 256)
        signed = np.where(nibbles < 8, nibbles, nibbles.astype(np.int8) - 16)
        np.testing.assert_array_equal(np.asarray(unpacked(packed, jnp.int4)).astype(np.int8), signed)
        np.testing.assert_array_equal(
            np.asarray(unpacked(packed, jnp.float4_e2m1fn)).astype(F32),
            nibbles.view(ml_dtypes.float4_e2m1fn).astype(F32),
        )


class TestQwix:
    @pytest.fixture
    def qwix(self):
        return pytest.importorskip("qwix", reason="qwix, an optional dependency, is not installed")

    @cases
    def test_round_trip(self, qwix, case):
        q = hadamard_quantize(integers((4, 64), F32), case.qtype, **case.options)
        array = q.to_qwix()
        np.testing.assert_array_equal(qwix.dequantize(array), q.dequantize())
        back = QuantizedArray.from_qwix(array)
        np.testing.assert_array_equal(back.dequantize(), q.dequantize())
        assert (back.qtype, back.axis, back.block) == (q.qtype, q.axis, q.block)

    def test_from_its_own_quantiser(self, qwix):
        w = normal((64, 8), F32)
        array = qwix.quantize(w, "int8", channelwise_axes=(1,), tiled_axes={0: 16})
        q = QuantizedArray.from_qwix(array, axis=0)
        assert (q.axis, q.block) == (-2, 16)
        np.testing.assert_allclose(q.dequantize(), qwix.dequantize(array), rtol=1e-6)

    def test_other_layouts(self, qwix):
        w = normal((64, 8), F32)
        array = qwix.quantize(w, "int8", tiled_axes={0: 16})
        with pytest.raises(ValueError, match=r"from_qwix: with blocks along axis -2, scales must have shape \(4, 8\)"):
            QuantizedArray.from_qwix(array, axis=0)
        with pytest.raises(ValueError, match=r"from_qwix: qtype must be one of .*got nf4"):
            QuantizedArray.from_qwix(dataclasses.replace(array, qtype="nf4"))


@pytest.mark.usefixtures("x64_off")
@pytest.mark.parametrize("module", ["quantize", "_quantized_array", "_rotated_dot"])
def test_docstrings(module):
    results = doctest.testmod(importlib.import_module(f"jax_hadacore.{module}"))
    assert results.attempted
    assert not results.failed
