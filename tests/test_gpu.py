"""What takes a GPU to see: arrays of more than 2^32 elements, streams side by side, many rows to a processor."""

import functools
import json
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, assert_same_bits, dtypes, halves, lengths, normal
from hlo import copies, hlo, transpositions
from kernels import Request, address, transform_on_gpu
from oracle import bound, error_in_roundings, transform

import jax_hadacore
from jax_hadacore import _cli

FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = DTYPES


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _scattered(dtype, rows, n, first_row=0):
    """Rows of numbers in [-8, 8) that depend on the index of the element in the whole array."""
    index = (_iota(rows, n, 0) + first_row) * n + _iota(rows, n, 1)
    mixed = (index * 0x1E3779B97F4A7C15 >> 40) & 0xFFFF
    return (mixed.astype(jnp.float32) / 4096 - 8).astype(dtype)


def _iota(rows, n, dimension):
    return jax.lax.broadcasted_iota(jnp.uint64, (rows, n), dimension)


@pytest.mark.parametrize(
    ("dtype", "n", "inplace"),
    [
        (BFLOAT16, 128, False),
        (BFLOAT16, 32768, False),
        (FLOAT32, 1024, False),
        (BFLOAT16, 65536, False),
        (FLOAT32, 65536, False),
        (FLOAT16, 512, True),
        (FLOAT64, 512, True),
    ],
    ids=str,
)
def test_more_than_2_to_32_elements(dtype, n, inplace):
    rows = 2**32 // n + 3
    f = jax.jit(functools.partial(jax_hadacore.hadamard, inplace=inplace), donate_argnums=0 if inplace else ())
    y = f(_scattered(dtype, rows, n))
    piece = max(1, 2**20 // n)
    for first in (0, 2**31 // n - piece // 2, 2**32 // n - piece + 2, rows - piece):
        x = _scattered(dtype, piece, n, first)
        actual = np.asarray(jax.lax.dynamic_slice_in_dim(y, first, piece))
        assert error_in_roundings(actual, transform(np.asarray(x)), dtype) <= bound(dtype, n)
    step = 2**26 // n  # everywhere else: the same bits as in smaller arrays
    equal = [
        jnp.array_equal(jax_hadacore.hadamard(_scattered(dtype, step, n, first)), y[first : first + step])
        for first in range(0, rows - step, step)
    ]
    assert all(equal)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_more_than_2_to_32_elements_in_columns(dtype):
    x = _scattered(dtype, 8, 2**29 + 64)
    y = jax.jit(functools.partial(jax_hadacore.hadamard, axis=0))(x)
    for first in (0, 2**28 - 32, 2**29 - 32, 2**29):
        actual, piece = (np.asarray(jax.lax.dynamic_slice_in_dim(a, first, 64, axis=1)) for a in (y, x))
        assert_same_bits(actual.T, np.asarray(jax_hadacore.hadamard(piece.T)))


@pytest.mark.parametrize("inplace", [False, True])
def test_an_axis_before_the_last_stays_where_it_is(inplace):
    x = jnp.asarray(normal((4, 64, 128), FLOAT32).astype(BFLOAT16))
    f = functools.partial(jax_hadacore.hadamard, axis=-2, inplace=inplace)
    text = hlo(f, x, donate_argnums=0 if inplace else ())
    assert (copies(text), transpositions(text), "fusion" in text) == (0, 0, False)
    text = hlo(lambda x: 2 * f(x + 1), x)
    assert (copies(text), transpositions(text)) == (0, 0)


@dtypes
@lengths(16, 1024, 4096, 8192, 16384, 32768)
def test_bits_do_not_depend_on_the_number_of_rows(n, dtype):
    # From fewer rows than a GPU runs at once to many times as many, odd and even.
    x = jnp.asarray(normal((2**25 // n + 1, n), FLOAT32).astype(dtype))
    whole = jax_hadacore.hadamard(x)
    for rows in (1, 7, 131, 133, 263, 265, 529, 1057, 2**25 // n):
        assert_same_bits(np.asarray(jax_hadacore.hadamard(x[-rows:])), np.asarray(whole[-rows:]))


def test_streams_side_by_side():
    # Each call has its own stream, and releases the GIL.
    def operands(dtype, n):
        x = jnp.asarray(normal((2**21 // n, n), dtype))
        y = [jnp.full_like(x, jnp.nan) for _ in range(8)]
        workspace = jnp.zeros(x.shape, jnp.float32)
        return jax.block_until_ready((x, y, workspace))

    problems = [(dtype, n) for dtype in DTYPES for n in (32, 2048, 32768, 65536)]
    cases = [operands(*problem) for problem in problems]

    def run(case):
        x, results, workspace = case
        for y in results:
            transform_on_gpu(Request(x.dtype, x.shape[1], x.shape[0]), address(x), address(y), address(workspace))

    with ThreadPoolExecutor(len(cases)) as pool:
        list(pool.map(run, cases))
    for x, results, _ in cases:
        expected = np.asarray(jax_hadacore.hadamard(x, scale=1))
        for y in results:
            assert_same_bits(np.asarray(y), expected)


@halves
def test_programs_side_by_side(dtype):
    # Threads that run compiled programs, among them ones with a workspace.
    f = jax.jit(jax_hadacore.hadamard)
    arrays = [jnp.asarray(normal((2**20 // n, n), dtype)) for n in (64, 4096, 32768, 65536, 2**18)]
    expected = [np.asarray(f(x)) for x in arrays]
    with ThreadPoolExecutor(len(arrays)) as pool:
        for _ in range(5):
            for y, reference in zip(pool.map(f, arrays), expected, strict=True):
                assert_same_bits(np.asarray(y), reference)


@pytest.mark.parametrize("options", [[], ["--inplace"]], ids=["out of place", "in place"])
def test_benchmark_of_the_device(tmp_path, options):
    path = tmp_path / "run.json"
    sizes = ["--n", "128", "2^16", "--elements", "2^16", "2^22"]
    assert _cli.main(["bench", "--tables", "device", "--dtype", "bfloat16", *sizes, *options, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["device"]
    assert [row["caches"] for row in rows] == ["warm", "warm", "cold", "cold"]
    for row in rows:
        assert 0 < row["ratio"] < 2  # a copy is hard to beat
        assert row["error"] <= bound(BFLOAT16, row["n"])
