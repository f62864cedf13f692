"""Rotations folded into the weights of a model: declared by a plan, applied by pure functions on any pytree."""

from typing import TYPE_CHECKING, Any

from . import plans as plans
from ._axis import Axis as Axis
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
    from ._layers import OnlineHadamard as OnlineHadamard
    from ._layers import RotatedLinear as RotatedLinear


def __getattr__(name: str) -> Any:
    """The layers, which alone need flax."""
    if name not in {"OnlineHadamard", "RotatedLinear"}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import _layers  # noqa: PLC0415 - not before it is needed
    except ModuleNotFoundError as error:
        if error.name != "flax":
            raise
        raise ModuleNotFoundError(f"{name} needs flax: pip install 'jax_hadacore[flax]'", name="flax") from error
    return getattr(_layers, name)
