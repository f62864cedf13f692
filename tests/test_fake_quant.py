"""fake_quant: against the formulas in NumPy float64, its search by trying every ratio, and its gradients."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal, rng

from jax_hadacore import hadamard_fake_quantize
from jax_hadacore.rotations import fake_quant

F64 = np.float64


def expected(x, bits, symmetric=True, ratio=1.0):
    """The definition, of one group, in float64."""
    x = np.asarray(x, F64)
    top, bottom = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
    if symmetric:
        scale, zero = ratio * np.max(np.abs(x)) / top, 0
    else:
        low, high = ratio * min(np.min(x), 0), ratio * max(np.max(x), 0)
        scale = (high - low) / (2**bits - 1)
        zero = np.round(bottom - low / scale)
    return scale * (np.clip(np.round(x / scale) + zero, bottom, top) - zero)


def groups(x, axes, group=None):
    """The index of each group of elements that share a scale."""
    axes = tuple(range(x.ndim)) if axes is None else np.atleast_1d(axes) % x.ndim
    number = np.zeros(x.shape, int)
    for axis in range(x.ndim):
        index = np.arange(x.shape[axis])
        part = index if axis not in axes else index // group if group else 0 * index
        number = number * x.shape[axis] + part.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    return [number == g for g in np.unique(number)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("axis", "group"), [(-1, None), (0, None), ((0, 2), None), (None, None), (-1, 8), (1, 2), (-3, 5)], ids=str
)
@pytest.mark.parametrize("clip", [1.0, 0.7])
def test_is_the_definition(bits, symmetric, axis, group, clip):
    x = normal((5, 6, 16), F64) + 0.5
    y = fake_quant(x, bits, axis=axis, group=group, symmetric=symmetric, clip=clip)
    assert y.dtype == F64
    for chosen in groups(x, axis, group):
        np.testing.assert_allclose(y[chosen], expected(x[chosen], bits, symmetric, clip), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [0, -1])
def test_the_search_finds_the_best_ratio(symmetric, axis):
    x = rng("t").standard_t(3, (16, 24)) + 0.3
    y = np.asarray(fake_quant(x, 3, axis=axis, symmetric=symmetric, clip="search"))
    chosen = set()
    for i in range(x.shape[1 + axis if axis else 1]):
        row, found = (x[i], y[i]) if axis else (x[:, i], y[:, i])
        tried = [expected(row, 3, symmetric, r / 100) for r in range(100, 20, -1)]
        errors = [np.sum(np.abs(t - row) ** 2.4) for t in tried]
        best = int(np.argmin(errors))
        np.testing.assert_allclose(found, tried[best], rtol=1e-12, atol=1e-12)
        chosen.add(best)
    assert len(chosen) > 3  # not always the same


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, np.float32], ids=lambda d: np.dtype(d).name)
def test_dtypes(dtype):
    x = jnp.asarray(normal((4, 64), np.float32), dtype)
    y = fake_quant(x, 4, symmetric=False)
    assert y.dtype == dtype
    wide = np.stack([expected(row, 4, False) for row in np.asarray(x, F64)])
    np.testing.assert_allclose(np.asarray(y, F64), wide, atol=1e-6, rtol=float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("symmetric", [True, False])
def test_agrees_with_the_fused_quantiser(symmetric):
    x = normal((64, 32), np.float32)
    y = fake_quant(x, 4, symmetric=symmetric)
    fused = hadamard_fake_quantize(x, "int4", block_size=1, asymmetric=not symmetric)
    scale = np.ptp(x, axis=-1, keepdims=True)
    differ = np.abs(np.asarray(y) - np.asarray(fused)) > 1e-5 * scale
    assert np.mean(differ) < 1e-3  # quotients against products with reciprocals, at ties


class TestSpecialValues:
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, value, symmetric):
        x = normal((3, 8), np.float32)
        x[1, 5] = value
        y = np.asarray(fake_quant(x, 4, symmetric=symmetric))
        assert np.isnan(y[1]).all()
        assert np.isfinite(y[[0, 2]]).all()

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("detach_scale", [True, False])
    @pytest.mark.parametrize("clip", [1.0, "search"])
    def test_zeros(self, symmetric, detach_scale, clip):
        quantise = lambda x: fake_quant(x, 4, symmetric=symmetric, detach_scale=detach_scale, clip=clip)  # noqa: E731
        x = np.zeros((2, 8), np.float32)
        np.testing.assert_array_equal(quantise(x), 0)
        assert np.isfinite(jax.grad(lambda x: jnp.sum(jnp.sin(quantise(x))))(x)).all()


class TestGradient:
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("clip", [1.0, 0.5, "search"])
    def test_is_the_identity_where_scales_are_constant(self, symmetric, clip):
        x, weights = normal((4, 16), np.float32), normal((4, 16), np.float32, "w")
        quantise = lambda x: jnp.sum(weights * fake_quant(x, 3, symmetric=symmetric, clip=clip))  # noqa: E731
        np.testing.assert_array_equal(jax.grad(quantise)(x), weights)
        np.testing.assert_allclose(jax.jvp(quantise, (x,), (x,))[1], np.sum(weights * x), rtol=1e-6)

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("clip", [1.0, 0.6])
    def test_with_scales_is_that_of_the_formula(self, symmetric, clip):
        """By finite differences of the formula, each rounding replaced by adding what it added at x."""
        x, weights = normal(16, F64), normal(16, F64, "w")
        top, bottom = 7, -8

        def scale(x):
            if symmetric:
                return clip * np.max(np.abs(x)) / top
            return clip * (max(np.max(x), 0) - min(np.min(x), 0)) / (top - bottom)

        def low(x):
            return clip * min(np.min(x), 0)

        s = scale(x)
        added = np.round(x / s) - x / s
        added_to_zero = 0 if symmetric else np.round(bottom - low(x) / s) - (bottom - low(x) / s)

        def smooth(x):
            s = scale(x)
            zero = 0 if symmetric else bottom - low(x) / s + added_to_zero
            return np.sum(weights * s * (np.clip(x / s + added + zero, bottom, top) - zero))

        step = 1e-7
        differences = [(smooth(x + step * e) - smooth(x - step * e)) / (2 * step) for e in np.eye(16)]
        # An element on the edge of the range has one derivative on each side.
        codes = np.round(x / s) + (0 if symmetric else np.round(bottom - low(x) / s))
        sure = (codes != top) & (codes != bottom)
        assert sure.sum() > 8
        quantise = lambda x: fake_quant(x, 4, symmetric=symmetric, clip=clip, detach_scale=False)  # noqa: E731
        gradient = jax.grad(lambda x: jnp.sum(weights * quantise(x)))(x)
        np.testing.assert_allclose(gradient[sure], np.array(differences)[sure], rtol=1e-5, atol=1e-6)
        assert np.abs(gradient - weights).max() > 1e-2


def test_under_jit_and_vmap():
    x = normal((3, 4, 16), np.float32)
    whole = fake_quant(x, 4, clip="search")
    np.testing.assert_array_equal(jax.jit(lambda x: fake_quant(x, 4, clip="search"))(x), whole)
    np.testing.assert_array_equal(jax.vmap(lambda x: fake_quant(x, 4, clip="search"))(x), whole)


def test_errors():
    x = jnp.ones((4, 6))
    with pytest.raises(TypeError, match="fake_quant: x must be floating-point, got dtype int32"):
        fake_quant(jnp.ones(4, jnp.int32), 4)
    for bits in (1, 9, 4.5, "4"):
        with pytest.raises(ValueError, match="fake_quant: bits must be from 2 to 8, got "):
            fake_quant(x, bits)
    for clip in (0, 1.5, -1, np.nan, "mse"):
        with pytest.raises(ValueError, match=r'fake_quant: clip must be above 0 and at most 1, or "search", got '):
            fake_quant(x, 4, clip=clip)
    for group in (4, 0, 2.0):
        with pytest.raises(ValueError, match=r"fake_quant: group must divide .*, got .* for axis -1 of shape \(4, 6\)"):
            fake_quant(x, 4, group=group)
    with pytest.raises(ValueError, match="fake_quant: group must divide the length of one axis"):
        fake_quant(x, 4, axis=(0, 1), group=2)
    with pytest.raises(ValueError, match="fake_quant: axis must be within the 2 axes of x, got 2"):
        fake_quant(x, 4, axis=2)


@pytest.mark.usefixtures("x64_off")
def test_docstrings():
    tested = doctest.testmod(importlib.import_module("jax_hadacore.rotations._fake_quant"))
    assert tested.attempted
    assert not tested.failed
