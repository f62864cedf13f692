"""Exported programs: saved and loaded, differentiated, for several platforms, of symbolic sizes, and sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, assert_same_bits, normal, rng
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import transform

from jax_hadacore import EXPORT_SAFETY_CHECKS, hadamard

TARGET = "jax_hadacore_hadamard_v1"
SCALE = 0.3
X = normal((8, 64), np.float32)

f = functools.partial(hadamard, scale=SCALE)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@pytest.fixture
def platform():
    return {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


def saved(function, *args, vjp_order=0, **options):
    """The function after a round trip through bytes."""
    exported = export.export(jax.jit(function), disabled_checks=EXPORT_SAFETY_CHECKS, **options)(*args)
    return export.deserialize(exported.serialize(vjp_order=vjp_order))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_keeps_every_bit(dtype):
    x = normal((5, 64), dtype)
    assert_same_bits(np.asarray(saved(f, x).call(x)), np.asarray(f(x)))


def test_derivatives():
    loaded = saved(f, X, vjp_order=2)
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(loaded.call(x))))
    close(gradient(X), transform(np.cos(transform(X, SCALE)), SCALE))
    second = jax.grad(lambda x: jnp.sum(gradient(x) ** 2))
    expected = jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))(x) ** 2))
    close(second(X), expected(X), rtol=1e-4, atol=1e-4)


ROTATION = np.linalg.qr(normal((5, 5), np.float64))[0]
SIGNS = rng("signs").choice(np.array([-1, 1], np.int8), 64)


@pytest.mark.parametrize(
    ("n", "options"),
    [
        (24, {}),
        (10944, {}),
        (64, {"block_size": 16}),
        (64, {"signs": SIGNS}),
        (64, {"block_size": 16, "signs": SIGNS[:16], "transpose": True}),
        (40, {"matrix": ROTATION, "transpose": True}),
    ],
    ids=str,
)
def test_options(n, options):
    x = normal((5, n), np.float32)
    call = functools.partial(hadamard, **options)
    loaded = saved(call, x, platforms=["cpu", "cuda"], vjp_order=1)
    assert_same_bits(np.asarray(loaded.call(x)), np.asarray(call(x)))
    gradient = jax.grad(lambda x: jnp.vdot(loaded.call(x), x[::-1]))(x)
    close(gradient, jax.grad(lambda x: jnp.vdot(call(x), x[::-1]))(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transpose", [False, True])
def test_traced_signs(transpose, cpu_devices):
    call = functools.partial(hadamard, block_size=32, transpose=transpose)
    loaded = saved(lambda x, s: call(x, signs=s), X, SIGNS[:32], vjp_order=1, platforms=["cpu"])
    on_cpu = jax.device_put(X, cpu_devices[0])
    expected = np.asarray(call(on_cpu, signs=SIGNS[:32]))
    assert_same_bits(np.asarray(loaded.call(on_cpu, SIGNS[:32])), expected)
    # The program says nothing of devices: it also runs where a batch is sharded.
    mesh = Mesh(np.array(cpu_devices), ("b",), axis_types=(AxisType.Auto,))
    x = jax.device_put(X, NamedSharding(mesh, P("b")))
    sharded = jax.jit(loaded.call)
    assert_same_bits(np.asarray(sharded(x, SIGNS[:32])), expected)
    assert "all-gather" not in sharded.lower(x, SIGNS[:32]).compile().as_text()


def test_several_platforms(platform):
    loaded = saved(f, X, platforms=["cpu", "cuda"])
    assert loaded.platforms == ("cpu", "cuda")
    assert platform in loaded.platforms
    close(loaded.call(X), transform(X, SCALE))


def test_is_refused_without_the_safety_check():
    with pytest.raises(ValueError, match=TARGET):
        export.export(jax.jit(f))(X)


class TestSymbolicSizes:
    def test_batch(self):
        (b,) = export.symbolic_shape("b")
        loaded = saved(f, jax.ShapeDtypeStruct((b, 64), jnp.float32), vjp_order=1)
        for rows in (1, 3, 8):
            close(loaded.call(X[:rows]), transform(X[:rows], SCALE))
        close(jax.grad(lambda x: jnp.sum(loaded.call(x) ** 2))(X), 2 * transform(transform(X, SCALE), SCALE), rtol=1e-4)

    def test_several_batch_axes(self):
        shape = export.symbolic_shape("a, b, 64")
        loaded = saved(f, jax.ShapeDtypeStruct(shape, jnp.float32), platforms=["cpu", "cuda"])
        x = X.reshape(2, 4, 64)
        close(loaded.call(x), transform(x, SCALE))

    def test_another_axis_and_vmap(self):
        (b,) = export.symbolic_shape("b")
        x = jax.ShapeDtypeStruct((64, b), jnp.float32)
        close(saved(functools.partial(f, axis=0), x).call(X.T), transform(X, SCALE).T)
        close(saved(jax.vmap(f, in_axes=1, out_axes=1), x).call(X.T), transform(X, SCALE).T)

    def test_options(self):
        (b,) = export.symbolic_shape("b")
        x = jax.ShapeDtypeStruct((b, 64), jnp.float32)
        loaded = saved(functools.partial(hadamard, block_size=16, signs=SIGNS[:16]), x)
        close(loaded.call(X[:3]), transform(X[:3], length=16, signs=SIGNS[:16]))
        traced = saved(lambda x, s: hadamard(x, signs=s), x, jax.ShapeDtypeStruct((64,), jnp.int8))
        close(traced.call(X[:3], SIGNS), transform(X[:3], signs=SIGNS))

    def test_derived_size(self):
        (b,) = export.symbolic_shape("b")
        loaded = saved(lambda x: f(x.reshape(-1, 32)), jax.ShapeDtypeStruct((b, 64), jnp.float32))
        close(loaded.call(X[:3]), transform(X[:3].reshape(-1, 32), SCALE))

    def test_the_transformed_axis_must_be_static(self):
        (n,) = export.symbolic_shape("n")
        with pytest.raises(ValueError, match="hadamard: the transformed axis must have a static size, got n"):
            saved(f, jax.ShapeDtypeStruct((4, n), jnp.float32))


class TestSharded:
    @pytest.fixture
    def sharding(self, cpu_devices):
        return NamedSharding(Mesh(np.array(cpu_devices), ("b",), axis_types=(AxisType.Auto,)), P("b"))

    def load(self, sharding, x):
        function = jax.jit(f, in_shardings=sharding, out_shardings=sharding)
        exported = export.export(function, platforms=["cpu"], disabled_checks=EXPORT_SAFETY_CHECKS)(x)
        return jax.jit(export.deserialize(exported.serialize()).call)

    def test_no_communication_after_loading(self, sharding):
        x = jax.device_put(X, sharding)
        loaded = self.load(sharding, X)
        text = loaded.lower(x).compile().as_text()
        assert TARGET in text
        assert "all-gather" not in text
        close(loaded(x), transform(X, SCALE))

    def test_symbolic_batch(self, sharding):
        (b,) = export.symbolic_shape("b", constraints=["mod(b, 4) == 0"])
        x = jax.device_put(X, sharding)
        loaded = self.load(sharding, jax.ShapeDtypeStruct((b, 64), jnp.float32))
        assert "all-gather" not in loaded.lower(x).compile().as_text()
        close(loaded(x), transform(X, SCALE))
