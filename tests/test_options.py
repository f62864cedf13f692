"""The options of the map, block_size, signs, matrix and transpose, by its definition and in every combination."""
# ruff: noqa: E731

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, assert_same_bits, dtypes, lengths, normal, rng, rows_for
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import bound, dense, error_in_roundings, transform

import jax_hadacore
from jax_hadacore import hadamard, random_signs

close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)


def draw_signs(n, *key):
    return rng("signs", n, *key).choice(np.array([-1, 1], np.int8), n)


def rotation(k):
    """A random orthogonal matrix, far from symmetric."""
    return np.linalg.qr(rng("rotation", k).standard_normal((k, k)))[0]


def signed(k):
    """A matrix of +-1 with orthogonal rows that is not symmetric."""
    m = dense(k) * draw_signs(k, "rows")[:, None]
    return m[rng("order", k).permutation(k)]


MATRICES = {
    "signs": signed(12),
    "normalised": signed(20) / np.sqrt(20),
    "rotation": rotation(5),
    "scaled": 3 * rotation(7),
    "one": np.array([[-2.0]]),
    "power-of-two": rotation(8),
}
matrices = pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
transposed = pytest.mark.parametrize("transpose", [False, True], ids=["map", "adjoint"])


def limit(dtype, n, matrix=None):
    """The error in roundings that is allowed. A caller's matrix of other entries than +-1 is rounded to float32."""
    if matrix is None:
        return bound(dtype, n)
    if dtype.itemsize == 2:
        return 1.05
    # Products are rounded, too, and so are the entries and the scale.
    return 2 * 1.2 * math.sqrt(math.log2(n) + 1) + 1


def check(x, **options):
    """hadamard(x), after its error is compared with what is promised."""
    y = hadamard(x, **options)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    names = {"block_size": "length"}
    expected = transform(x, **{names.get(name, name): value for name, value in options.items() if name != "axis"})
    n = options.get("block_size", x.shape[-1])
    error = error_in_roundings(np.asarray(y), expected, x.dtype)
    assert error <= limit(x.dtype, n, options.get("matrix")) + (options.get("scale") is not None)
    return np.asarray(y)


class TestBlockSize:
    @dtypes
    @pytest.mark.parametrize(
        ("block", "count"), [(1, 8), (2, 3), (8, 5), (128, 3), (12, 4), (24, 1), (20, 3), (768, 2)], ids=str
    )
    def test_is_the_transform_of_each_block(self, dtype, block, count):
        rows = rows_for(count * block)
        x = normal((rows, count * block), dtype)
        y = check(x, block_size=block)
        assert_same_bits(y, np.asarray(hadamard(x.reshape(rows, count, block))).reshape(x.shape))

    def test_of_a_length_without_a_transform(self):
        check(normal((2, 13696), np.dtype(np.float32)), block_size=128)

    @pytest.mark.parametrize("axis", [0, 1, -2])
    def test_of_another_axis(self, axis):
        x = normal((6, 10, 6), np.dtype(np.float64))
        y = hadamard(np.moveaxis(x, 0, axis), axis=axis, block_size=2)
        close(np.moveaxis(np.asarray(y), axis, 0), np.moveaxis(transform(np.moveaxis(x, 0, -1), length=2), -1, 0))

    def test_default_scale_is_that_of_the_block(self):
        close(hadamard(np.ones((1, 8)), block_size=4), [[2, 0, 0, 0] * 2])

    @pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)], ids=str)
    def test_no_rows(self, shape):
        assert hadamard(jnp.zeros(shape), block_size=2).shape == shape


class TestSigns:
    @dtypes
    @lengths(1, 2, 4, 32, 1024, 12, 24, 80, 768)
    @transposed
    def test_values(self, n, dtype, transpose):
        check(normal((rows_for(n), n), dtype), signs=draw_signs(n), transpose=transpose)

    def test_asymmetric_by_hand(self):
        x, s = np.array([1.0, 2.0]), [1, -1]
        close(hadamard(x, signs=s, scale=1), [-1, 3])
        close(hadamard(x, signs=s, scale=1, transpose=True), [3, 1])

    @lengths(8, 132, 24, 1024)
    def test_the_adjoint_is_the_inverse(self, n):
        x, s = normal((5, n), np.dtype(np.float64)), draw_signs(n)
        close(hadamard(hadamard(x, signs=s), signs=s, transpose=True), x)
        close(hadamard(hadamard(x, signs=s, transpose=True), signs=s), x)

    @dtypes
    @pytest.mark.parametrize(("n", "blocks"), [(64, 1), (24, 1), (32, 3), (12, 2)], ids=str)
    @transposed
    def test_every_way_to_give_them_has_the_same_bits(self, dtype, n, blocks, transpose):
        x, s = normal((3, n * blocks), dtype), draw_signs(n)
        options = {"transpose": transpose, "block_size": n}
        ours = functools.partial(hadamard, **options)
        if transpose:
            expected = np.asarray(hadamard(x, block_size=n)) * np.tile(s, blocks).astype(dtype)
        else:
            expected = np.asarray(hadamard(x * np.tile(s, blocks).astype(dtype), block_size=n))
        ways = {
            "list": ours(x, signs=s.tolist()),
            "numpy": ours(jnp.asarray(x), signs=s.astype(np.float32)),
            "jax": ours(x, signs=jnp.asarray(s, jnp.bfloat16)),
            "constant": jax.jit(functools.partial(ours, signs=s))(x),
            "traced": jax.jit(lambda x, s: ours(x, signs=s))(x, s),
            "traced float": jax.jit(lambda x, s: ours(x, signs=s))(x, s.astype(np.float64)),
            "of the axis": ours(x, signs=np.tile(s, blocks)),
            "of the axis, traced": jax.jit(lambda x, s: ours(x, signs=s))(x, np.tile(s, blocks)),
            "vmap": jax.vmap(lambda s: ours(x, signs=s))(s[None])[0],
            "vmap of both": jax.vmap(lambda x, s: ours(x, signs=s))(x[None], s[None])[0],
        }
        for way, y in ways.items():
            np.testing.assert_array_equal(np.asarray(y), expected, err_msg=way)

    @dtypes
    def test_subnormal_numbers_are_kept_wherever_signs_are_applied(self, dtype):
        s = draw_signs(64)
        tiny = jnp.finfo(dtype).smallest_subnormal
        x = (rng("tiny").integers(1, 4, (4, 64)).astype(np.float64) * float(tiny)).astype(dtype)
        for transpose in (False, True):
            call = lambda x, s, transpose=transpose: hadamard(x, scale=1, signs=s, transpose=transpose)
            expected = np.asarray(call(x, s))
            assert np.all(expected.astype(np.float64) == transform(x, 1, signs=s, transpose=transpose))
            assert_same_bits(np.asarray(jax.vmap(call, in_axes=(None, 0))(x, s[None])[0]), expected)

    def test_signs_of_each_block(self):
        x, s = normal((3, 4 * 24), np.dtype(np.float64)), draw_signs(4 * 24)
        y = hadamard(x, block_size=24, signs=s)
        close(y, transform(x * s, length=24))
        close(hadamard(y, block_size=24, signs=s, transpose=True), x)

    def test_of_another_axis(self):
        x, s = normal((24, 3), np.dtype(np.float64)), draw_signs(24)
        close(hadamard(x, axis=0, signs=s), transform(x.T, signs=s).T)
        close(jax.jit(lambda x, s: hadamard(x, axis=0, signs=s, transpose=True))(x, s), transform(x.T).T * s[:, None])

    def test_complex(self):
        z = normal((2, 3, 24), np.dtype(np.float64))
        s = draw_signs(24)
        close(hadamard(z[0] + 1j * z[1], signs=s), transform(z[0], signs=s) + 1j * transform(z[1], signs=s))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_not_finite_rows_stay_alone(self, dtype):
        x, s = normal((3, 24), dtype), draw_signs(24)
        spoilt = x.copy()
        spoilt[1, 5] = np.nan
        y, clean = np.asarray(hadamard(spoilt, signs=s)), np.asarray(hadamard(x, signs=s))
        assert not np.isfinite(y[1].astype(np.float64)).any()
        assert_same_bits(y[[0, 2]], clean[[0, 2]])

    def test_traced_values_below_zero_are_minus(self):
        x, s = normal((3, 8), np.dtype(np.float64)), draw_signs(8)
        close(jax.jit(lambda x, s: hadamard(x, signs=s))(x, 0.3 * s), transform(x, signs=s))


class TestRandomSigns:
    @pytest.mark.parametrize("n", [1, 24, 4096])
    def test_values(self, n):
        s = random_signs(jax.random.key(1), n)
        assert (s.shape, s.dtype) == ((n,), jnp.int8)
        assert set(np.unique(s)) <= {-1, 1}
        assert abs(np.mean(s)) <= 4 / math.sqrt(n)
        np.testing.assert_array_equal(s, random_signs(jax.random.key(1), n))

    def test_keys_differ(self):
        assert (random_signs(jax.random.key(1), 64) != random_signs(jax.random.key(2), 64)).any()

    def test_dtype(self):
        s = random_signs(jax.random.key(1), 24, jnp.bfloat16)
        assert s.dtype == jnp.bfloat16
        close(hadamard(np.ones(24), signs=s), transform(np.ones(24), signs=s))


class TestMatrix:
    @dtypes
    @matrices
    @pytest.mark.parametrize(("power", "transpose"), [(1, False), (4, True), (32, False)], ids=str)
    def test_values(self, dtype, matrix, power, transpose):
        n = len(matrix) * power
        x = normal((rows_for(n), n), dtype)
        check(x, matrix=matrix, transpose=transpose)
        check(x, matrix=matrix, transpose=transpose, scale=0.3)

    @matrices
    def test_acts_on_the_slow_index(self, matrix):
        x = normal((len(matrix), 4), np.dtype(np.float64))
        y = hadamard(x.reshape(-1), matrix=matrix, scale=0.5)
        close(y.reshape(x.shape), 0.5 * matrix @ x @ dense(4))

    @matrices
    def test_the_adjoint_is_the_inverse(self, matrix):
        x = normal((2, len(matrix) * 8), np.dtype(np.float64))
        close(hadamard(hadamard(x, matrix=matrix), matrix=matrix, transpose=True), x)

    def test_of_a_known_order_is_the_same_map(self):
        x = normal((3, 96), np.dtype(np.float32))
        assert_same_bits(np.asarray(hadamard(x, matrix=dense(12))), np.asarray(hadamard(x)))
        s = draw_signs(96)
        assert_same_bits(np.asarray(hadamard(x, matrix=dense(12), signs=s)), np.asarray(hadamard(x, signs=s)))

    @pytest.mark.parametrize("dtype", [np.int8, np.int64, jnp.bfloat16, np.float16, np.float32, np.float64])
    def test_dtypes(self, dtype):
        x = normal((3, 48), np.dtype(np.float64))
        m = signed(12)
        for each in (m.astype(dtype), jnp.asarray(m, dtype)):
            close(hadamard(x, matrix=each), transform(x, matrix=m))
        close(hadamard(x, matrix=m.tolist()), transform(x, matrix=m))

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
    def test_rounded_entries_are_taken_as_they_are(self, dtype):
        x, m = normal((3, 20), np.dtype(np.float64)), rotation(5).astype(dtype)
        close(hadamard(x, matrix=m, scale=1), transform(x, 1, matrix=m.astype(np.float64)))

    @pytest.mark.parametrize("size", [1e-40, 1e-30, 1e30, 1e60])
    def test_entries_of_any_size(self, size):
        x = normal((500, 20), np.dtype(np.float32))
        y, expected = hadamard(x, matrix=size * rotation(5)), hadamard(x, matrix=rotation(5))
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-6)

    def test_the_largest_order(self):
        check(normal((2, 1024), np.dtype(np.float32)), matrix=rotation(1024))

    def test_with_blocks(self):
        x = normal((3, 5 * 24), np.dtype(np.float64))
        m = rotation(3)
        close(hadamard(x, matrix=m, block_size=24), transform(x, matrix=m, length=24))


@st.composite
def calls(draw):
    """An array and options for it, and the same options for the oracle."""
    dtype = draw(st.sampled_from(DTYPES))
    matrix = draw(st.sampled_from([None, None, *MATRICES.values()]))
    order = draw(st.sampled_from([1, 12, 20, 28])) if matrix is None else len(matrix)
    n = order << draw(st.integers(0, 5))
    blocks = draw(st.integers(1, 3))
    options = {"block_size": n} if blocks > 1 or draw(st.booleans()) else {}
    if matrix is not None:
        options["matrix"] = matrix
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([1, -0.3, 0.01]))
    options["transpose"] = draw(st.booleans())
    signs = draw_signs(n, draw(st.integers(0, 3))) if draw(st.booleans()) else None
    batch = draw(st.lists(st.integers(1, 3), max_size=2))
    axis = draw(st.integers(0, len(batch)))
    return dtype, batch, n, blocks, axis, options, signs


def by_definition(x, axis, n, signs, options):
    rest = {name: value for name, value in options.items() if name != "block_size"}
    return np.moveaxis(transform(np.moveaxis(x, axis, -1), length=n, signs=signs, **rest), -1, axis)


class TestCombinations:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(calls())
    def test_values(self, call):
        dtype, batch, n, blocks, axis, options, signs = call
        shape = [*batch[:axis], n * blocks, *batch[axis:]]
        x = normal((*shape[:-1], shape[-1]), dtype)
        expected = by_definition(x, axis, n, signs, options)
        calls = {
            "eager": hadamard(x, axis=axis, signs=signs, **options),
            "jit": jax.jit(lambda x, s: hadamard(x, axis=axis, signs=s, **options))(x, signs),
        }
        allowed = limit(dtype, n, options.get("matrix")) + 1
        for way, y in calls.items():
            small = max(1.0, 8 / math.sqrt(x.size))  # few elements make a statistic of few roundings
            assert error_in_roundings(np.asarray(y), expected, dtype) <= allowed * small, way
        assert_same_bits(np.asarray(calls["eager"]), np.asarray(calls["jit"]))

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(calls())
    def test_the_adjoint_identity(self, call):
        _, batch, n, blocks, axis, options, signs = call
        shape = (*batch[:axis], n * blocks, *batch[axis:])
        a, b = normal((2, *shape), np.dtype(np.float64))
        f = lambda x, **more: hadamard(x, axis=axis, signs=signs, **{**options, **more})
        adjoint = f(b, transpose=not options["transpose"])
        close(np.vdot(f(a), b), np.vdot(a, adjoint), rtol=1e-10, atol=1e-10)
        (pulled,) = jax.linear_transpose(f, a)(b)
        close(pulled, adjoint)
        close(jax.jvp(f, (a,), (b,))[1], f(b))


def test_public_names():
    public = {
        "CONVENTION", "EXPORT_SAFETY_CHECKS", "decompose", "hadamard", "hadamard_matrix", "hadamard_p",
        "hadamard_sharded", "is_supported", "random_signs",
    }  # fmt: skip
    assert public <= set(vars(jax_hadacore))
