"""What the transform costs in a jitted program beside an elementwise operation in its place, and what XLA made of it.

Device: the time of an iteration of a compiled loop. Dispatch: the time to start a call, not waiting for it. Call: the
time of a call and of waiting for it.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from .._transform import hadamard
from .grid import Case

# A call keeps its operand, which an operation in place would copy first; a loop's state is updated in place.
_OPERATIONS: dict[str, Callable] = {
    "hadamard": hadamard,
    "elementwise": lambda x: x * jnp.asarray(-0.5, x.dtype),
}
_OF_LOOPS = {**_OPERATIONS, "hadamard": partial(hadamard, inplace=True)}
# Elements that a timed loop goes through; at most 500 iterations.
_LOOP_ELEMENTS = {"gpu": 1 << 30, "cpu": 1 << 25}
_CALLS = 2000
_DUMPED = """
import jax, jax.numpy as jnp
from jax_hadacore import hadamard
x = jnp.ones((64, 128), jnp.bfloat16)
f = jax.jit(lambda x: hadamard(jnp.sin(hadamard(jnp.cos(hadamard(x)), axis=-1))))
for _ in range(3):
    jax.block_until_ready(f(x))
"""


def rows(platform: str, cases: Iterable[Case]) -> Generator[dict]:
    """Times each case; every call and iteration works on the same data."""
    for case in cases:
        x = jax.random.normal(jax.random.key(0), (case.elements // case.n, case.n), case.dtype)
        steps = max(2, min(500, _LOOP_ELEMENTS[platform] // case.elements))
        yield {
            **case.row(cold=False),
            "microseconds": {
                name: {
                    "device": _device_time(_OF_LOOPS[name], x, steps),
                    "dispatch": _dispatch_time(operation, x, steps),
                    "call": _call_time(operation, x),
                }
                for name, operation in _OPERATIONS.items()
            },
        }


def loop_copies() -> dict[str, int]:
    """Copies in the HLO of a loop of each operation."""
    x = jnp.ones((64, 128), jnp.bfloat16)
    texts = {name: _loop.lower(x, operation, 500).compile().as_text() or "" for name, operation in _OF_LOOPS.items()}
    return {name: text.count(" copy(") + text.count(" copy-start(") for name, text in texts.items()}


def thunks() -> list[str]:
    """XLA's thunks for three transforms with elementwise operations between them, on a GPU.

    A custom call in a command buffer is part of a CUDA graph.
    """
    with tempfile.TemporaryDirectory() as folder:
        environ = {
            **os.environ,
            "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_module_re=.*lambda.*",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process holds the GPU's memory
        }
        # In a folder where no checkout hides the package.
        command = [sys.executable, "-c", _DUMPED]
        dumped = subprocess.run(command, check=False, capture_output=True, text=True, env=environ, cwd=folder)
        if dumped.returncode:
            return [f"not dumped: {(dumped.stderr.strip().splitlines() or ['unknown error'])[-1]}"]
        texts = [path.read_text() for path in sorted(Path(folder).glob("*thunk_sequence*"))]
    return [
        re.sub(r"\s+", " ", line)[:100] for text in texts for line in text.splitlines() if re.search(r"k[A-Z]\w+", line)
    ]


@partial(jax.jit, static_argnums=(1, 2))
def _loop(x, operation, steps):
    """Iterations of an operation, each on the result of the one before."""
    return jax.lax.fori_loop(0, steps, lambda _, x: operation(x), x)


def _device_time(operation: Callable, x: jax.Array, steps: int) -> float:
    times = [_seconds(lambda: _loop(x, operation, steps).block_until_ready()) for _ in range(22)]
    return 1e6 * statistics.median(times[2:]) / steps


def _dispatch_time(operation: Callable, x: jax.Array, steps: int) -> float:
    f, times = jax.jit(operation), []
    calls = min(_CALLS, 20 * steps)
    for i in range(calls + 20):
        start = time.perf_counter()
        y = f(x)
        times.append(time.perf_counter() - start)
        if i % 20 == 0:
            y.block_until_ready()
    return 1e6 * statistics.median(times[20:])


def _call_time(operation: Callable, x: jax.Array) -> float:
    f = jax.jit(operation)
    times = [_seconds(lambda: f(x).block_until_ready()) for _ in range(110)]
    return 1e6 * statistics.median(times[10:])


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
