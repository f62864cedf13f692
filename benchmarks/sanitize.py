"""Runs every kernel on small data, for the memory and race checkers.

compute-sanitizer --tool memcheck python benchmarks/sanitize.py
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_hadacore import _cuda

BUFFER = 3 << 16  # elements


def main() -> None:
    """Transforms aligned and unaligned rows of every type and length, tails included."""
    jax.config.update("jax_enable_x64", True)
    workspace = jnp.zeros(BUFFER, jnp.float32)
    for dtype in map(jnp.dtype, (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)):
        x = jnp.asarray(np.random.default_rng(0).standard_normal(BUFFER).astype(dtype))
        y = jnp.zeros_like(x)
        jax.block_until_ready((x, y, workspace))
        for n in (1 << bits for bits in range(17)):
            for rows in sorted({1, 3, max(1, 5000 // n)}):
                problem = _cuda.Problem(getattr(_cuda.Dtype, dtype.name), n, rows)
                for offset in (0, dtype.itemsize) if rows * n < BUFFER else (0,):
                    _cuda.transform(
                        problem,
                        x.unsafe_buffer_pointer() + offset,
                        y.unsafe_buffer_pointer() + offset,
                        workspace.unsafe_buffer_pointer(),
                    )
    print("done")


if __name__ == "__main__":
    main()
