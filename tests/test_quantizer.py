"""The quantiser in jax.numpy agrees with its definition in every number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import rng
from quantize_cases import CASES, FORMATS, Case, assert_agrees, cases, hard, scale_ties, ties

from jax_hadacore import _formats, _quantize_reference, _rounding

F32 = np.float32


def quantized(w, case, random=None):
    """The arrays of a QuantizedArray: values, scales, zero points."""
    options = {"asymmetric": False, "granularity": None, **case.options}
    quantizer = _formats.quantizer(
        _formats.FORMATS[case.qtype], options["granularity"], w.shape[-1], asymmetric=options["asymmetric"]
    )
    given = None if case.given is None else jnp.float32(case.given)
    run = jax.jit(functools.partial(_quantize_reference.quantize, quantizer=quantizer))
    values, *rest = run(w, given=given, random=random)
    scales, *zero_points = [None, *rest] if quantizer.given else rest
    return values, scales, zero_points[0] if zero_points else None


@cases
class TestAgainstTheDefinition:
    def test_all_magnitudes(self, case):
        for shape in ((64, 128), (3, 30, 32)):
            w = hard(shape)
            assert_agrees(quantized(w, case), case.oracle(w))

    def test_ties(self, case):
        w = ties(case) * F32(1 if case.given is None else case.given)
        assert_agrees(quantized(w, case), case.oracle(w))

    def test_each_group_alone(self, case):
        w = hard((16, 32))
        whole = quantized(w, case)
        for row in (0, 1, 15):
            for one, every in zip(quantized(w[row], case), whole, strict=True):
                if one is not None:
                    np.testing.assert_array_equal(np.asarray(one).astype(F32), np.asarray(every[row]).astype(F32))

    def test_nothing_to_do(self, case):
        values, scales, zero_points = quantized(np.zeros((0, 64), F32), case)
        assert values.shape == (0, 64)
        assert all(array.shape[0] == 0 for array in (scales, zero_points) if array is not None)


@pytest.mark.parametrize("case", [Case("nvfp4"), Case("nvfp4", given=0.5)], ids=["alone", "tensor-scale"])
def test_ties_of_scales(case):
    w = scale_ties()
    expected = case.oracle(w)
    assert_agrees(quantized(w, case), expected)
    assert {2.0**-9, 1, 448} <= set(expected.scales.astype(float).ravel())


@pytest.mark.parametrize("qtype", ["mxfp8", "mxfp4"])
def test_smallest_and_largest_exponents(qtype):
    amax = np.ldexp(F32(1), np.arange(-126, 128))
    w = (amax[:, None] * np.linspace(1, 0, 32, dtype=F32)).astype(F32)
    w = np.concatenate([w, np.full((1, 32), 2.0**-140, F32)])  # a subnormal number
    _, scales, _ = quantized(w, Case(qtype))
    np.testing.assert_array_equal(np.asarray(scales).view(np.uint8), Case(qtype).oracle(w).scales.view(np.uint8))


@pytest.mark.parametrize("qtype", FORMATS)
def test_never_beyond_the_largest_code_nor_nan(qtype):
    finite = rng(qtype).standard_normal((64, 64)) * 10.0 ** rng(qtype).uniform(-40, 37.5, (64, 1))
    values, scales, _ = quantized(np.clip(finite, -3e38, 3e38).astype(F32), Case(qtype))
    assert np.abs(np.asarray(values).astype(F32)).max() <= Case(qtype).largest
    assert np.isfinite(np.asarray(scales).astype(F32)).all()


class TestDivide:
    @pytest.mark.parametrize("b", [3, 6, 7, 15, 127, 448, 57344])
    def test_by_a_constant(self, b):
        a = np.abs(hard((64, 1024), b))
        ours = np.asarray(jax.jit(lambda a: _rounding.divide(a, np.float32(b)))(a))
        exact = a / F32(b)
        normal = ~(exact < 2.0**-126)
        np.testing.assert_array_equal(ours[normal], exact[normal])

    def test_reciprocals(self):
        s = np.abs(rng("s").standard_normal(2**18) * 10.0 ** rng("e").uniform(-37, 37, 2**18)).astype(F32)
        s = np.concatenate([s, np.ldexp(F32(1), np.arange(-126, 127)), [np.inf, np.nan]]).astype(F32)
        s = s[~(s < 2.0**-126)]
        np.testing.assert_array_equal(np.asarray(jax.jit(lambda s: _rounding.divide(F32(1), s))(s)), F32(1) / s)


class TestStochastic:
    cases = pytest.mark.parametrize("case", [case for case in CASES if case.bits == 4], ids=str)

    def random(self, shape, seed=0):
        return jax.random.bits(jax.random.key(seed), shape, jnp.uint32)

    @cases
    def test_goes_to_a_neighbour(self, case):
        w = hard((64, 128))
        grid = case.numbers
        exact, expected = quantized(w, case), case.oracle(w)
        drawn = quantized(w, case, self.random(w.shape))
        for ours, theirs in zip(drawn[1:], exact[1:], strict=True):
            if ours is not None:
                np.testing.assert_array_equal(np.asarray(ours).astype(F32), np.asarray(theirs).astype(F32))
        index = np.searchsorted(grid, np.asarray(drawn[0]).astype(float))
        assert np.abs(index - np.searchsorted(grid, expected.codes)).max() == 1

    @cases
    def test_is_right_on_average(self, case):
        w = np.broadcast_to(np.linspace(-1, 1, 32, dtype=F32) * F32(0.037 * 5), (4096, 32))
        codes, *_ = quantized(w, case, self.random(w.shape))
        expected = case.oracle(w)
        values = expected.dequantized(np.asarray(codes).astype(F32)).astype(float)
        inside = np.abs(expected.codes[0]) < case.largest  # what is not saturated
        assert inside.sum() > 8
        error = np.abs(values.mean(axis=0) - w[0]) / expected.units[0]
        assert error[inside].max() < 5 * np.diff(case.numbers).max() / 2 / np.sqrt(len(w))

    @cases
    def test_keeps_what_needs_no_rounding(self, case):
        """All codes, in groups with a scale of 1."""
        w = np.resize(case.numbers, (1, 32)).astype(F32)
        case = case._replace(given=case.given and 1.0)
        codes, *_ = quantized(w, case, self.random(w.shape))
        np.testing.assert_array_equal(np.asarray(codes).astype(F32), w)
