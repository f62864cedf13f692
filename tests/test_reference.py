"""The plain jax.numpy transform that serves where no kernel does."""
# ruff: noqa: E731

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ORDER_LENGTHS, assert_same_bits, dtypes, lengths, normal, rng, rows_for
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import HAS_WIDE_FLOAT64, bound, decompose, dense, error_in_roundings, round_to, transform

from jax_hadacore import _reference, hadamard

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@functools.partial(jax.jit, static_argnames=("scale", "length", "transpose"))
def reference(x, scale, **options):
    return _reference.transform(x, scale=scale, **options)


def assert_within_the_bound(y, exact, dtype, n):
    # float64 has no promised bound; XLA's products on the CPU measure up to 1.25 times what float32 is held to.
    limit = 1.5 * bound(dtype, n) if dtype == np.float64 else max(bound(dtype, n), 1.05)
    if dtype != np.float64 or HAS_WIDE_FLOAT64:
        assert error_in_roundings(np.asarray(y), exact, dtype) <= limit


def random_signs(n):
    return (2 * rng("signs", n).integers(2, size=n) - 1).astype(np.int8)


def orthogonal(k):
    return np.linalg.qr(rng("orthogonal", k).standard_normal((k, k)))[0]


@dtypes
@lengths(1, 2, 4, 8, 32, 128, 256, 2048, 8192, 16384, 32768, 2**17, *ORDER_LENGTHS, 344, 524)
def test_error_is_within_the_bound(n, dtype):
    x = normal((rows_for(n), n), dtype)
    assert_within_the_bound(reference(x, n**-0.5), transform(x), dtype, n)


@dtypes
@lengths(2, 256, 512, 65536, 24, 10944)
@pytest.mark.parametrize("scale", [1, 0.125])
def test_integers_are_rounded_once(n, dtype, scale):
    x = rng("reference", n).integers(-3, 4, (rows_for(n), n)).astype(dtype)
    y = np.asarray(reference(x, scale))
    np.testing.assert_array_equal(y.astype(np.float64), round_to(transform(x, scale), dtype).astype(np.float64))


@dtypes
@lengths(1, 16, 128, 256, 12, 40, 344, 864)
def test_one_hot_rows_are_rows_of_the_matrix(n, dtype):
    assert_same_bits(np.asarray(reference(np.eye(n, dtype=np.float32).astype(dtype), 1.0)), dense(n).astype(dtype))


def test_float16_sums_may_exceed_its_range():
    x = np.full((2, 4096), 60000, np.float16)
    assert np.asarray(reference(x, 1 / 4096))[:, 0].tolist() == [60000, 60000]


@dtypes
@lengths(512, 560)
def test_non_finite_values_stay_in_their_row(n, dtype):
    x = normal((5, n), dtype)
    clean = np.asarray(reference(x, 0.5))
    x[1, 7], x[3, n - 1] = np.nan, np.inf
    y = np.asarray(reference(x, 0.5))
    assert not np.isfinite(y[[1, 3]].astype(np.float64)).any()
    assert_same_bits(y[[0, 2, 4]], clean[[0, 2, 4]])


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 4), (16,), (2, 3, 4, 256), (0, 24), (24,), (2, 3, 40)], ids=str)
def test_shapes(shape):
    x = normal(shape, np.float32)
    y = reference(x, 1.0)
    assert y.shape == shape
    close(y, transform(x, 1))


class TestOptions:
    """Signs, blocks of the axis, a matrix in place of the orders, and the adjoint."""

    @dtypes
    @pytest.mark.parametrize("traced", [False, True], ids=["concrete", "traced"])
    @lengths(32, 24)
    def test_signs(self, n, traced, dtype):
        x, signs = normal((rows_for(n), n), dtype), random_signs(n)
        for transpose in (False, True):
            options = {"scale": 0.3, "transpose": transpose}
            if traced:
                y = reference(x, signs=signs, **options)
            else:
                y = jax.jit(functools.partial(_reference.transform, signs=signs, **options))(x)
            assert_within_the_bound(y, transform(x, signs=signs, **options), dtype, n)

    @dtypes
    @pytest.mark.parametrize("transpose", [False, True], ids=["forward", "transpose"])
    @pytest.mark.parametrize(("k", "n"), [(1, 16), (3, 3), (7, 28), (28, 448), (107, 1712)])
    def test_matrix(self, k, n, transpose, dtype):
        x, matrix = normal((rows_for(n), n), dtype), orthogonal(k)
        y = jax.jit(functools.partial(_reference.transform, scale=0.3, matrix=matrix, transpose=transpose))(x)
        exact = transform(x, 0.3, matrix=matrix, transpose=transpose)
        if dtype.itemsize == 2:
            assert_within_the_bound(y, exact, dtype, n)
        else:  # the entries are rounded, and each product is
            assert error_in_roundings(np.asarray(y), exact, dtype) <= np.hypot(bound(dtype, n), 2)

    @pytest.mark.parametrize("matrix", [None, orthogonal(6)], ids=["orders", "matrix"])
    @pytest.mark.parametrize("transpose", [False, True], ids=["forward", "transpose"])
    def test_blocks(self, transpose, matrix):
        x, signs = normal((2, 3, 5 * 24), np.float32), random_signs(24)
        options = {"scale": 0.3, "matrix": matrix, "signs": signs, "transpose": transpose}
        y = _reference.transform(x, length=24, **options)
        close(y, transform(x, length=24, **options))
        rows = _reference.transform(x.reshape(2, 3, 5, 24), **options)
        assert_same_bits(np.asarray(y), np.asarray(rows).reshape(x.shape))

    @pytest.mark.parametrize("matrix", [None, orthogonal(6)], ids=["orders", "matrix"])
    def test_transpose_is_the_adjoint(self, matrix):
        forward = functools.partial(_reference.transform, scale=0.3, matrix=matrix, signs=random_signs(24))
        x, g = normal((2, 5, 24), np.float64)
        y, pullback = jax.vjp(forward, x)
        close(pullback(g)[0], forward(g, transpose=True))
        if matrix is None:
            close(forward(y, scale=1 / 0.3 / 24, transpose=True), x)


def products(jaxpr):
    """All products of matrices, those of loops included, and the sizes of all arrays."""
    found, sizes = [], []
    for equation in jaxpr.eqns:
        sizes += [variable.aval.size for variable in equation.outvars]
        if equation.primitive.name == "dot_general":
            found.append(equation)
        if "jaxpr" in equation.params:
            inner, inner_sizes = products(equation.params["jaxpr"].jaxpr)
            found, sizes = found + inner, sizes + inner_sizes
    return found, sizes


@dtypes
@lengths(*(2**bits for bits in range(0, 25, 4)), *ORDER_LENGTHS)
def test_matrix_products_are_small_and_precise(n, dtype):
    x = jax.ShapeDtypeStruct((2, n), dtype)
    found, sizes = products(jax.make_jaxpr(functools.partial(_reference.transform, scale=1.0))(x).jaxpr)
    for product in found:
        matrix, right = (operand.aval for operand in product.invars)
        ((contracted,), _), _ = product.params["dimension_numbers"]
        assert matrix.shape[contracted] <= 4
        assert matrix.dtype == right.dtype == (np.float64 if dtype == np.float64 else np.float32)
        assert set(product.params["precision"]) == {jax.lax.Precision.HIGHEST}
    *orders, power = decompose(n)
    assert len(found) == len(orders) + -(-(power.bit_length() - 1) // 2)
    assert max(sizes) <= 2 * x.size


@pytest.mark.usefixtures("no_kernel")
class TestInPlaceOfTheKernel:
    """The primitive's rules hold whatever serves."""

    X = normal((4, 3, 64), np.float32)

    def test_value(self):
        x = self.X
        assert "jax_hadacore_hadamard" not in jax.jit(hadamard).lower(x).as_text()
        close(hadamard(x), transform(x))
        close(jax.jit(lambda x: hadamard(x, scale=-0.3, inplace=True))(x), transform(x, -0.3))

    def test_value_of_an_order(self):
        x = normal((4, 3, 40), np.float32)
        close(hadamard(x), transform(x))

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_vmap(self, axis):
        x = np.moveaxis(self.X, -1, axis)
        for mapped in range(3):
            if mapped != axis:
                inner = axis - (mapped < axis)
                y = jax.vmap(lambda x, a=inner: hadamard(x, axis=a), in_axes=mapped, out_axes=mapped)(x)
                close(np.moveaxis(np.asarray(y), axis, -1), transform(self.X))

    def test_derivatives(self):
        loss = lambda x: jnp.sum(jnp.sin(hadamard(x, scale=0.3)))
        close(jax.grad(loss)(self.X), transform(np.cos(transform(self.X, 0.3)), 0.3))
        h = dense(4) * 0.3
        row = self.X[0, 0, :4]
        expected = -(h.T * np.sin(h @ row)) @ h
        close(jax.hessian(loss)(row), expected)

    def test_complex(self):
        z = (self.X + 1j * self.X[::-1]).astype(np.complex64)
        close(hadamard(z), transform(self.X) + 1j * transform(self.X[::-1]))

    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
    @pytest.mark.parametrize("spec", [P("b"), P(None, None, "b")], ids=["batch", "last"])
    @lengths(64, 40)
    def test_sharded(self, cpu_devices, kind, spec, n):
        mesh = Mesh(np.array(cpu_devices), ("b",), axis_types=(kind,))
        value = normal((4, 3, n), np.float32)
        with jax.set_mesh(mesh):
            x = jax.device_put(value, NamedSharding(mesh, spec))
            call = jax.jit(hadamard)
            y = call(x)
            close(y, transform(value))
            assert y.sharding.is_equivalent_to(x.sharding, 3) or kind == AxisType.Auto
            if spec == P("b"):
                assert "all-gather" not in call.lower(x).compile().as_text()
            gradient = jax.jit(jax.grad(lambda x: jnp.sum(hadamard(x) ** 2)))(x)
            close(gradient, 2 * value, rtol=1e-4, atol=1e-4)

    @lengths(64, 40)
    def test_shard_map(self, cpu_devices, n):
        mesh = Mesh(np.array(cpu_devices), ("b",), axis_types=(AxisType.Auto,))
        x = normal((4, 3, n), np.float32)
        local = jax.shard_map(hadamard, mesh=mesh, in_specs=P("b"), out_specs=P("b"))
        close(jax.jit(local)(x), transform(x))
