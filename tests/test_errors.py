"""Mistakes of the caller: each is refused at trace time, by a message that says what is allowed and what came."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_hadacore import hadamard


class TestLength:
    @pytest.mark.parametrize(
        ("n", "factors"),
        [
            (3, "3"),
            (12, r"3 \* 2\^2"),
            (18, r"3\^2 \* 2"),
            (100, r"5\^2 \* 2\^2"),
            (3072, r"3 \* 2\^10"),
            (13696, r"107 \* 2\^7"),
            (8191, "8191"),
            (2310, r"3 \* 5 \* 7 \* 11 \* 2"),
        ],
    )
    def test_not_a_power_of_two(self, n, factors):
        with pytest.raises(ValueError, match=rf"hadamard: .*size {n} = {factors}; .*powers of two up to 2\^24.*Pad"):
            hadamard(jnp.zeros((2, n)))

    @pytest.mark.parametrize(("n", "pad", "blocks"), [(3072, 4096, r"3, 1024"), (13696, 16384, r"107, 128")])
    def test_names_the_ways_out(self, n, pad, blocks):
        with pytest.raises(ValueError, match=rf"Pad the axis to {pad}, or .*\(\.\.\., {blocks}\)"):
            hadamard(jnp.zeros(n))

    def test_too_long(self):
        with pytest.raises(ValueError, match=r"hadamard: .*size 33554432 = 2\^25; .*up to 2\^24"):
            jax.eval_shape(hadamard, jax.ShapeDtypeStruct((2**25,), jnp.float32))
        assert jax.eval_shape(hadamard, jax.ShapeDtypeStruct((2**24,), jnp.float32)).shape == (2**24,)

    @pytest.mark.parametrize("n", [3 * 2**23, 2**25 - 1, 2**26 + 2])
    def test_advice_for_long_rows_can_be_followed(self, n):
        with pytest.raises(ValueError, match=r"hadamard: .*size") as raised:
            jax.eval_shape(hadamard, jax.ShapeDtypeStruct((n,), jnp.float32))
        assert f"Pad the axis to {1 << n.bit_length()}" not in str(raised.value)

    def test_without_elements(self):
        with pytest.raises(ValueError, match=r"size 0.*at least one"):
            hadamard(jnp.zeros((2, 0)))

    def test_is_checked_under_every_transformation(self):
        x = jnp.zeros((2, 12))
        for call in (jax.jit(hadamard), jax.vmap(hadamard), jax.grad(lambda x: hadamard(x).sum())):
            with pytest.raises(ValueError, match=r"3 \* 2\^2"):
                call(x)

    def test_of_a_complex_array(self):
        with pytest.raises(ValueError, match=r"3 \* 2\^2"):
            hadamard(jnp.zeros(12, jnp.complex64))


class TestDtype:
    @pytest.mark.parametrize(
        "dtype", ["int8", "uint8", "int32", "int64", "bool", "float8_e4m3fn", "float8_e5m2", "int4"]
    )
    def test_not_floating(self, dtype):
        with pytest.raises(TypeError, match=rf"hadamard: dtype {dtype} .*float16, bfloat16, float32, float64"):
            hadamard(jnp.zeros((2, 4), getattr(jnp, "bool_" if dtype == "bool" else dtype)))

    def test_keys_are_no_numbers(self):
        with pytest.raises(TypeError, match="hadamard: dtype key"):
            hadamard(jax.random.split(jax.random.key(0), 4))

    @pytest.mark.parametrize("x", [None, "abcd", object()], ids=["None", "str", "object"])
    def test_not_an_array(self, x):
        with pytest.raises((TypeError, ValueError)):
            hadamard(x)


class TestAxis:
    @pytest.mark.parametrize("axis", [2, -3, 100])
    def test_out_of_range(self, axis):
        with pytest.raises(ValueError, match=rf"hadamard: axis must be .*-2 .* 1 .*rank 2, got {axis}"):
            hadamard(jnp.zeros((4, 4)), axis=axis)

    @pytest.mark.parametrize("axis", [1.0, "0", None, (0, 1)], ids=str)
    def test_not_an_integer(self, axis):
        with pytest.raises(TypeError):
            hadamard(jnp.zeros((4, 4)), axis=axis)

    def test_integers_of_numpy(self):
        assert hadamard(jnp.zeros((3, 4)), axis=np.int64(1)).shape == (3, 4)

    @pytest.mark.parametrize("x", [1.0, np.float32(1), 1j], ids=["float", "float32", "complex"])
    def test_scalar(self, x):
        with pytest.raises(ValueError, match="hadamard: x must have at least one dimension, got a scalar"):
            hadamard(x)


class TestScale:
    @pytest.mark.parametrize(
        "scale",
        [jnp.float32(1), np.ones(()), np.ones(1), 1j, np.complex64(1), True, np.bool_(True), "1", [1.0]],
        ids=lambda scale: type(scale).__name__,
    )
    def test_not_a_real_number(self, scale):
        with pytest.raises(TypeError, match=r"hadamard: scale must be a static real number, got .*Multiply"):
            hadamard(jnp.zeros((2, 4)), scale=scale)

    def test_traced(self):
        with pytest.raises(TypeError, match=r"hadamard: scale must be a static real number, got .*Tracer"):
            jax.jit(lambda x, scale: hadamard(x, scale=scale))(jnp.zeros((2, 4)), 1.0)
        with pytest.raises(TypeError, match="hadamard: scale must be a static"):
            jax.grad(lambda scale: hadamard(jnp.zeros(4), scale=scale).sum())(1.0)

    @pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, np.float32("inf")], ids=str)
    def test_not_finite(self, scale):
        with pytest.raises(ValueError, match="hadamard: scale must be finite"):
            hadamard(jnp.zeros((2, 4)), scale=scale)

    def test_beyond_float64(self):
        with pytest.raises(ValueError, match="hadamard: scale must be finite"):
            hadamard(jnp.zeros((2, 4)), scale=10**400)

    @pytest.mark.parametrize("scale", [1e-50, -1e60, 1e-40])
    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64], ids=lambda d: d.__name__)
    def test_beyond_float32(self, dtype, scale):
        with pytest.raises(
            ValueError, match=r"hadamard: scale must be finite, and 0 or of magnitude 1.18e-38 to 3.4e\+38"
        ):
            hadamard(jnp.zeros((2, 4), dtype), scale=scale)

    def test_of_a_complex_array(self):
        with pytest.raises(TypeError, match="hadamard: scale"):
            hadamard(jnp.zeros(4, jnp.complex64), scale=1j)


class TestInplace:
    @pytest.mark.parametrize("inplace", [1, 0, None, "yes", np.bool_(True)], ids=repr)
    def test_not_a_bool(self, inplace):
        with pytest.raises(TypeError, match="hadamard: inplace must be True or False"):
            hadamard(jnp.zeros(4), inplace=inplace)


def test_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        hadamard(jnp.zeros(4), -1)
