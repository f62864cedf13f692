"""The codes and scales that the CPU kernel makes of a transform, against those of NumPy and ml_dtypes, bit for bit."""

import jax
import ml_dtypes
import numpy as np
import pytest
from cases import DTYPES, assert_same_bits, normal, rng
from cpu_kernel import CPU, few, transform
from kernels import assert_guards_are_whole, guarded
from quantize_oracle import LARGEST, Format, packed, quantize

from jax_hadacore import _ffi

WITH_FLOAT32 = ("int8", "int4", "float8_e4m3fn", "float8_e5m2")
GIVEN = tuple(Format(code, "given") for code in WITH_FLOAT32)
ASYMMETRIC = Format("int4", asymmetric=True)
NVFP4 = Format("float4_e2m1fn", "float8_e4m3fn")
SCALED = (
    *(Format(code) for code in WITH_FLOAT32),
    ASYMMETRIC,
    Format("float8_e4m3fn", "float8_e8m0fnu"),
    Format("float4_e2m1fn", "float8_e8m0fnu"),
    NVFP4,
)
FORMATS = (*SCALED, *GIVEN)
AS_IT_IS = transform((), 1)  # the transform of a single element
UP_TO_FLOAT32 = DTYPES[:3]


def over(choice):
    return pytest.mark.parametrize("form", choice, ids=lambda f: f"{f.code}-{f.scale}{'-zero' * f.asymmetric}")


formats = over(FORMATS)
up_to_float32 = pytest.mark.parametrize("dtype", UP_TO_FLOAT32, ids=str)


def results(x, form, group):
    """Shapes and dtypes of the results that a call has."""
    last = x.shape[-1]
    codes = (*x.shape[:-1], last // 2 if form.bits == 4 else last)
    per_group = (*x.shape[:-1], last // group)
    found = [(codes, np.dtype(np.uint8) if form.bits == 4 else form.dtype)]
    if form.scale != "given":
        found.append((per_group, form.scale_dtype))
    if form.asymmetric:
        found.append((per_group, np.dtype(np.int8)))
    return found


def run(t, x, form, group, *, given=None, threads=1):
    """The results of the kernel, each written between guards."""
    buffers = [guarded(shape, dtype) for shape, dtype in results(x, form, group)]
    addresses = [buffer.array.ctypes.data for buffer in buffers]
    scale = None if given is None else np.array(given, np.float32)
    asked = CPU.Quantization(
        getattr(CPU.Code, form.code),
        getattr(CPU.Scale, form.scale),
        group,
        form.asymmetric,
        0 if scale is None else scale.ctypes.data,
    )
    with t.problem(x) as problem:
        CPU.quantize(problem, asked, x.ctypes.data, CPU.QuantizedBuffers(*addresses), threads)
    for buffer in buffers:
        assert_guards_are_whole(buffer)
    return [buffer.array for buffer in buffers]


def expected(t, x, form, group, given=None):
    """The same of the transform's float32 results."""
    w = t.run(np.ascontiguousarray(x, np.float32).reshape(-1, t.n)).reshape(x.shape)
    codes, *per_group = quantize(w, form, group, given)
    return [packed(codes).view(results(x, form, group)[0][1]), *(part for part in per_group if part is not None)]


def assert_same(actual, wanted):
    """The same bits, or NaN for NaN."""
    assert len(actual) == len(wanted)
    for a, b in zip(actual, wanted, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        as_float = [np.asarray(part).astype(np.float32) for part in (a, b)]
        nan = np.isnan(as_float[0])
        np.testing.assert_array_equal(nan, np.isnan(as_float[1]))
        unsigned = f"u{a.dtype.itemsize}"
        np.testing.assert_array_equal(np.where(nan, 0, a.view(unsigned)), np.where(nan, 0, b.view(unsigned)))


def given_for(form):
    return 0.37 if form.scale == "given" else None


def on_each(isas, t, x, form, group, **given):
    """Checks the results of every instruction set against the oracle's."""
    wanted = expected(t, x, form, group, **given)
    for name in isas:
        assert CPU.select_isa(name)
        assert_same(run(t, x, form, group, **given), wanted)


def halfway(dtype, largest):
    """Every finite number of a small type, what is halfway between two, and the floats next to that."""
    if dtype.name.startswith("int"):
        numbers = np.arange(-largest, largest + 1, dtype=np.float32)
    else:
        numbers = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
        numbers = np.unique(numbers[np.isfinite(numbers)])
    middles = (numbers[1:] + numbers[:-1]) / 2
    neighbours = [np.nextafter(middles, np.float32(end)) for end in (-np.inf, np.inf)]
    return np.concatenate([numbers, -numbers, middles, *neighbours])


@formats
def test_rounds_to_nearest_and_ties_to_even(form, isas):
    """In groups whose scale is 1."""
    ends = [-8, 7] if form.asymmetric else [LARGEST[form.code]]
    values = halfway(form.dtype, LARGEST[form.code])
    others = 16 - len(ends)
    values = np.resize(values, (-(-values.size // others), others))
    x = np.concatenate([np.broadcast_to(np.float32(ends), (len(values), len(ends))), values], axis=1)
    on_each(isas, AS_IT_IS, x, form, 16, given=1 if form.scale == "given" else None)


def spread(shape, *key):
    """Numbers of every magnitude that float32 has, groups of 48 of similar ones; and groups of zeros."""
    generator = rng("spread", shape, *key)
    exponents = generator.integers(-149, 126, (*shape[:-1], shape[-1] // 48, 1))
    x = np.ldexp(generator.standard_normal((*exponents.shape[:-1], 48)), exponents)
    x[0] = 0
    x[1] *= -0.0
    return x.astype(np.float32).reshape(shape)


def anything(shape):
    """Any bits at all."""
    return rng("bits", shape).integers(0, 2**32, shape, np.uint32).view(np.float32)


@formats
@pytest.mark.parametrize("group", [2, 6, 16, 32, 48, 192])
def test_scales_of_every_magnitude(form, group, isas):
    on_each(isas, AS_IT_IS, spread((192, 192)), form, group, given=given_for(form))
    on_each(isas, AS_IT_IS, anything((192, 192)), form, group, given=given_for(form))


@over((*GIVEN, NVFP4))
@pytest.mark.parametrize("given", [2.0**-140, 3.4e38, 0.0, np.inf, np.nan], ids=str)
def test_given_scales_of_every_kind(form, given, isas):
    on_each(isas, AS_IT_IS, spread((192, 192)), form, 16, given=given)


@over(SCALED)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf], ids=["nan", "-nan", "inf", "-inf"])
def test_nan_and_infinity_stay_in_their_group(form, bad):
    x = normal((5, 192), np.float32)
    wanted = run(AS_IT_IS, x, form, 32)
    x[2, 70] = bad
    codes, scales, *zeros = run(AS_IT_IS, x, form, 32)
    assert not np.isfinite(scales[2, 2].astype(np.float32))
    others = np.ones((5, 6), bool)
    others[2, 2] = False
    for a, b in zip((codes, scales, *zeros), wanted, strict=True):
        assert_same_bits(a.reshape(5, 6, -1)[others], b.reshape(5, 6, -1)[others])
    inside = codes.reshape(5, 6, -1)[2, 2]
    if form.code.startswith("float8"):
        # With an infinite scale the codes of finite numbers are 0, times that: NaN.
        assert (np.isnan(inside.astype(np.float32)) | (inside.astype(np.float32) == 0)).all()
    else:
        assert (inside == 0).all()
    assert not any(zero[2, 2] for zero in zeros)


@over(GIVEN)
@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_with_a_given_scale_nothing_spreads(form, bad):
    x = normal((5, 192), np.float32)
    wanted = run(AS_IT_IS, x, form, 192, given=0.01)[0]
    x[2, 70] = bad
    codes = run(AS_IT_IS, x, form, 192, given=0.01)[0]
    at = 70 * form.bits // 8
    np.testing.assert_array_equal(np.argwhere(codes.view(np.uint8) != wanted.view(np.uint8)), [[2, at]])
    code = codes[2, at] & 15 if form.bits == 4 else codes[2, at].astype(np.float32)
    np.testing.assert_equal(code, LARGEST[form.code] if bad > 0 else np.nan if "float" in form.code else 0)


@few
@up_to_float32
@over((Format("int8"), Format("float8_e4m3fn", "given"), ASYMMETRIC, NVFP4))
def test_any_transform_on_any_number_of_threads(t, dtype, form):
    x = normal((5, 16 * t.n), dtype)
    groups = (4, t.n, 2 * t.n, 16 * t.n)
    for group in groups if t.n % 4 == 0 else groups[2:]:
        wanted = expected(t, x, form, group, given_for(form))
        for threads in (1, 7):
            assert_same(run(t, x, form, group, given=given_for(form), threads=threads), wanted)


@few
@up_to_float32
def test_instruction_sets_agree(t, dtype, isas):
    on_each(isas, t, normal((3, 4 * t.n), dtype), Format("float8_e5m2"), 2 * t.n)


@formats
@pytest.mark.parametrize(
    ("n", "group", "last"),
    [(1, 1, 3), (1, 5, 35), (2, 2, 2), (4, 6, 12), (8, 32, 96), (9, 6, 90), (9, 9, 9), (64, 4, 64), (64, 128, 640)],
    ids=str,
)
def test_groups_and_rows_of_any_length(form, n, group, last):
    if form.bits == 4 and group % 2:  # two codes share a byte
        group, last = 2 * group, 2 * last
    t = transform((9,) if n == 9 else (), 1 if n == 9 else n)
    for rows in (0, 1, 3, 501):
        x = normal((rows, last), np.float32)
        for threads in (1, 3):
            actual = run(t, x, form, group, given=given_for(form), threads=threads)
            if rows:
                assert_same(actual, expected(t, x, form, group, given_for(form)))


@pytest.mark.parametrize("form", [Format("int8"), Format("float4_e2m1fn", "float8_e8m0fnu")], ids=str)
def test_subnormal_numbers_are_kept_in_programs(form, cpu_devices):
    """XLA's threads flush them."""
    x = np.ldexp(normal((64, 32), np.float32), -127)
    actual = call(x, form, 32, device=cpu_devices[0])
    assert (actual[0] != 0).any()
    assert_same(actual, expected(AS_IT_IS, x, form, 32))


def call(x, form, group, /, *operands, device, results_are=None, **attributes):
    """The results of the handler."""
    given = {"code": form.code, "scale_type": form.scale, "group": np.int64(group)}
    if form.asymmetric:
        given["asymmetric"] = np.bool_(True)
    given |= {"scale": np.float64(1), "n": np.int64(1)} | attributes
    given = {name: value for name, value in given.items() if value is not None}
    outputs = [jax.ShapeDtypeStruct(*output) for output in results_are or results(x, form, group)]
    with jax.default_device(device):
        program = jax.jit(lambda *operands: jax.ffi.ffi_call(_ffi.QUANTIZE_TARGET, outputs)(*operands, **given))
        return [np.asarray(array) for array in program(x, *operands)]


class TestHandler:
    @few
    @up_to_float32
    @over((Format("float8_e4m3fn"), ASYMMETRIC, *GIVEN[:2], NVFP4))
    def test_reads_what_the_kernel_is_given(self, t, dtype, form, cpu_devices):
        """Signs and scales as operands in either order, and threads."""
        attributes, operands = t.native_call()
        x = normal((8, 8 * t.n), dtype)
        scale = np.float32(0.37)
        if form.scale in {"given", "float8_e4m3fn"}:
            operands = [scale, *operands] if t.n % 8 else [*operands, scale]
        actual = call(x, form, 4 * t.n, *operands, device=cpu_devices[0], **attributes)
        wanted = expected(t, x, form, 4 * t.n, scale if form.scale in {"given", "float8_e4m3fn"} else None)
        assert_same(actual, wanted)

    @pytest.mark.parametrize("shape", [(32,), (0, 32), (2, 3, 64)], ids=str)
    def test_any_rank(self, shape, cpu_devices):
        x = normal(shape, np.float32)
        actual = call(x, Format("int8"), 32, device=cpu_devices[0])
        if x.size:
            assert_same(actual, expected(AS_IT_IS, x, Format("int8"), 32))

    def test_a_group_is_the_last_dimension_by_default(self, cpu_devices):
        x = normal((3, 64), np.float32)
        assert_same(
            call(x, Format("int8"), 64, device=cpu_devices[0], group=None),
            expected(AS_IT_IS, x, Format("int8"), 64),
        )

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"code": None}, "the attribute code must be one of float8_e4m3fn, .*, int4, got ''"),
            ({"code": "int3"}, "the attribute code must be one of .*, got 'int3'"),
            ({"code": np.int64(8)}, "the attribute code has another type"),
            ({"scale_type": "float16"}, "the attribute scale_type must be one of float32, .*, given, got 'float16'"),
            ({"scale_type": "float8_e8m0fnu"}, "no such codes with scales of that type"),
            ({"scale_type": "float8_e4m3fn"}, "no such codes with scales of that type"),
            ({"code": "float4_e2m1fn"}, "no such codes with scales of that type"),
            ({"scale_type": "given"}, "given scale, an operand of f32, is missing"),
            ({"group": np.int64(0)}, "64, must be a multiple of group = 0"),
            ({"group": np.int64(-32)}, "64, must be a multiple of group = -32"),
            ({"group": np.int64(48)}, "64, must be a multiple of group = 48"),
            ({"group": np.float32(32)}, "the attribute group has another type"),
            ({"group": np.int64(64)}, "scales must be 3 of XLA type .*, got 6 of"),
            ({"code": "float8_e5m2"}, "codes must be 192 of XLA type .*, got 192 of"),
            ({"asymmetric": np.bool_(True)}, "zero points go with codes of int4"),
            ({"n": np.int64(48)}, "must be a multiple of n = 48"),
            ({"n": np.int64(64), "signs": np.zeros(3, np.uint32)}, "2 words of signs, got 3"),
            (
                {"behind": np.int64(1), "n": np.int64(64)},
                "only CUDA's transform takes a dimension with others behind it, got one with 3 elements",
            ),
        ],
        ids=str,
    )
    def test_refuses_attributes(self, changed, message, cpu_devices):
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"jax_hadacore: .*{message}"):
            call(normal((3, 64), np.float32), Format("int8"), 32, device=cpu_devices[0], **changed)

    @pytest.mark.parametrize(
        ("form", "operands", "message"),
        [
            (Format("int8"), [np.float32(1)], "scales of that type have no scale as an operand"),
            (GIVEN[0], [np.float64(1)], "must be signs, of type u32, or a scale, of type f32, got"),
            (GIVEN[0], [np.ones(2, np.float32)], "must be one number, got 2"),
            (GIVEN[0], [np.ones(0, np.float32)], "must be one number, got 0"),
            (GIVEN[0], [np.float32(1), np.float32(1)], "one operand of each type after x, got two"),
            (GIVEN[0], [np.float32(1), np.zeros(3, np.uint32)], "1 words of signs, got 3"),
        ],
        ids=str,
    )
    def test_refuses_operands(self, form, operands, message, cpu_devices):
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"jax_hadacore: .*{message}"):
            call(normal((3, 64), np.float32), form, 32, *operands, device=cpu_devices[0])

    @pytest.mark.parametrize("dtype", ["float64", "int32"])
    def test_refuses_types(self, dtype, cpu_devices):
        with pytest.raises(jax.errors.JaxRuntimeError, match="jax_hadacore: the element type must be f16, bf16"):
            call(np.ones((3, 64), dtype), Format("int8"), 32, device=cpu_devices[0])

    @pytest.mark.parametrize(
        ("form", "wrong", "message"),
        [
            (Format("int8"), {0: ((3, 32), "int8")}, "codes must be 192 of .*, got 96"),
            (Format("int8"), {0: ((3, 64), "uint8")}, "codes must be 192 of"),
            (Format("int4"), {0: ((3, 64), "uint8")}, "codes must be 96 of .*, got 192"),
            (Format("int4"), {0: ((3, 32), ml_dtypes.int4)}, "codes must be 96 of"),
            (Format("int8"), {1: ((3, 1), "float32")}, "scales must be 6 of .*, got 3"),
            (Format("int8"), {1: ((3, 2), "float16")}, "scales must be 6 of"),
            (Format("int8"), {1: None}, "there is no array for scales"),
            (ASYMMETRIC, {2: ((3, 1), "int8")}, "zero points must be 6 of .*, got 3"),
            (ASYMMETRIC, {2: ((3, 2), "uint8")}, "zero points must be 6 of"),
            (ASYMMETRIC, {2: None}, "there is no array for zero points"),
        ],
        ids=str,
    )
    def test_refuses_results(self, form, wrong, message, cpu_devices):
        x = normal((3, 64), np.float32)
        outputs = [wrong.get(i, output) for i, output in enumerate(results(x, form, 32))]
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"jax_hadacore: .*{message}"):
            call(x, form, 32, device=cpu_devices[0], results_are=[output for output in outputs if output])

    def test_groups_of_packed_codes_are_even(self, cpu_devices):
        x = normal((3, 6), np.float32)
        with pytest.raises(jax.errors.JaxRuntimeError, match="multiple of group = 3, which must be even"):
            call(x, Format("int4"), 3, device=cpu_devices[0])
