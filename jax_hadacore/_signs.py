"""Signs as the kernels read them: packed in words of 32, as ffi/problem.h describes."""

import jax
import jax.numpy as jnp
import numpy as np

# The bit of each of 32 elements: those of a pair are 16 bits apart.
_BIT = np.arange(32, dtype=np.uint32).reshape(2, 16).T.reshape(32)


def pack(negative: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Packs booleans (..., n), true for minus, into uint32 words (..., ceil(n / 32)).

    The result is a NumPy array exactly where the operand is one.
    """
    xp = jnp if isinstance(negative, jax.Array) else np
    *batch, n = negative.shape
    count = -(-n // 32)
    whole = xp.pad(negative, [(0, 0)] * len(batch) + [(0, 32 * count - n)]).reshape(*batch, count, 32)
    return (whole.astype(np.uint32) << _along_last(_BIT, whole.ndim)).sum(axis=-1, dtype=np.uint32)


def unpack(words: np.ndarray | jax.Array, n: int) -> np.ndarray | jax.Array:
    """The booleans (..., n) that `pack` made words (..., ceil(n / 32)) of."""
    *batch, count = words.shape
    bits = words[..., None] >> _along_last(_BIT, len(batch) + 2) & np.uint32(1)
    return (bits != 0).reshape(*batch, 32 * count)[..., :n]


def _along_last(values: np.ndarray, ndim: int) -> np.ndarray:
    return values.reshape((1,) * (ndim - 1) + values.shape)
