"""The dimensions of models: device time beside a copy of the same bytes, and of some a dense product beside a call."""

from collections.abc import Generator, Sequence

import jax.numpy as jnp
import numpy as np

from .._measure import error_bound
from .._orders import orders
from . import alternatives, device
from .grid import Case
from .models import MODELS

_ELEMENTS = {"gpu": 1 << 25, "cpu": 1 << 22}  # of a case, at most
_ROWS = 8  # a case has a multiple of so many
_FLOAT32_ORDERS = 28  # the largest with rows of float32
# XLA compiles and tunes a dense product for seconds, and its time depends on n alone: so much for these unless lengths
# are named.
_DENSE_LENGTHS = (128, 896, 3072, 7168, 14336, 28672)
# The dtype that a platform multiplies matrices of fast, and elements * n of the largest product.
_DENSE = {"gpu": (np.dtype(jnp.bfloat16), 1 << 40), "cpu": (np.dtype(np.float32), 1 << 32)}


def cases(platform: str, lengths: Sequence[int] | None) -> list[Case]:
    """Every dimension of a model, or the lengths that are named."""
    named = sorted(set(lengths or MODELS))
    few = [n for n in named if max(orders(n), default=1) <= _FLOAT32_ORDERS]
    return [
        Case(np.dtype(dtype), n, n * max(_ROWS, _ELEMENTS[platform] // n // _ROWS * _ROWS))
        for dtype, some in ((jnp.bfloat16, named), (jnp.float32, few))
        for n in some
    ]


def rows(platform: str, cases: Sequence[Case], lengths: Sequence[int] | None) -> Generator[dict]:
    """Times each case out of place; of some, as 'calls', also jitted calls of the transform and of a dense product."""
    dtype, most = _DENSE[platform]
    for case, row in zip(cases, device.rows(platform, cases, inplace=False), strict=True):
        row["bound"] = error_bound(case.dtype, case.n)
        if case.dtype == dtype and case.elements * case.n <= most and case.n in (lengths or _DENSE_LENGTHS):
            row["calls"] = alternatives.beside_dense(case)
        yield row
