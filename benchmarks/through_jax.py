"""What the transform costs in a jitted program, beside an elementwise operation in its place; NVIDIA GPUs only.

    python benchmarks/through_jax.py [--out FILE.json]

Device: the time of an iteration of a compiled loop. Host: the time to dispatch a call, not waiting for it. Commands:
which of XLA's thunks a program of transforms became; a custom call in a command buffer is part of a CUDA graph.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from environment import environment

import jax_hadacore

SHAPES = [(64, 128), (32, 128), (1, 8192), (512, 4096)]  # queries of a decoding step of two models, and more
STEPS = 500
OPERATIONS = {
    "hadamard": partial(jax_hadacore.hadamard, inplace=True),  # a loop's state is updated in place
    "elementwise": lambda x: x * jnp.asarray(-0.5, x.dtype),
}
DUMPED = """
import jax, jax.numpy as jnp
from jax_hadacore import hadamard
x = jnp.ones((64, 128), jnp.bfloat16)
f = jax.jit(lambda x: hadamard(jnp.sin(hadamard(jnp.cos(hadamard(x)), axis=-1))))
for _ in range(3):
    jax.block_until_ready(f(x))
"""


@partial(jax.jit, static_argnums=1)
def loop(x, operation):
    """STEPS iterations of an operation, each on the result of the one before."""
    return jax.lax.fori_loop(0, STEPS, lambda _, x: operation(x), x)


def device_time(operation, x) -> float:
    """Microseconds of an iteration, median of 20 runs."""
    times = []
    for _ in range(22):
        start = time.perf_counter()
        loop(x, operation).block_until_ready()
        times.append(1e6 * (time.perf_counter() - start) / STEPS)
    return statistics.median(times[2:])


def host_time(operation, x) -> float:
    """Microseconds to dispatch a jitted call, median of 2000 calls."""
    f, times = jax.jit(operation), []
    for i in range(2200):
        start = time.perf_counter()
        y = f(x)
        times.append(1e6 * (time.perf_counter() - start))
        if i % 20 == 0:
            y.block_until_ready()
    return statistics.median(times[200:])


def thunks() -> list[str]:
    """XLA's thunks for three transforms with elementwise operations between them."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_dump_to={folder} --xla_dump_hlo_module_re=.*lambda.*"
        environ = {
            **os.environ,
            "XLA_FLAGS": flags,
        }  # in a folder where no checkout hides the package
        subprocess.run([sys.executable, "-c", DUMPED], check=True, env=environ, cwd=folder)
        texts = [p.read_text() for p in sorted(Path(folder).glob("*thunk_sequence*"))]
    return [
        re.sub(r"\s+", " ", line)[:100] for text in texts for line in text.splitlines() if re.search(r"k[A-Z]\w+", line)
    ]


def main() -> None:
    """Prints a table and stores it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = []
    print(
        f"{'microseconds':>14}"
        + "".join(f"{f'{place} {name}':>20}" for place in ("device", "host") for name in OPERATIONS)
    )
    for shape in SHAPES:
        x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
        result = {"shape": shape}
        for place, measure in (("device", device_time), ("host", host_time)):
            for name, operation in OPERATIONS.items():
                result[f"{place} {name}"] = measure(operation, x)
        results.append(result)
        print(
            f"{shape!s:>14}" + "".join(f"{value:20.2f}" for key, value in result.items() if key != "shape"), flush=True
        )
    copies = {
        name: text.count(" copy(") + text.count(" copy-start(")
        for name, operation in OPERATIONS.items()
        for text in [loop.lower(jnp.ones(SHAPES[0], jnp.bfloat16), operation).compile().as_text()]
    }
    found = thunks()
    print("copies in the loop's HLO:", copies)
    print("thunks:", *found, sep="\n  ")
    if arguments.out:
        stored = {"environment": environment(), "results": results, "copies": copies, "thunks": found}
        arguments.out.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
