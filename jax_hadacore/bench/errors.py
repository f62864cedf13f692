"""The error of the transform in roundings, for every length and type, on the default device."""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from .._measure import definition, error_bound, error_in_roundings
from .._transform import hadamard
from .grid import DTYPES, Case

_ELEMENTS = 1 << 20  # at least, where a row is shorter
_LONGEST = 24  # bits


def cases(dtypes: Sequence[str] | None, lengths: Sequence[int] | None) -> list[Case]:
    """Every length and dtype, or those named."""
    lengths = lengths or [1 << bits for bits in range(_LONGEST + 1)]
    return [Case(np.dtype(dtype), n, max(n, _ELEMENTS)) for n in lengths for dtype in dtypes or (*DTYPES, "float64")]


def rows(cases: Sequence[Case]) -> Generator[dict]:
    """The error of random rows; exact results by the definition in float64, for float64 in extended precision."""
    x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_x64", True)
    pool = ThreadPoolExecutor()  # NumPy computes without the interpreter's lock
    try:
        yield from pool.map(_row, cases)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for the longest
        jax.config.update("jax_enable_x64", x64)


def _row(case: Case) -> dict:
    x = np.random.default_rng(case.n).standard_normal((case.elements // case.n, case.n)).astype(case.dtype)
    exact = definition(x, np.longdouble if case.dtype == np.float64 else np.float64)
    return {
        "dtype": case.dtype.name,
        "n": case.n,
        "error": error_in_roundings(np.asarray(hadamard(x)), exact),
        "bound": error_bound(case.dtype, case.n),
    }
