"""The CUDA kernels whose results become codes, emulated and, with --require-gpu, on the GPU."""

import jax
import ml_dtypes
import numpy as np
import pytest
import quantize_oracle
from cases import HALVES, lengths, normal, rng
from kernels import LEAST_SHARED, Quantization, Request
from oracle import decompose, paley, transform

from jax_hadacore import _formats, _quantize_primitive

BFLOAT16 = HALVES[1]
LENGTHS = tuple(2**k for k in range(5, 16))
OF_ORDERS = (1536, 3072, 7168, 18944, 28672)  # k * 2^m
ROW = None
FORMATS = [
    ("int8", "float32", ROW),
    ("float8_e4m3fn", "float32", ROW),
    ("float8_e5m2", "float32", ROW),
    ("int4", "float32", ROW),
    ("int8", "float32", 32),
    ("float8_e4m3fn", "float32", 64),
    ("int4", "float32", 32),
    ("float8_e4m3fn", "float8_e8m0fnu", 32),
    ("float4_e2m1fn", "float8_e8m0fnu", 32),
    ("float4_e2m1fn", "float8_e4m3fn", 16),
    ("int8", "given", ROW),
    ("int4", "given", ROW),
    ("float8_e4m3fn", "given", ROW),
]


def name(form):
    return "-".join(map(str, form))


formats = pytest.mark.parametrize("form", FORMATS, ids=name)


def cases(*lengths):
    """Types, lengths and formats that are fused: the longest rows have one scale."""
    every = [
        (dtype, n, form)
        for dtype in HALVES
        for n in lengths
        for form in FORMATS
        if (n < LENGTHS[-1] or form[2] is ROW) and (dtype == BFLOAT16 or n in (64, 1024, 3072, 4096))
        if n in LENGTHS or form[0] != "float8_e5m2"
    ]
    ids = [f"{dtype}-n{n}-{name(form)}" for dtype, n, form in every]
    return pytest.mark.parametrize(("dtype", "n", "form"), every, ids=ids)


def quantization(form, n, *, asymmetric=False):
    code, scale, group = form
    return Quantization(code, scale, min(group or n, n), asymmetric)


def given_for(form, value):
    """A scale where one is given, or the tensor's."""
    return value if form[1] in {"given", "float8_e4m3fn"} else None


def oracle(w, q, given=None):
    """The codes, scales and zero points of float32 values, as the kernels give them."""
    form = quantize_oracle.Format(q.code, q.scale, q.asymmetric)
    codes, scales, zeros = quantize_oracle.quantize(w, form, q.group, given)
    codes = codes.view(np.uint8) & (15 if form.bits == 4 else 255)
    return codes, scales if q.scale in {"float32", "given"} else scales.view(np.uint8), zeros


def same_codes(code, a, b):
    """Whether codes are equal, or both NaN."""
    if not code.startswith("float8"):
        return a == b
    dtype = getattr(ml_dtypes, code)
    return (a == b) | (np.isnan(a.view(dtype)) & np.isnan(b.view(dtype)))


def assert_same(kernel, x, q, scale, *, given=None, **schedule):
    """Compares with the oracle where the transform is exact in float32."""
    codes, scales, zeros = kernel.codes(x, q, scale, given=given, **schedule)
    with np.errstate(all="ignore"):
        w = (transform(x.astype(np.float64), scale=1) * scale).astype(np.float32)
    expected = oracle(w, q, given)
    np.testing.assert_array_equal(scales, expected[1]) if scales is not None else None
    np.testing.assert_array_equal(zeros, expected[2]) if zeros is not None else None
    assert same_codes(q.code, codes, expected[0]).all()


def integers(shape, dtype, most=16):
    """Integers whose sums are exact in float32, with outliers."""
    x = rng("integers", *shape).integers(-most, most + 1, shape).astype(np.float64)
    x[..., 3] *= 8
    return x.astype(dtype)


def rows_for(n):
    return max(2, 2048 // n) + 1


class TestExact:
    @cases(*LENGTHS, *OF_ORDERS)
    def test_codes_scales(self, kernel, n, dtype, form):
        given = 0.37 if form[1] == "given" else None
        x = integers((rows_for(n), n), dtype)
        assert_same(kernel, x, quantization(form, n), 2.0**-3, given=given, processors=1)

    @pytest.mark.parametrize("n", [3072, 14336])
    @pytest.mark.parametrize("group", [16, 32, 64, 128])
    def test_groups_of_orders(self, kernel, n, group):
        assert_same(kernel, integers((3, n), BFLOAT16), Quantization("int8", "float32", group), -(2.0**-4))

    @lengths(32, 128, 1024, 2048, 3072, 16384)
    @pytest.mark.parametrize("group", [ROW, 32], ids=["row", "32"])
    def test_zero_points(self, kernel, n, group):
        q = quantization(("int4", "float32", group), n, asymmetric=True)
        x = integers((rows_for(n), n), BFLOAT16)
        x[1, 0] = 255  # all results positive on the whole
        assert_same(kernel, x, q, 2.0**-5)

    @lengths(16, 256)
    def test_tensor_scale(self, kernel, n):
        q = Quantization("float4_e2m1fn", "float8_e4m3fn", 16)
        assert_same(kernel, integers((5, 64), BFLOAT16), q, 1.0, given=n / 77)

    @lengths(32, 512, 3072, 4096)
    @formats
    def test_zeros(self, kernel, n, form):
        x = np.zeros((3, n), BFLOAT16)
        x[1, :5] = 3
        assert_same(kernel, x, quantization(form, n), 1.0, given=given_for(form, 1.0))

    @lengths(64, 1024, 1536, 2048)
    @formats
    @pytest.mark.parametrize("scale", [2.0**-140, 2.0**-126, 2.0**-100, 2.0**100])
    def test_extremes(self, kernel, n, form, scale):
        x = np.zeros((4, n), BFLOAT16)
        x[:, 0], x[1, 1], x[2] = 1, 1, 0
        assert_same(kernel, x, quantization(form, n), scale, given=given_for(form, 1.0))

    @lengths(64, 256, 1024, 4096)
    @formats
    def test_ties(self, kernel, n, form):
        # A single element per row: all results have its magnitude; with two, sums and differences.
        x = np.zeros((64, n), BFLOAT16)
        x[:, 0] = np.arange(64) / 4
        x[:, 1] = 7.5
        assert_same(kernel, x, quantization(form, n), 1.0, given=given_for(form, 0.5))


class TestRing:
    """Rows that come into a ring and are multiplied by groups of warps: on sm_90a, and emulated where asked for."""

    # Of one, two and three tiles of 64 rows of the matrix, the last one full or not; longer rows have no ring.
    @pytest.mark.parametrize("n", [5120, 7168, 9216, 14336, 24576, 28672])
    @pytest.mark.parametrize("form", [FORMATS[0], FORMATS[3], FORMATS[6], FORMATS[9]], ids=name)
    def test_codes_scales(self, kernel, n, form):
        x = integers((4, n), BFLOAT16)
        assert_same(kernel, x, quantization(form, n), 2.0**-5, processors=1, warp_groups=True)

    @pytest.mark.parametrize(("n", "rows"), [(5120, 33), (12288, 14), (20480, 7)])
    @pytest.mark.parametrize("order", [0, 1, 2], ids=["forward", "reverse", "shuffled"])
    def test_places_are_used_again(self, kernel, n, rows, order):
        x, q = integers((rows, n), HALVES[0], most=4), Quantization("float8_e4m3fn", "float32", n)
        assert_same(kernel, x, q, 2.0**-5, processors=1, warp_groups=True, order=order)

    def test_random(self, kernel):
        n = 7168
        x, q = normal((3, n), BFLOAT16), Quantization("int4", "float32", n, asymmetric=True)
        codes, scales, zeros = kernel.codes(x, q, n**-0.5, warp_groups=True)
        expected, expected_scales, expected_zeros = oracle(transform(x.astype(np.float64)).astype(np.float32), q)
        np.testing.assert_allclose(scales, expected_scales, rtol=1e-5)
        np.testing.assert_array_equal(zeros, expected_zeros)
        assert (codes != expected).mean() <= 1e-4


class TestNonFinite:
    @cases(32, 256, 1024, 2048, 3072, 7168)
    @pytest.mark.parametrize("value", [np.nan, -np.inf])
    def test_stays_in_its_row(self, kernel, n, dtype, form, value):
        x = integers((rows_for(n), n), dtype)
        q = quantization(form, n)
        given = 0.5 if q.scale == "given" else None
        clean = kernel.codes(x, q, 0.25, given=given)
        x[1, 5] = value
        broken = kernel.codes(x, q, 0.25, given=given)
        others = np.arange(len(x)) != 1
        for a, b in zip(clean, broken, strict=True):
            if a is not None:
                np.testing.assert_array_equal(a[others], b[others])
        if q.scale == "float32":
            assert not np.isfinite(broken[1][1]).any()
        elif q.scale != "given":
            assert (broken[1][1] == (0xFF if q.scale == "float8_e8m0fnu" else 0x7F)).all()


class TestRandom:
    @cases(*LENGTHS, *OF_ORDERS)
    def test_few_codes_move(self, kernel, n, dtype, form):
        x, q = normal((rows_for(n), n), dtype), quantization(form, n)
        given = 0.03 if q.scale == "given" else None
        codes, scales, _ = kernel.codes(x, q, n**-0.5, given=given)
        exact = transform(x.astype(np.float64)).astype(np.float32)
        expected, expected_scales, _ = oracle(exact, q, given)
        moved = ~same_codes(q.code, codes, expected)
        if scales is not None and scales.dtype == np.uint8:
            moved = moved.reshape(*scales.shape, q.group)[scales == expected_scales]
        assert moved.mean() <= (1e-3 if q.bits == 8 else 1e-4)

    @lengths(32, 512, 1024, 4096, 7168)
    @pytest.mark.parametrize("form", [FORMATS[1], FORMATS[8]], ids=name)
    @pytest.mark.parametrize("rows", [1, 2, 7])
    def test_rows_do_not_depend_on_their_number(self, kernel, n, form, rows):
        x, q = normal((9, n), BFLOAT16), quantization(form, n)
        every = kernel.codes(x, q, n**-0.5)
        for a, b in zip(every, kernel.codes(x[:rows], q, n**-0.5, processors=1, order=1), strict=True):
            if a is not None:
                np.testing.assert_array_equal(a[:rows], b)

    @lengths(28672, 32768)
    def test_least_shared_memory(self, kernel, n):
        x, q = integers((3, n), BFLOAT16), Quantization("int8", "float32", n)
        assert_same(kernel, x, q, 0.5, processors=1, shared_bytes=LEAST_SHARED)


@pytest.mark.parametrize("code", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_without_an_instruction(emulator, code):
    dtype = getattr(ml_dtypes, code)
    codes = np.arange(128, dtype=np.uint8).view(dtype).astype(np.float32)
    codes = codes[np.isfinite(codes)]
    middles = (codes[1:] + codes[:-1]) / 2
    special = np.float32([np.inf, np.nan, 2.0**-149, 2.0**-126, 3.4e38, codes[-1] * 1.05, codes[-1] * 2])
    values = np.concatenate([codes, middles, special])
    values = np.concatenate([values, np.nextafter(values, np.float32(0)), np.nextafter(values, np.float32(np.inf))])
    random = rng("float8", 1).integers(0, 2**32, 2**18, np.uint32).view(np.float32)
    values = np.concatenate([values, -values, random])
    with np.errstate(invalid="ignore"):
        expected = np.clip(values, -codes[-1], codes[-1]).astype(dtype).view(np.uint8)
    assert same_codes(code, emulator.pack_float8(values, code), expected).all()


@pytest.mark.parametrize("scale", ["float32", "given"])
@pytest.mark.parametrize("code", ["int8", "float8_e5m2"])
def test_the_lowering_knows_what_is_fused(emulator, code, scale):
    form = _formats.FORMATS[code]
    for n in (16, *LENGTHS, 65536, *OF_ORDERS, 768, 9984, 11008, 36864):
        factors = tuple(paley(k) for k in decompose(n)[:-1])
        for group in sorted({8, 16, 24, 64, 128, 256, 512, n}):
            if n % group == 0:
                request = Request(BFLOAT16, n, 1, factors=factors)
                native = emulator.fuses_codes(request, Quantization(code, scale, group))
                quantizer = _formats.Quantizer(form, group, given=scale == "given", asymmetric=False)
                x = jax.ShapeDtypeStruct((1, n), BFLOAT16)
                how = {"quantizer": quantizer, "length": n, "signs": None, "matrix": None}
                assert native == _quantize_primitive.fuses("cuda", x, **how)


def test_what_is_fused(emulator):
    def fuses(n, group, dtype=BFLOAT16, code="int8", scale="float32", **more):
        factors = tuple(paley(k) for k in decompose(n)[:-1])
        return emulator.fuses_codes(Request(dtype, n, 1, factors=factors, **more), Quantization(code, scale, group))

    assert all(fuses(n, n) for n in LENGTHS)
    assert fuses(4096, 128)
    assert fuses(1024, 256)
    assert fuses(4096, 7, scale="given")
    assert not fuses(16, 16)
    assert not fuses(65536, 65536)
    assert not fuses(4096, 256)
    assert not fuses(32768, 32)
    assert not fuses(4096, 8)
    assert not fuses(4096, 8192)
    assert not fuses(4096, 4096, np.dtype(np.float32))
    assert not fuses(4096, 4096, signs=np.ones(4096, np.int8))
    assert all(fuses(n, n) and fuses(n, 128) for n in OF_ORDERS)
    assert fuses(14336, 7, scale="given")
    assert fuses(4096, 4096, code="float8_e5m2")
    assert not fuses(14336, 14336, code="float8_e5m2")
    assert not fuses(14336, 256)
    assert not fuses(11008, 11008)
    assert not fuses(9984, 9984)
    assert not fuses(36864, 36864)
