"""Axis: which axis of which arrays, by a pattern of their paths."""

import dataclasses
import functools
import re

_TOKENS = re.compile(r"(\*\*|\*|[()|])")
_REGEX = {"**": ".*", "*": r"([^/.]+)", "(": "(?:", ")": ")", "|": "|"}


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis of all arrays whose path a pattern matches.

    In the usual case a string does: `"layers/*/attn/(q|k|v)_proj/kernel@0"`, and with a ? at the end for arrays that a
    model need not have.

    Attributes:
        path: the pattern. * is one part of a path between / or ., as the number of a layer; ** is anything; (a|b) is a
            or b; every other character is itself.
        axis: the axis, counted as in NumPy.
        part: rotate only this entry of axis 0, of several kernels that are stacked there.
        split: the axis holds several vectors one after the other, as the merged heads of an attention do, and each is
            rotated by itself.
        layers: the axis that numbers the layers of a scanned model.
        optional: whether the pattern may match nothing.
    """

    path: str
    axis: int
    part: int | None = None
    split: bool = False
    layers: int | None = None
    optional: bool = False

    def captures(self, path: str) -> tuple[str, ...] | None:
        """What each * of the pattern stands for in a path, or None where it does not match."""
        found = _compiled(self.path).fullmatch(path)
        return None if found is None else found.groups()


def parse(axis: str | Axis, default: int | None = None) -> Axis:
    """The axis that 'PATTERN@AXIS' or 'PATTERN@AXIS?' stands for.

    Raises:
        ValueError: the string names no axis, and there is no default.
    """
    if isinstance(axis, Axis):
        return axis
    optional = axis.endswith("?")
    path, at, number = axis.removesuffix("?").rpartition("@")
    if not at and default is not None:
        return Axis(number, default, optional=optional)
    if not (path and re.fullmatch(r"-?\d+", number)):
        raise ValueError(f"Plan: an axis must be written as 'PATH@AXIS', as in 'layers/*/kernel@0', got {axis!r}.")
    return Axis(path, int(number), optional=optional)


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile("".join(_REGEX.get(token) or re.escape(token) for token in _TOKENS.split(pattern)))
