"""The table of docs/scaling.md: python tests/scaling.py [DEVICES...] compiles each strategy and counts bytes.

Nothing is run, so any number of devices will do; the two exchanges for 1024 take XLA two minutes.
"""

import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
from hlo import hlo, received_bytes
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_hadacore import hadamard, hadamard_sharded

COUNTS = tuple(2**e for e in range(1, 11))
SHAPE = (1024, 2**20)
HEADER = (
    "| devices P | block on each | batch split | axis split: gathered | rows moved | `axis_name` | of the gather |",
    "|---|---|---|---|---|---|---|",
)


def row(devices):
    """What each device receives with each strategy, as a row of the table."""
    mesh = Mesh(np.array(devices), ("tp",), axis_types=(AxisType.Auto,))
    split, rows = NamedSharding(mesh, P(None, "tp")), NamedSharding(mesh, P("tp"))
    constrain = jax.lax.with_sharding_constraint

    def received(f, sharding):
        x = jax.ShapeDtypeStruct(SHAPE, jnp.float16, sharding=sharding)
        return sum(received_bytes(hlo(f, x)).values())

    size = 2 * SHAPE[0] * SHAPE[1]
    batch = received(hadamard, rows)
    gathered = received(lambda x: constrain(hadamard(x), split), split)
    moved = received(lambda x: constrain(hadamard(constrain(x, rows)), split), split)
    across = received(functools.partial(hadamard_sharded, sharding=split), split)
    cells = [len(devices), *map(mebibytes, (size / len(devices), batch, gathered, moved, across))]
    return f"| {' | '.join(map(str, cells))} | 2 / {2 * gathered / across:.0f} |"


def mebibytes(size):
    return f"{size / 2**20:.4g} MiB" if size else "0"


def main():
    counts = tuple(map(int, sys.argv[1:])) or COUNTS
    jax.config.update("jax_platforms", "cpu")
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={max(counts)}"
    print(*HEADER, sep="\n")
    for count in counts:
        print(row(jax.devices()[:count]), flush=True)


if __name__ == "__main__":
    main()
