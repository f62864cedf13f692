"""The rotations of a checkpoint, as its config.json keeps them for what is done online."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import CONVENTION
from ._rotation import Rotation

KEY = "jax_hadacore"


def record(rotations: Mapping[str, Rotation], *, seed: int, online: list[str]) -> dict[str, Any]:
    """What config.json says about rotations without a q: their sizes, and their signs as hexadecimal digits.

    A bit is 1 for a minus, the first sign the highest bit of the first digit; of a batch there is a list.
    """
    return {
        "version": version("jax_hadacore"),
        "convention": CONVENTION,
        "seed": seed,
        "rotations": {name: {"size": one.size, "signs": _digits(one.signs)} for name, one in rotations.items()},
        "online": online,
    }


def load_rotations(folder: str | Path) -> dict[str, Rotation]:
    """The rotations that `jax-hadacore rotate` folded into a checkpoint.

    R1 and R2 need nothing in the model. For R4 it applies `load_rotations(folder)["R4"]`, or `hadamard`, to what
    down_proj reads.

    Args:
        folder: the rotated checkpoint.

    Returns:
        The rotations by their names; those that have one a layer as a batch.

    Raises:
        ValueError: config.json has no rotations, or those of another `CONVENTION`.
        OSError: there is no config.json.

    Example:
        >>> from jax_hadacore.rotations import load_rotations
        >>> load_rotations("Llama-3.1-8B-rotated")["R4"].size  # doctest: +SKIP
        14336
    """
    path = Path(folder) / "config.json"
    recorded = json.loads(path.read_bytes()).get(KEY)
    if recorded is None:
        raise ValueError(f"load_rotations: {path} must have the key {KEY!r}, which jax-hadacore rotate writes.")
    if recorded["convention"] != CONVENTION:
        raise ValueError(f"load_rotations: {path} must have the convention {CONVENTION}, got {recorded['convention']}.")
    return {name: _rotation(**described) for name, described in recorded["rotations"].items()}


def _rotation(size: int, signs: str | list[str] | None) -> Rotation:
    if signs is None:
        return Rotation(size)
    values = [_signs(digits, size) for digits in ([signs] if isinstance(signs, str) else signs)]
    return Rotation(size, jnp.asarray(values[0] if isinstance(signs, str) else np.stack(values)))


def _digits(signs: jax.Array | None) -> str | list[str] | None:
    if signs is None:
        return None
    rows = [np.packbits(row < 0).tobytes().hex() for row in np.atleast_2d(np.asarray(signs))]
    return rows[0] if signs.ndim == 1 else rows


def _signs(digits: str, size: int) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), count=size)
    return np.where(bits, np.float32(-1), np.float32(1))
