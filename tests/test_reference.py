"""The plain jax.numpy transform that serves where no kernel does."""
# ruff: noqa: E731

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, assert_same_bits, dtypes, lengths, normal, rng, rows_for
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import HAS_WIDE_FLOAT64, bound, dense, error_in_roundings, round_to, transform

from jax_hadacore import _reference, hadamard

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@functools.partial(jax.jit, static_argnames="scale")
def reference(x, scale):
    return _reference.transform(x, scale=scale)


@dtypes
@lengths(1, 2, 4, 8, 32, 128, 256, 2048, 8192, 16384, 32768, 2**17)
def test_error_is_within_the_bound(n, dtype):
    x = normal((rows_for(n), n), dtype)
    y = np.asarray(reference(x, n**-0.5))
    # float64 has no promised bound; XLA's products on the CPU measure up to 1.25 times what float32 is held to.
    limit = 1.5 * bound(dtype, n) if dtype == np.float64 else max(bound(dtype, n), 1.05)
    if dtype != np.float64 or HAS_WIDE_FLOAT64:
        assert error_in_roundings(y, transform(x), dtype) <= limit


@dtypes
@lengths(2, 256, 512, 65536)
@pytest.mark.parametrize("scale", [1, 0.125])
def test_integers_are_rounded_once(n, dtype, scale):
    x = rng("reference", n).integers(-3, 4, (rows_for(n), n)).astype(dtype)
    y = np.asarray(reference(x, scale))
    np.testing.assert_array_equal(y.astype(np.float64), round_to(transform(x, scale), dtype).astype(np.float64))


@dtypes
@lengths(1, 16, 128, 256)
def test_one_hot_rows_are_rows_of_the_matrix(n, dtype):
    assert_same_bits(np.asarray(reference(np.eye(n, dtype=np.float32).astype(dtype), 1.0)), dense(n).astype(dtype))


def test_float16_sums_may_exceed_its_range():
    x = np.full((2, 4096), 60000, np.float16)
    assert np.asarray(reference(x, 1 / 4096))[:, 0].tolist() == [60000, 60000]


@dtypes
def test_non_finite_values_stay_in_their_row(dtype):
    x = normal((5, 512), dtype)
    clean = np.asarray(reference(x, 0.5))
    x[1, 7], x[3, 511] = np.nan, np.inf
    y = np.asarray(reference(x, 0.5))
    assert not np.isfinite(y[[1, 3]].astype(np.float64)).any()
    assert_same_bits(y[[0, 2, 4]], clean[[0, 2, 4]])


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 4), (16,), (2, 3, 4, 256)], ids=str)
def test_shapes(shape):
    x = normal(shape, np.float32)
    y = reference(x, 1.0)
    assert y.shape == shape
    close(y, transform(x, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", range(0, 25, 4))
def test_matrix_products_are_small_and_precise(bits, dtype):
    x = jax.ShapeDtypeStruct((2, 2**bits), dtype)
    jaxpr = jax.make_jaxpr(functools.partial(_reference.transform, scale=1.0))(x)
    products = [equation for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]
    sizes = []
    for product in products:
        left, matrix = (operand.aval for operand in product.invars)
        ((contracted,), _), _ = product.params["dimension_numbers"]
        sizes.append(left.shape[contracted])
        assert matrix.shape == (sizes[-1], sizes[-1])
        assert sizes[-1] <= 128
        assert set(product.params["precision"]) == {jax.lax.Precision.HIGHEST}
        assert product.params["preferred_element_type"] == (jnp.float64 if dtype == np.float64 else jnp.float32)
    assert np.prod(sizes, initial=1) == 2**bits
    assert len(sizes) == -(-bits // (_reference._MAX_FACTOR.bit_length() - 1))


@pytest.mark.usefixtures("no_kernel")
class TestInPlaceOfTheKernel:
    """The primitive's rules hold whatever serves."""

    X = normal((4, 3, 64), np.float32)

    def test_value(self):
        x = self.X
        assert "jax_hadacore_hadamard" not in jax.jit(hadamard).lower(x).as_text()
        close(hadamard(x), transform(x))
        close(jax.jit(lambda x: hadamard(x, scale=-0.3, inplace=True))(x), transform(x, -0.3))

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
    def test_sharded(self, cpu_devices, kind, spec):
        mesh = Mesh(np.array(cpu_devices), ("b",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            x = jax.device_put(self.X, NamedSharding(mesh, spec))
            call = jax.jit(hadamard)
            y = call(x)
            close(y, transform(self.X))
            assert y.sharding.is_equivalent_to(x.sharding, 3) or kind == AxisType.Auto
            if spec == P("b"):
                assert "all-gather" not in call.lower(x).compile().as_text()
            gradient = jax.jit(jax.grad(lambda x: jnp.sum(hadamard(x) ** 2)))(x)
            close(gradient, 2 * self.X, rtol=1e-4, atol=1e-4)

    def test_shard_map(self, cpu_devices):
        mesh = Mesh(np.array(cpu_devices), ("b",), axis_types=(AxisType.Auto,))
        local = jax.shard_map(hadamard, mesh=mesh, in_specs=P("b"), out_specs=P("b"))
        close(jax.jit(local)(self.X), transform(self.X))
