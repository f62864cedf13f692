"""Rotations folded into the weights of a model: declared by a plan, applied by pure functions on any pytree."""

import importlib
from typing import TYPE_CHECKING, Any

from . import plans as plans
from ._axis import Axis as Axis
from ._fake_quant import fake_quant as fake_quant
from ._fold import Fold as Fold
from ._plan import Axes as Axes
from ._plan import Fuse as Fuse
from ._plan import Plan as Plan
from ._plan import Untie as Untie
from ._record import load_rotations as load_rotations
from ._rotate import check_invariance as check_invariance
from ._rotate import fuse_norms as fuse_norms
from ._rotate import rotate as rotate
from ._rotation import Rotation as Rotation

if TYPE_CHECKING:
    from ._cayley import cayley_sgd as cayley_sgd
    from ._layers import OnlineHadamard as OnlineHadamard
    from ._layers import RotatedLinear as RotatedLinear
    from ._learn import LearningState as LearningState
    from ._learn import learn_rotations as learn_rotations

# What needs an optional package, by its module, and the extra that brings it.
_OPTIONAL = {
    "OnlineHadamard": ("_layers", "flax"),
    "RotatedLinear": ("_layers", "flax"),
    "LearningState": ("_learn", "optax"),
    "cayley_sgd": ("_cayley", "optax"),
    "learn_rotations": ("_learn", "optax"),
}


def __getattr__(name: str) -> Any:
    """The layers, which need flax, and learning, which needs optax."""
    if name not in _OPTIONAL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, needed = _OPTIONAL[name]
    try:
        return getattr(importlib.import_module(f".{module}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name != needed:
            raise
        raise ModuleNotFoundError(
            f"{name} needs {needed}: pip install 'jax_hadacore[{needed}]'", name=needed
        ) from error
