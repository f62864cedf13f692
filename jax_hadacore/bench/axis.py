"""An axis that is not the last: calls beside ones that transpose, and on a GPU device time beside copies."""

from collections.abc import Generator, Iterable
from functools import partial

import jax
import jax.numpy as jnp

from .._transform import hadamard
from . import device
from .alternatives import microseconds
from .grid import COLUMNS, Case, Replays


def rows(platform: str, cases: Iterable[Case]) -> Generator[dict]:
    """Times each case as the axis before the last, of COLUMNS elements."""
    for case in cases:
        shape = (case.elements // (case.n * COLUMNS), case.n, COLUMNS)
        x = jax.random.normal(jax.random.key(0), shape, case.dtype)
        yield {
            **case.row(cold=case.exceeds_caches),
            "columns": COLUMNS,
            "microseconds": {name: microseconds(jax.jit(operation), x) for name, operation in _OPERATIONS.items()},
            **(_on_the_device(case) if platform == "gpu" else {}),
        }


def _transposed(x):
    return jnp.moveaxis(hadamard(jnp.moveaxis(x, -2, -1)), -1, -2)


_OPERATIONS = {"hadamard": partial(hadamard, axis=-2), "transposed": _transposed, "elementwise": jnp.negative}


def _on_the_device(case: Case) -> dict:
    """The ratio of the best copy to the kernel of columns, where there is one."""
    native = device.native("cuda")
    rows, dtype = case.elements // case.n, getattr(native.Dtype, case.dtype.name)
    problem = native.Problem(dtype, case.n, rows, case.n**-0.5, stride=COLUMNS)
    if not native.takes_stride(problem):
        return {}
    plan = Replays.of(case)
    x = jax.random.normal(jax.random.key(0), (case.elements * plan.sets,), case.dtype)
    y = jnp.ones_like(x)
    jax.block_until_ready((x, y))
    addresses = [buffer.unsafe_buffer_pointer() for buffer in (x, y)]
    return {
        "ratio": device.summary(native.measure(problem, *addresses, 0, plan.sets, plan.launches, plan.replays))["ratio"]
    }
