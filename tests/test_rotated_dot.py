"""rotated_dot_general: the product of what quantisation leaves of both operands, in any layout, and its gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal, rng
from hlo import collectives, hlo
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from quantize_cases import FORMATS, Case

from jax_hadacore import hadamard, hadamard_fake_quantize, hadamard_quantize, rotated_dot_general

F32 = np.float32
SIGNS = rng("signs").choice(np.array([-1, 1], np.int8), 64)
LAST = (((1,), (1,)), ((), ()))
qtypes = pytest.mark.parametrize("qtype", FORMATS)
# Shapes and the axes of x and w: contracted, then of the batch.
LAYOUTS = {
    "x @ w": ((5, 64), (64, 7), (((1,), (0,)), ((), ()))),
    "x @ w.T": ((5, 64), (7, 64), LAST),
    "x.T @ w": ((64, 5), (64, 7), (((0,), (0,)), ((), ()))),
    "several free axes": ((2, 3, 64), (4, 64, 5, 6), (((2,), (1,)), ((), ()))),
    "vectors": ((64,), (64,), (((0,), (0,)), ((), ()))),
    "a batch": ((2, 5, 64), (2, 64, 7), (((2,), (1,)), ((0,), (0,)))),
    "a batch elsewhere": ((5, 2, 64, 3), (64, 7, 3, 2), (((2,), (0,)), ((1, 3), (3, 2)))),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def operands(layout, dtype=F32):
    x, w, dims = LAYOUTS[layout]
    return normal(x, dtype, "x"), normal(w, dtype, "w"), dims


def quantized(x, qtype, axis, **options):
    """What quantisation leaves, in float64, by the oracle, from the library's own float32 transform."""
    w = np.asarray(hadamard(np.moveaxis(x, axis, -1).astype(F32), **options))
    return np.moveaxis(Case(qtype).oracle(w).values.astype(float), -1, axis)


def product(x, w, dims):
    """dot_general in float64."""
    (contracted, batch) = dims
    letters = iter("abcdefghijkl")
    names = [[next(letters) for _ in range(array.ndim)] for array in (x, w)]
    for pairs in (contracted, batch):
        for i, j in zip(*pairs, strict=True):
            names[1][j] = names[0][i]
    shared = [names[0][i] for i in batch[0]]
    free = [name for array, axes in zip(names, contracted, strict=True) for name in array if name not in shared]
    free = [name for name in free if name != names[0][contracted[0][0]]]
    return np.einsum(f"{''.join(names[0])},{''.join(names[1])}->{''.join(shared + free)}", x, w)


@layouts
@qtypes
def test_is_the_product_of_quantised_operands(layout, qtype):
    x, w, dims = operands(layout)
    (contracted, _) = dims
    exact = product(*(quantized(a, qtype, *axes) for a, axes in zip((x, w), contracted, strict=True)), dims)
    y = rotated_dot_general(x, w, dims, "highest", qtype=qtype)
    assert y.dtype == F32
    assert y.shape == lax.dot_general(x, w, dims).shape
    np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"signs": SIGNS}, {"block_size": 16}, {"matrix": np.eye(4)}, {"granularity": ("block", 16)}], ids=str
)
@pytest.mark.parametrize("qtype", ["float8_e4m3fn", "int8", "int4"])
def test_options(qtype, options):
    x, w, dims = operands("x @ w")
    rotation = {key: value for key, value in options.items() if key != "granularity"}
    left = hadamard_quantize(x, qtype, **options).dequantize()
    right = hadamard_quantize(w, qtype, axis=0, **options).dequantize()
    y = rotated_dot_general(x, w, dims, "highest", qtype=qtype, **options)
    np.testing.assert_allclose(y, np.asarray(left) @ np.asarray(right), rtol=1e-4, atol=1e-4)
    rotated = (np.asarray(hadamard(x, **rotation)), np.asarray(hadamard(w, axis=0, **rotation)))
    np.testing.assert_allclose(np.matmul(*rotated), x @ w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, F32], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("qtype", ["float8_e4m3fn", "int8"])
def test_dtypes(dtype, qtype):
    x, w, dims = operands("x @ w", dtype)
    y, wide = (rotated_dot_general(x, w, dims, None, kind, qtype=qtype) for kind in (None, F32))
    assert y.dtype == dtype
    assert wide.dtype == F32
    np.testing.assert_array_equal(wide.astype(dtype), y)


def test_outliers_need_the_rotation():
    x, w = normal((64, 1024), F32), normal((32, 1024), F32)
    x[:, 7] *= 100
    exact = x.astype(float) @ w.T
    error = lambda y: np.std(np.asarray(y, float) - exact)  # noqa: E731
    plain = functools.partial(rotated_dot_general, x, w, LAST, qtype="int8")
    assert error(plain()) < error(plain(block_size=1)) / 4


def test_sums_of_integers_are_exact():
    x = rng("x").integers(-127, 128, (16, 32768)).astype(F32)
    x[:, 0] = 127  # so that the scale is 1
    y = rotated_dot_general(x, x, LAST, None, F32, qtype="int8", block_size=1)
    np.testing.assert_array_equal(y, (x.astype(np.int64) @ x.astype(np.int64).T).astype(F32))


class TestQuantizedOperand:
    @layouts
    @pytest.mark.parametrize("qtype", ["float8_e4m3fn", "int8", "int4", "nvfp4"])
    def test_gives_the_same(self, layout, qtype):
        x, w, dims = operands(layout, jnp.bfloat16)
        ((i,), (j,)), _ = dims
        dot = functools.partial(rotated_dot_general, dimension_numbers=dims, qtype=qtype)
        expected = dot(x, w)
        np.testing.assert_array_equal(dot(x, hadamard_quantize(w, qtype, axis=j)), expected)
        np.testing.assert_array_equal(dot(hadamard_quantize(x, qtype, axis=i), w), expected)

    def test_blocks(self):
        x, w, dims = operands("x @ w")
        right = hadamard_quantize(w, "int8", axis=0, granularity=("block", 16))
        y = rotated_dot_general(x, right, dims, "highest", qtype="int8")
        left = hadamard_quantize(x, "int8").dequantize()
        np.testing.assert_allclose(y, np.asarray(left) @ np.asarray(right.dequantize()), rtol=1e-5, atol=1e-5)

    def test_is_a_constant(self):
        x, w, dims = operands("x @ w")
        right = hadamard_quantize(w, "int8", axis=0)
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(rotated_dot_general(x, right, dims, qtype="int8")))))(x)
        both = jax.grad(lambda x: jnp.sum(jnp.sin(rotated_dot_general(x, w, dims, qtype="int8"))))(x)
        np.testing.assert_allclose(gradient, both, rtol=1e-6)

    def test_errors(self):
        x, w, dims = operands("x @ w")
        with pytest.raises(ValueError, match=r"rotated_dot_general: .*along the contracted axis 0, got .* axis 1"):
            rotated_dot_general(x, hadamard_quantize(w.reshape(56, 8), "int8"), dims, qtype="int8")
        with pytest.raises(ValueError, match=r"rotated_dot_general: .*format float8_e4m3fn, got int8"):
            rotated_dot_general(x, hadamard_quantize(w, "int8", axis=0), dims)
        q = hadamard_quantize(x, "int8")
        with pytest.raises(TypeError, match="rotated_dot_general: one operand must be an array"):
            rotated_dot_general(q, q, LAST, qtype="int8")


def test_one_contracted_axis():
    x = normal((4, 8, 8), F32)
    with pytest.raises(ValueError, match=r"rotated_dot_general: one axis must be contracted, got \(1, 2\)"):
        rotated_dot_general(x, x, (((1, 2), (1, 2)), ((), ())))
    with pytest.raises(ValueError, match="size 6"):
        rotated_dot_general(np.ones((2, 6), F32), np.ones((2, 6), F32), LAST)


class TestGradient:
    @layouts
    @pytest.mark.parametrize("qtype", ["float8_e4m3fn", "int8", "int4", "mxfp8"])
    def test_is_that_of_fake_quantised_operands(self, layout, qtype):
        x, w, dims = operands(layout)
        ((i,), (j,)), _ = dims

        def loss(dot):
            return lambda x, w: jnp.sum(jnp.sin(dot(x, w)))

        def fake(x, w):
            x, w = hadamard_fake_quantize(x, qtype, axis=i), hadamard_fake_quantize(w, qtype, axis=j)
            return lax.dot_general(x, w, dims, precision="highest")

        rotated = functools.partial(rotated_dot_general, dimension_numbers=dims, qtype=qtype, precision="highest")
        for argnums in (0, 1, (0, 1)):
            ours = jax.grad(loss(rotated), argnums)(x, w)
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3),
                ours,
                jax.grad(loss(fake), argnums)(x, w),
            )

    def test_only_what_is_asked_for(self):
        x, w, dims = operands("x @ w")
        text = jax.jit(jax.grad(lambda x: jnp.sum(rotated_dot_general(x, w, dims, qtype="int8")))).lower(x).as_text()
        assert len(re.findall("stablehlo.dot_general", text)) == 1

    def test_traced_signs(self):
        x, w, dims = operands("x @ w")
        gradient = jax.grad(lambda x, s: jnp.sum(rotated_dot_general(x, w, dims, signs=s)), argnums=(0, 1))
        of_x, of_signs = jax.jit(gradient)(x, SIGNS.astype(F32))
        expected = jax.grad(lambda x: jnp.sum(rotated_dot_general(x, w, dims, signs=SIGNS)))(x)
        np.testing.assert_allclose(of_x, expected, rtol=1e-4, atol=1e-4)
        assert not np.any(of_signs)

    def test_second_order_and_forward(self):
        x, w, dims = operands("x @ w")
        call = lambda x: jnp.sum(jnp.sin(rotated_dot_general(x, w, dims)))  # noqa: E731
        assert np.isfinite(np.asarray(jax.jvp(jax.grad(call), (x,), (x,))[1])).all()


class TestProgram:
    @pytest.mark.parametrize(
        ("qtype", "types"),
        [("float8_e4m3fn", r"f8E4M3FN>.*f8E4M3FN>.*xf32>"), ("int8", r"xi8>.*xi8>.*xi32>")],
    )
    def test_codes_are_multiplied_over_their_last_axes(self, qtype, types):
        x, w, dims = operands("x @ w", jnp.bfloat16)
        text = (
            jax.jit(functools.partial(rotated_dot_general, dimension_numbers=dims, qtype=qtype)).lower(x, w).as_text()
        )
        (line,) = (line for line in text.splitlines() if "stablehlo.dot_general" in line)
        assert "contracting_dims = [1] x [1]" in line
        assert re.search(types, line)

    def test_vmap_and_jit(self):
        x, w, dims = operands("a batch", jnp.bfloat16)
        mapped = jax.vmap(lambda x, w: rotated_dot_general(x, w, (((1,), (0,)), ((), ()))))(x, w)
        np.testing.assert_array_equal(jax.jit(rotated_dot_general, static_argnums=2)(x, w, dims), mapped)

    def test_negative_axes(self):
        x, w, dims = operands("x @ w")
        y = rotated_dot_general(x, w, (((-1,), (-2,)), ((), ())))
        np.testing.assert_array_equal(y, rotated_dot_general(x, w, dims))

    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
    @pytest.mark.parametrize("qtype", ["float8_e4m3fn", "int8", "mxfp8"])
    def test_sharded_batch_and_features(self, cpu_devices, kind, qtype):
        mesh = Mesh(np.array(cpu_devices).reshape(2, 2), ("b", "f"), axis_types=(kind, kind))
        x, w = normal((8, 64), jnp.bfloat16), normal((6, 64), jnp.bfloat16)
        call = functools.partial(rotated_dot_general, dimension_numbers=LAST, qtype=qtype)
        expected = call(x, w)
        with jax.set_mesh(mesh):
            args = [jax.device_put(a, NamedSharding(mesh, P(name))) for a, name in ((x, "b"), (w, "f"))]
            assert collectives(hlo(call, *args)) == []
            y = jax.jit(call)(*args)
        np.testing.assert_array_equal(y, expected)
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, P("b", "f")), 2)


class TestFlax:
    @pytest.fixture
    def nnx(self):
        return pytest.importorskip("flax.nnx", reason="flax is not installed")

    @pytest.mark.parametrize("qtype", ["float8_e4m3fn", "int8"])
    @pytest.mark.parametrize("dtype", [F32, jnp.bfloat16], ids=["float32", "bfloat16"])
    def test_linear(self, nnx, qtype, dtype):
        dot = functools.partial(rotated_dot_general, qtype=qtype)
        layer = nnx.Linear(64, 32, dtype=dtype, param_dtype=F32, dot_general=dot, rngs=nnx.Rngs(0))
        x = normal((3, 5, 64), dtype)
        y = layer(x)
        assert y.dtype == dtype
        exact = x.astype(float) @ np.asarray(layer.kernel[...])
        assert np.std(np.asarray(y, float) - exact) < 0.05 * np.std(exact)
        gradient = nnx.grad(lambda layer: jnp.sum(layer(x).astype(F32) ** 2))(layer)
        assert np.isfinite(np.asarray(jax.tree.leaves(gradient)[1])).all()
