"""Mistakes in a call of hadamard_quantize: each is refused by a message that says what is allowed and what came."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_hadacore import hadamard_fake_quantize, hadamard_quantize

X = jnp.zeros((2, 64))


@pytest.mark.parametrize("qtype", ["int5", "fp8", jnp.int32, np.dtype(np.float16)], ids=str)
def test_format(qtype):
    with pytest.raises(ValueError, match=r"hadamard_quantize: qtype must be one of float8_e4m3fn, .*nvfp4, got"):
        hadamard_quantize(X, qtype)


class TestGranularity:
    @pytest.mark.parametrize(
        "granularity", ["rows", 32, ("block",), ("block", 32.0), ("block", True), ("b", 32)], ids=str
    )
    def test_unknown(self, granularity):
        with pytest.raises(ValueError, match=r'granularity must be "row", \("block", b\) or "tensor", got'):
            hadamard_quantize(X, "int8", granularity=granularity)

    @pytest.mark.parametrize("block", [0, -32, 48, 128])
    def test_blocks_that_do_not_divide_the_axis(self, block):
        with pytest.raises(ValueError, match=rf"blocks of {block} elements do not divide the axis, which has 64"):
            hadamard_quantize(X, "int8", granularity=("block", block))

    @pytest.mark.parametrize(("qtype", "size"), [("mxfp8", 16), ("mxfp4", 48), ("nvfp4", 8)])
    def test_axes_shorter_than_a_block_of_the_format(self, qtype, size):
        with pytest.raises(ValueError, match=rf"elements do not divide the axis, which has {size}"):
            hadamard_quantize(jnp.zeros((2, size)), qtype)

    @pytest.mark.parametrize("granularity", ["row", ("block", 64), "tensor"], ids=str)
    def test_of_a_format_with_blocks(self, granularity):
        given = 1.0 if granularity == "tensor" else None
        with pytest.raises(ValueError, match=r"hadamard_quantize: mxfp8 has blocks of 32: leave granularity out"):
            hadamard_quantize(X, "mxfp8", granularity=granularity, quant_scale=given)
        assert hadamard_quantize(X, "mxfp8", granularity=("block", 32)).block == 32

    def test_tensor_and_its_scale_go_together(self):
        with pytest.raises(ValueError, match=r'quant_scale is the scale for granularity="tensor".*without one'):
            hadamard_quantize(X, "int8", granularity="tensor")
        with pytest.raises(ValueError, match=r"got granularity None with one"):
            hadamard_quantize(X, "int8", quant_scale=1.0)


class TestGivenScale:
    tensor = staticmethod(functools.partial(hadamard_quantize, qtype="int8", granularity="tensor"))

    @pytest.mark.parametrize("scale", [0, -1.0, np.inf, np.nan, 1e-40], ids=str)
    def test_value(self, scale):
        for call in (
            functools.partial(self.tensor, quant_scale=scale),
            functools.partial(hadamard_quantize, qtype="nvfp4", tensor_scale=scale),
        ):
            with pytest.raises(ValueError, match=r"given scale must be positive, finite and at least 2\^-126, got"):
                call(X)

    def test_shape(self):
        with pytest.raises(ValueError, match=r"a given scale must be one number, got shape \(2, 1\)"):
            self.tensor(X, quant_scale=np.ones((2, 1)))
        assert self.tensor(X, quant_scale=np.ones((1, 1))).scales.shape == (1, 1)

    def test_tensor_scale_of_another_format(self):
        with pytest.raises(ValueError, match="tensor_scale is for nvfp4, got mxfp4"):
            hadamard_quantize(X, "mxfp4", tensor_scale=1.0)


class TestAsymmetric:
    @pytest.mark.parametrize("qtype", ["int8", "float8_e4m3fn", "nvfp4"])
    def test_of_another_format(self, qtype):
        with pytest.raises(ValueError, match=f"asymmetric is for int4 with a scale per row or block, got {qtype}"):
            hadamard_quantize(X, qtype, asymmetric=True)

    def test_with_a_given_scale(self):
        with pytest.raises(ValueError, match=r"asymmetric is for int4 with a scale per row or block.*tensor"):
            hadamard_quantize(X, "int4", asymmetric=True, granularity="tensor", quant_scale=1.0)

    def test_type(self):
        with pytest.raises(TypeError, match="asymmetric must be True or False, got 1"):
            hadamard_quantize(X, "int4", asymmetric=1)


@pytest.mark.parametrize("qtype", ["int8", "float8_e5m2", "mxfp8"])
def test_stochastic_rounding_of_8_bits(qtype):
    with pytest.raises(ValueError, match=f"a key, for stochastic rounding, is for 4-bit codes, got {qtype}"):
        hadamard_quantize(X, qtype, key=jax.random.key(0))


def test_of_the_transform():
    with pytest.raises(TypeError, match="hadamard_quantize: x must be real, got dtype complex64"):
        hadamard_quantize(X.astype(jnp.complex64), "int8")
    with pytest.raises(TypeError, match="hadamard: dtype int32 is not supported"):
        hadamard_quantize(X.astype(jnp.int32), "int8")
    with pytest.raises(ValueError, match=r"hadamard: .*size 13696 = 107"):
        hadamard_quantize(jnp.zeros(13696), "int8")
    with pytest.raises(ValueError, match="hadamard: axis must be from -2 to 1"):
        hadamard_quantize(X, "int8", axis=2)
    with pytest.raises(ValueError, match="hadamard: x must have at least one dimension"):
        hadamard_quantize(1.0, "int8")


@pytest.mark.parametrize("name", ["axis_name", "inplace", "dtype"])
def test_unknown_options(name):
    for call in (hadamard_quantize, hadamard_fake_quantize):
        with pytest.raises(TypeError, match=name):
            call(X, "int8", **{name: None})
