"""What two GPUs of one host do together: throughput of a sharded batch, and the transform of a split axis.

    python benchmarks/two_gpus.py [--elements N] [--out FILE.json]

Throughput: twice the array on two GPUs against the array on one. Split axis: axis_name against a gather of the axis, a
whole transform and a slice, by shard_map and as the compiler does it; times are those of one transform in a chain of
them, memory is what XLA plans for one on each GPU. For the logic alone it runs on a CPU as well, with
XLA_FLAGS=--xla_force_host_platform_device_count=2 and a small N.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jax_hadacore
from jax_hadacore import hadamard

CHAIN = 16  # transforms in a program, so that its dispatch does not count
SPLIT = P(None, "gpu")
COLLECTIVE = re.compile(r" (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(?:-start)?\(")


def chained(f, x):
    """CHAIN transforms one after the other; the barriers keep XLA from simplifying one with the next."""
    for _ in range(CHAIN):
        x = jax.lax.optimization_barrier(f(x))
    return x


def microseconds(f, x, repeats: int = 15) -> float:
    """The time of one transform in a compiled chain, median."""
    program = jax.jit(partial(chained, f))
    program(x).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        program(x).block_until_ready()
        times.append(1e6 * (time.perf_counter() - start) / CHAIN)
    return statistics.median(times)


def collectives(f, x) -> list[str]:
    return COLLECTIVE.findall(jax.jit(f).lower(x).compile().as_text())


def normal(shape, sharding, dtype=jnp.bfloat16):
    draw = jax.jit(lambda: jax.random.normal(jax.random.key(0), shape, dtype), out_shardings=sharding)
    return draw()


def batch(mesh: Mesh, elements: int) -> list[dict]:
    """Throughput of a batch on two GPUs against one."""
    sharding = NamedSharding(mesh, P("gpu"))
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(hadamard(x).astype(jnp.float32))))
    results = []
    for n in (n for n in (1024, 4096, 16384) if 2 * n <= elements):
        shape = (elements // n, n)
        alone = normal(shape, SingleDeviceSharding(mesh.devices[0]))
        both = normal((2 * shape[0], n), sharding)
        for f in (hadamard, gradient, partial(chained, hadamard)):
            assert collectives(f, both) == [], collectives(f, both)
        np.testing.assert_array_equal(hadamard(jax.device_put(both, mesh.devices[0])), jax.jit(hadamard)(both))
        one, two = microseconds(hadamard, alone), microseconds(hadamard, both)
        results.append({"n": n, "one_us": one, "two_us": two, "throughput_ratio": 2 * one / two})
    return results


def gathered(x):
    """The whole axis on each GPU, transformed there, and its own block of the result."""
    n = x.shape[1]
    y = hadamard(jax.lax.all_gather(x, "gpu", axis=1, tiled=True))
    return jax.lax.dynamic_slice_in_dim(y, n * jax.lax.axis_index("gpu"), n, axis=1)


def memory(f, x) -> dict:
    """Bytes on each GPU that XLA plans for one transform."""
    plan = jax.jit(f).lower(x).compile().memory_analysis()
    sizes = {kind: getattr(plan, f"{kind}_size_in_bytes") for kind in ("argument", "output", "temp")}
    return {**sizes, "total": sum(sizes.values())}


def split_axis(mesh: Mesh, elements: int) -> list[dict]:
    """The transform of an axis that is split over two GPUs, by each strategy."""
    sharding = NamedSharding(mesh, SPLIT)
    over = partial(jax.shard_map, mesh=mesh, in_specs=SPLIT, out_specs=SPLIT)
    strategies = {
        "axis_name": over(partial(hadamard, axis_name="gpu")),
        "gather": over(gathered),
        "compiler": lambda x: jax.lax.with_sharding_constraint(hadamard(x), sharding),
    }
    results = []
    for n in (n for n in (8192, 2**17, 2**20, 2**24) if n <= elements):
        x = normal((elements // n, n), sharding)
        error = roundings(strategies["axis_name"], x)
        assert error <= 1.5, error
        assert collectives(strategies["axis_name"], x) == ["all-to-all"] * 2
        for name, f in strategies.items():
            results.append(
                {
                    "n": n,
                    "strategy": name,
                    "us": microseconds(f, x),
                    "memory": memory(f, x),
                    "collectives": collectives(f, x),
                    "error_in_roundings": error if name == "axis_name" else roundings(f, x),
                }
            )
    return results


def roundings(f, x) -> float:
    """The rms error of the transform or of its gradient, the larger one, in units of rounding the exact result once.

    Exact is the float32 transform beside the bfloat16 one; the gradient is the transform of the cotangent.
    """
    exact = jax.jit(hadamard)(x.astype(jnp.float32))

    @jax.jit
    def ratio(y):
        # Not a conversion and back, which XLA may leave out.
        rounded = jax.lax.reduce_precision(exact, jnp.finfo(y.dtype).nexp, jnp.finfo(y.dtype).nmant)
        rms = [jnp.sqrt(jnp.mean((z - exact) ** 2)) for z in (y.astype(jnp.float32), rounded)]
        return rms[0] / rms[1]

    _, pull = jax.vjp(f, x)
    return max(float(ratio(y)) for y in (jax.jit(f)(x), jax.jit(pull)(x)[0]))


def environment() -> dict:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    gpu = jax.default_backend() == "gpu"
    return {
        "devices": [device.device_kind for device in jax.devices()[:2]],
        "driver": subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0] if gpu else None,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "jax_hadacore": jax_hadacore.__version__,
        "python": platform.python_version(),
        "command": " ".join(["python", *sys.argv]),
    }


def main() -> None:
    """Prints two tables, and stores them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=2**25, help="of the array, bfloat16; default 2^25")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if len(jax.devices()) < 2:
        parser.error(f"two devices are needed, found {jax.devices()}")
    mesh = Mesh(np.array(jax.devices()[:2]), ("gpu",), axis_types=(AxisType.Auto,))

    rows = batch(mesh, arguments.elements)
    print(f"batch, {arguments.elements} elements on each GPU\n{'n':>9}{'one us':>9}{'two us':>9}{'throughput':>12}")
    for row in rows:
        print(f"{row['n']:9}{row['one_us']:9.1f}{row['two_us']:9.1f}{row['throughput_ratio']:11.3f}x", flush=True)

    split = split_axis(mesh, arguments.elements)
    print(f"split axis, {arguments.elements} elements in all; memory of one transform on each GPU, MiB")
    print(f"{'n':>9} {'':10}{'us':>8}{'total':>8}{'temp':>8}{'roundings':>11}  collectives")
    for row in split:
        total, temp = (row["memory"][kind] / 2**20 for kind in ("total", "temp"))
        names = ", ".join(row["collectives"])
        print(
            f"{row['n']:9} {row['strategy']:10}{row['us']:8.1f}{total:8.1f}{temp:8.1f}{row['error_in_roundings']:11.2f}"
            f"  {names}"
        )
    if arguments.out:
        stored = {"environment": environment(), "elements": arguments.elements, "batch": rows, "split_axis": split}
        arguments.out.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
