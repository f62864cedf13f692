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
            (18, r"3\^2 \* 2"),
            (13696, r"107 \* 2\^7"),
            (4304, r"269 \* 2\^4"),
            (8191, "8191"),
            (2310, r"3 \* 5 \* 7 \* 11 \* 2"),
        ],
    )
    def test_without_a_transform(self, n, factors):
        with pytest.raises(ValueError, match=rf"hadamard: .*size {n} = {factors}; no Hadamard matrix of order "):
            hadamard(jnp.zeros((2, n)))

    def test_names_the_ways_out(self):
        with pytest.raises(ValueError, match=r"block_size=128.* matrix=.* pad the axis to 13824"):
            hadamard(jnp.zeros(13696))

    def test_too_long(self):
        with pytest.raises(ValueError, match=r"hadamard: .*size 33554432 = 2\^25; .*up to 2\^24.*block_size=16777216"):
            jax.eval_shape(hadamard, jax.ShapeDtypeStruct((2**25,), jnp.float32))
        assert jax.eval_shape(hadamard, jax.ShapeDtypeStruct((2**24,), jnp.float32)).shape == (2**24,)

    @pytest.mark.parametrize("n", [3 * 2**23, 2**25 - 1, 2**26 + 2])
    def test_advice_for_long_rows_can_be_followed(self, n):
        with pytest.raises(ValueError, match=r"hadamard: .*size") as raised:
            jax.eval_shape(hadamard, jax.ShapeDtypeStruct((n,), jnp.float32))
        assert "pad the axis" not in str(raised.value).lower()

    def test_without_elements(self):
        with pytest.raises(ValueError, match=r"size 0.*at least one"):
            hadamard(jnp.zeros((2, 0)))

    def test_is_checked_under_every_transformation(self):
        x = jnp.zeros((2, 6))
        for call in (jax.jit(hadamard), jax.vmap(hadamard), jax.grad(lambda x: hadamard(x).sum())):
            with pytest.raises(ValueError, match=r"size 6 = 3 \* 2"):
                call(x)

    def test_of_a_complex_array(self):
        with pytest.raises(ValueError, match=r"size 6 = 3 \* 2"):
            hadamard(jnp.zeros(6, jnp.complex64))


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


class TestBlockSize:
    @pytest.mark.parametrize("block", [3, 16, 0, -4])
    def test_does_not_divide_the_axis(self, block):
        with pytest.raises(
            ValueError, match=rf"hadamard: block_size must divide the 8 elements of axis 1, got {block}\."
        ):
            hadamard(jnp.zeros((2, 8)), block_size=block)

    def test_without_a_transform(self):
        with pytest.raises(ValueError, match=r"size 3 = 3; no Hadamard matrix"):
            hadamard(jnp.zeros((2, 24)), block_size=3)

    @pytest.mark.parametrize("block", [2.0, "2", [2], True], ids=repr)
    def test_not_an_integer(self, block):
        with pytest.raises(TypeError):
            hadamard(jnp.zeros(4), block_size=block)
        assert hadamard(jnp.zeros(4), block_size=np.int32(2)).shape == (4,)


class TestSigns:
    @pytest.mark.parametrize(
        "signs", [np.ones(8, bool), np.ones(8, np.uint8), np.ones(8, complex), [True] * 8, "11111111"], ids=str
    )
    def test_dtype(self, signs):
        with pytest.raises(TypeError, match=r"hadamard: signs must be floating or signed integers, got dtype"):
            hadamard(jnp.zeros((2, 8)), signs=signs)

    @pytest.mark.parametrize("dtype", [bool, jnp.uint32, jnp.complex64])
    def test_dtype_of_traced_ones(self, dtype):
        with pytest.raises(TypeError, match=r"hadamard: signs must be floating or signed integers, got dtype"):
            jax.eval_shape(lambda s: hadamard(jnp.zeros((2, 8)), signs=s), jnp.ones(8, dtype))

    @pytest.mark.parametrize(("wrong", "at"), [(0, 0), (2, 5), (-0.5, 7), (np.nan, 1), (np.inf, 3)])
    def test_values(self, wrong, at):
        signs = np.ones(8)
        signs[at] = wrong
        for given in (signs, jnp.asarray(signs), signs.tolist()):
            with pytest.raises(ValueError, match=rf"hadamard: signs must be \+1 or -1, got {wrong}.* at index {at}\."):
                hadamard(jnp.zeros((2, 8)), signs=given)

    @pytest.mark.parametrize("size", [1, 4, 9, 16])
    def test_size(self, size):
        message = rf"hadamard: signs must have shape \(8,\), got \({size},\)"
        for call in (hadamard, jax.jit(hadamard)):
            with pytest.raises(ValueError, match=message):
                call(jnp.zeros((2, 8)), signs=jnp.ones(size))

    def test_size_with_blocks(self):
        with pytest.raises(ValueError, match=r"signs must have shape \(2,\) or \(8,\), got \(4,\)"):
            hadamard(jnp.zeros((2, 8)), block_size=2, signs=np.ones(4))

    @pytest.mark.parametrize("shape", [(), (2, 8), (8, 1)])
    def test_rank(self, shape):
        with pytest.raises(ValueError, match=r"hadamard: signs must have one dimension, got shape"):
            hadamard(jnp.zeros((2, 8)), signs=np.ones(shape))


class TestMatrix:
    M = np.linalg.qr(np.arange(9.0).reshape(3, 3) ** 2 + np.eye(3))[0]

    def test_traced(self):
        with pytest.raises(TypeError, match=r"hadamard: matrix must be a concrete array.*matrix product"):
            jax.jit(lambda x, m: hadamard(x, matrix=m))(jnp.zeros((2, 12)), self.M)
        with pytest.raises(TypeError, match=r"hadamard: matrix must be a concrete array"):
            jax.grad(lambda m: hadamard(jnp.zeros(12), matrix=m).sum())(self.M)

    @pytest.mark.parametrize("dtype", [bool, np.uint8, complex])
    def test_dtype(self, dtype):
        with pytest.raises(TypeError, match=r"hadamard: matrix must be floating or of signed integers, got dtype"):
            hadamard(jnp.zeros(12), matrix=np.eye(3).astype(dtype))

    @pytest.mark.parametrize("shape", [(), (3,), (3, 4), (1, 3, 3), (0, 0), (1025, 1025)], ids=str)
    def test_shape(self, shape):
        with pytest.raises(ValueError, match=r"matrix must have shape \(k, k\), k from 1 to 1024, got"):
            hadamard(jnp.zeros(12), matrix=np.ones(shape))

    @pytest.mark.parametrize(
        ("change", "deviation"), [(0.5, "0.5"), (1e-3, "0.001"), (np.nan, "nan"), (np.inf, "nan")], ids=str
    )
    def test_not_orthogonal(self, change, deviation):
        m = self.M.copy()
        m[1] += change * m[0]
        message = r"hadamard: matrix must have orthogonal rows of one norm c, M M\^T = c\^2 I; .*deviation of "
        with pytest.raises(ValueError, match=message) as raised:
            hadamard(jnp.zeros(12), matrix=m)
        found = str(raised.value).split()[-1].rstrip(".")
        assert found == deviation or abs(float(found) / float(deviation) - 1) < 0.1

    def test_rows_of_other_norms(self):
        with pytest.raises(ValueError, match="orthogonal rows of one norm"):
            hadamard(jnp.zeros(12), matrix=np.diag([1.0, 2.0, 1.0]))
        with pytest.raises(ValueError, match="orthogonal rows of one norm"):
            hadamard(jnp.zeros(12), matrix=np.zeros((3, 3)))

    @pytest.mark.parametrize("n", [8, 18, 36, 1, 2])
    def test_length(self, n):
        with pytest.raises(ValueError, match=rf"with a matrix of order k = 3 the length .* k \* 2\^m, .*got {n}\."):
            hadamard(jnp.zeros(n), matrix=self.M)

    def test_too_long(self):
        with pytest.raises(ValueError, match=r"at most 2\^24, got 25165824"):
            jax.eval_shape(lambda x: hadamard(x, matrix=self.M), jax.ShapeDtypeStruct((3 * 2**23,), jnp.float32))

    def test_scale_beyond_float32(self):
        with pytest.raises(ValueError, match="scale must be finite"):
            hadamard(jnp.zeros(4, jnp.float32), matrix=[[1e30, 1e30], [1e30, -1e30]], scale=1e20)


class TestTranspose:
    @pytest.mark.parametrize("transpose", [1, None, "yes", np.bool_(True)], ids=repr)
    def test_not_a_bool(self, transpose):
        with pytest.raises(TypeError, match="hadamard: transpose must be True or False"):
            hadamard(jnp.zeros(4), transpose=transpose)


def test_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        hadamard(jnp.zeros(4), -1)
