"""The CPU kernel alone: orders that are no powers of two, real matrices and signs, against float64 sums."""

import itertools
import math
from typing import NamedTuple

import jax
import numpy as np
import oracle
import pytest
from cases import HALVES, assert_same_bits, bits, dtypes, normal, rng

from jax_hadacore import _ffi

CPU = _ffi.CPU.module
ISAS = ("baseline", "avx2", "avx512")
# The order 172 has no Paley matrix: the kernel takes what it is given. 1, 6 and 9 are no multiples of four.
ORDERS = (1, 6, 9, 12, 20, 28, 36)
LARGE_ORDERS = (76, 172, 344, 524, 1020)
PAIRS = ((36, 76), (12, 52), (9, 5))
POWERS = (1, 2, 4, 16, 32, 256, 1024)


def words_of(minus):
    """Packed signs of the last axis, where `minus` is true: elements 2 i and 2 i + 1 have the bits i and 16 + i."""
    pad = [(0, 0)] * (minus.ndim - 1) + [(0, -minus.shape[-1] % 32)]
    pairs = np.pad(minus, pad).reshape(*minus.shape[:-1], -1, 16, 2).astype(np.uint32)
    index = np.arange(16, dtype=np.uint32)
    return np.ascontiguousarray((pairs[..., 0] << index | pairs[..., 1] << index + 16).sum(-1, dtype=np.uint32))


class Transform(NamedTuple):
    """What a call of the kernel is given; the matrices are +-1 but for `real`, which is one of other entries."""

    orders: tuple[int, ...]
    power: int
    matrices: tuple[np.ndarray, ...] = ()
    real: bool = False
    signs: np.ndarray | None = None
    signs_last: bool = False

    @property
    def n(self):
        return math.prod(self.orders) * self.power

    @property
    def scale(self):
        """About n**-0.5, but without a rounding of its own in float32."""
        return float(np.float32(self.n**-0.5))

    def run(self, x, threads=1, *, inplace=False):
        """The result, in memory that has held NaN, and where guards stand."""
        memory = np.full(x.size + 64, np.nan, x.dtype)
        y = memory[32 : 32 + x.size].reshape(x.shape)
        if inplace:
            y[:] = x
        self._run(y if inplace else x, y, threads)
        assert np.isnan(memory[:32].astype(np.float32)).all()
        assert np.isnan(memory[32 + x.size :].astype(np.float32)).all()
        return y

    def _run(self, x, y, threads):
        packed = [words_of(matrix < 0).ravel() for matrix in self.matrices if not self.real]
        factors = np.concatenate([*packed, np.zeros(0, np.uint32)])
        values = self.matrices[0].copy() if self.real else None
        signs = None if self.signs is None else words_of(self.signs < 0)
        problem = CPU.Problem(
            getattr(CPU.Dtype, x.dtype.name),
            self.n,
            len(x),
            self.scale,
            list(self.orders),
            factors=factors.ctypes.data if packed else 0,
            matrix=0 if values is None else values.ctypes.data,
            signs=0 if signs is None else signs.ctypes.data,
            signs_last=self.signs_last,
        )
        CPU.transform(problem, x.ctypes.data, y.ctypes.data, threads)

    def exact(self, x):
        """The transform by its definition."""
        if self.signs is not None and not self.signs_last:
            x = x * self.signs.astype(x.dtype)
        y = oracle.transform(x.reshape(-1, self.power), scale=1).reshape(x.shape) * self.scale
        for matrix, inner in zip(self.matrices, self._inner_lengths(), strict=True):
            y = np.matmul(matrix.astype(y.dtype), y.reshape(-1, len(matrix), inner)).reshape(x.shape)
        return y * self.signs if self.signs is not None and self.signs_last else y

    def _inner_lengths(self):
        return [self.n // math.prod(self.orders[: i + 1]) for i in range(len(self.orders))]


def transform(orders, power, *, signs=None, real=False):
    """Random matrices; signs 'first' or 'last'."""
    generator = rng("matrices", orders, power, signs, real)

    def draw(*shape):
        return generator.choice([-1.0, 1.0], shape)

    n = math.prod(orders) * power
    matrices = tuple(generator.standard_normal((k, k)) if real else draw(k, k) for k in orders)
    return Transform(orders, power, matrices, real, None if signs is None else draw(n), signs == "last")


def bound(t, dtype):
    """The error in roundings; a real matrix's entries and products are rounded too, by half a unit or less each."""
    if dtype in HALVES:
        return 1.05
    return math.hypot(oracle.bound(dtype, t.n), 2 if t.real else 0)


def assert_right(t, x, y):
    if x.dtype == np.float64 and not oracle.HAS_WIDE_FLOAT64:
        np.testing.assert_allclose(y, t.exact(x), rtol=0, atol=1e-12)
        return
    assert oracle.error_in_roundings(y, t.exact(x), x.dtype) <= bound(t, x.dtype)


def rows_for(n):
    return 4096 // n + 3 if n <= 4096 else 2


@pytest.fixture
def isa():
    """Every instruction set that this processor has, the widest last and in the end."""
    names = [name for name in ISAS if CPU.select_isa(name)]
    yield names
    CPU.select_isa(names[-1])


FEW = [
    transform((), 8, signs="first"),
    transform((), 2**15, signs="first"),
    transform((), 2**15, signs="last"),
    transform((9,), 1, signs="last"),
    transform((12,), 1, signs="first"),
    transform((28,), 1024, signs="first"),
    transform((344,), 32, signs="last"),
    transform((344,), 64, signs="last"),
    transform((36, 76), 4, signs="first"),
    transform((44, 84), 8, signs="last"),
    transform((12,), 4, real=True, signs="first"),
    transform((300,), 64, real=True),
]


def over(*choice):
    """Parametrises a test over transforms."""
    return pytest.mark.parametrize(
        "t",
        choice,
        ids=lambda t: (
            f"{'x'.join(map(str, (*t.orders, t.power)))}{'-last' if t.signs_last else ''}{'-real' if t.real else ''}"
        ),
    )


few = over(*FEW)


@over(
    *(transform((order,), power) for order, power in itertools.product(ORDERS, POWERS)),
    *(transform((order,), power) for order, power in itertools.product(LARGE_ORDERS, (1, 4, 32))),
    *(transform(pair, power) for pair, power in itertools.product(PAIRS, (1, 4, 32))),
    *(transform((order,), power, real=True) for order, power in itertools.product((1, 6, 12, 172, 524), (1, 4, 64))),
)
@dtypes
def test_any_order(t, dtype):
    x = normal((rows_for(t.n), t.n), dtype)
    assert_right(t, x, t.run(x))


@dtypes
@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize(
    ("orders", "power"), [((), 1), ((), 16), ((), 128), ((), 4096), ((), 1 << 16), ((20,), 2), ((28,), 512)], ids=str
)
def test_signs(orders, power, where, dtype):
    t = transform(orders, power, signs=where)
    x = normal((rows_for(t.n), t.n), dtype)
    plain = t._replace(signs=None)
    signs = t.signs.astype(dtype)
    expected = plain.run(x) * signs if t.signs_last else plain.run(x * signs)
    assert_same_bits(t.run(x), expected)


@few
@dtypes
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_threads_rows_and_place_never_show(t, dtype, inplace):
    x = normal((257 if t.n < 4096 else 17, t.n), dtype)
    expected = t.run(x)
    assert_right(t, x, expected)
    for rows, threads in itertools.product((0, 1, 3, len(x)), (1, 2, 5)):
        assert_same_bits(t.run(x[:rows], threads, inplace=inplace), expected[:rows])
    assert_same_bits(t.run(x[5:6]), expected[5:6])


@few
@dtypes
def test_instruction_sets_agree(t, dtype, isa):
    x = normal((19 if t.n < 4096 else 3, t.n), dtype)
    results = []
    for name in isa:
        assert CPU.select_isa(name)
        results.append(t.run(x))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@few
@dtypes
@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_nan_and_infinity_stay_in_their_row(t, dtype, bad):
    x = normal((7, t.n), dtype)
    expected = t.run(x)
    x[3, t.n // 2] = bad
    y = t.run(x)
    assert not np.isfinite(y[3].astype(np.float64)).any()
    for part in (slice(3), slice(4, None)):
        assert_same_bits(y[part], expected[part])


@over(*(t for t in FEW if not t.real))  # whose sums are exact
def test_subnormal_numbers_are_kept(t):
    x = rng("subnormal", t.n).integers(-9, 10, (2, t.n)).astype(np.float32) * np.float32(2**-149)
    y = t.run(x)
    np.testing.assert_allclose(y, t.exact(x), rtol=0, atol=2**-149)
    assert (bits(y) & 0x7FFFFFFF).any()


def test_one_rows_error_grows_like_the_logarithm():
    """Where a sum in sequence would be off by more than the bound."""
    t = transform((1020,), 1)
    x = np.abs(normal((200, t.n), np.float32)) + 1
    assert_right(t, x, t.run(x))


@few
@dtypes
@pytest.mark.parametrize("shape", [(3,), (2, 2), (40,)], ids=str)
def test_the_handler_reads_what_the_kernel_is_given(t, dtype, shape, cpu_devices):
    """A last dimension of two transforms, threads, and signs as an attribute or an operand."""
    x = normal((*shape[:-1], shape[-1], 2 * t.n), dtype)
    attributes = {"scale": np.float64(t.scale), "n": np.int64(t.n), "orders": np.array(t.orders, np.int64)}
    if t.real:
        attributes["matrix"] = t.matrices[0].ravel()
    elif t.orders:
        attributes["factors"] = np.concatenate([words_of(matrix < 0).ravel() for matrix in t.matrices])
    operands = []
    if t.signs is not None:
        attributes["signs_last"] = np.bool_(t.signs_last)
        if t.signs_last:
            operands = [words_of(t.signs < 0)]
        else:
            attributes["signs"] = words_of(t.signs < 0)
    call = jax.ffi.ffi_call(_ffi.HADAMARD_TARGET, jax.ShapeDtypeStruct(x.shape, x.dtype))
    with jax.default_device(cpu_devices[0]):
        y = np.asarray(call(x, *operands, **attributes))
    assert_same_bits(y.reshape(-1, t.n), t.run(x.reshape(-1, t.n)))
