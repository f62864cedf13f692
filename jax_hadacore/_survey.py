"""The command line's report on a file: every tensor before and after the transform of each of its axes."""

import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ._measure import Rotation, UnmeasurableError, rotate
from ._orders import decompose, factorisation
from ._table import plural, table
from ._tensors import Tensor, open_tensors

PRINTED_ROWS = 40
_PRINTED_LENGTHS = 20
_NAME_WIDTH = 40  # keeps a line within 100 columns
_SHORT_DTYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}


@dataclass(frozen=True)
class _Row:
    tensor: Tensor
    axis: int
    rotation: Rotation


class _Survey:
    """The rows of the table, and what is left out of it."""

    def __init__(self) -> None:
        self.rows: list[_Row] = []
        self.unsupported: Counter[int] = Counter()  # length -> axes
        self.skipped: defaultdict[str, list[str]] = defaultdict(list)  # reason -> names

    def add(self, tensor: Tensor) -> None:
        """Measures a tensor along each axis of a supported length."""
        if not tensor.is_float:
            self.skipped[f"dtype {tensor.dtype}"].append(tensor.name)
        elif 0 in tensor.shape:
            self.skipped["empty"].append(tensor.name)
        elif max(tensor.shape, default=1) == 1:
            self.skipped["a single value"].append(tensor.name)
        elif axes := [axis for axis, n in enumerate(tensor.shape) if n > 1 and self._is_supported(n)]:
            values = tensor.load()
            for axis in axes:
                self._measure(tensor, axis, values)

    def _is_supported(self, n: int) -> bool:
        try:
            decompose(n)
        except ValueError:
            self.unsupported[n] += 1
            return False
        return True

    def _measure(self, tensor: Tensor, axis: int, values: np.ndarray) -> None:
        rows = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
        try:
            self.rows.append(_Row(tensor, axis, rotate(rows)))
        except UnmeasurableError as error:
            names = self.skipped[str(error)]
            if tensor.name not in names[-1:]:  # once, however many axes
                names.append(tensor.name)


def run(path: Path, *, print_all: bool) -> int:
    """Prints the report on a file; returns the exit status, 0 if every transform agrees with its definition."""
    survey = _Survey()
    with open_tensors(path) as tensors:
        print(f"{path.name}: {plural(len(tensors), 'tensor')}, {path.stat().st_size / 1e6:,.1f} MB")
        for position, tensor in enumerate(tensors, start=1):
            _show_progress(f"{position}/{len(tensors)} {tensor.name}")
            survey.add(tensor)
        _show_progress("")
    _print_rows(survey, print_all=print_all)
    _print_left_out(survey)
    return _print_verdict(survey)


def _show_progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text[:79]:79}\r", end="", file=sys.stderr, flush=True)


def _print_rows(survey: _Survey, *, print_all: bool) -> None:
    if not survey.rows:
        print("\nNothing to rotate: no measurable tensor has an axis of a supported length.")
        return
    rows = sorted(survey.rows, key=lambda row: row.rotation.before.peak, reverse=True)
    printed = rows if print_all else rows[:PRINTED_ROWS]
    header = ("tensor", "shape", "dtype", "axis", f"{'peak/rms':13}", f"{'int4 error':14}")
    print(
        "\nEach line: a tensor rotated along one axis, before -> after.\n"
        "  peak/rms: max|x| / rms(x) along that axis, mean over the rest of the tensor; largest first.\n"
        "  int4 error: relative rms error of rounding to int4, one scale max|x| / 7 along that axis.\n\n"
        + table([header, *(_cells(row) for row in printed)], align="<<<>>>")
    )
    if len(printed) < len(rows):
        print(f"  ... and {plural(len(rows) - len(printed), 'line')} with smaller peaks; --all prints them.")


def _cells(row: _Row) -> tuple[str, ...]:
    before, after = row.rotation.before, row.rotation.after
    return (
        _shortened(row.tensor.name),
        "x".join(map(str, row.tensor.shape)),
        _SHORT_DTYPES[row.tensor.dtype],
        str(row.axis),
        f"{before.peak:.1f} -> {after.peak:4.1f}",
        f"{before.int4:.1%} -> {after.int4:5.1%}",
    )


def _shortened(name: str) -> str:
    """The name within _NAME_WIDTH; both ends matter, since layers differ at one and kinds at the other."""
    if len(name) <= _NAME_WIDTH:
        return name
    half = _NAME_WIDTH // 2
    return f"{name[: half - 2]}...{name[1 - half :]}"


def _print_left_out(survey: _Survey) -> None:
    if survey.unsupported:
        counts = survey.unsupported.most_common()
        lengths = [(f"{n} = {factorisation(n)}", plural(axes, "axis", "axes")) for n, axes in counts]
        print("\nAxes left out, their length is not supported\n" + table(lengths[:_PRINTED_LENGTHS], align="<>"))
        if len(lengths) > _PRINTED_LENGTHS:
            print(f"  ... and {plural(len(lengths) - _PRINTED_LENGTHS, 'other length')}.")
    if survey.skipped:
        reasons = [(reason, plural(len(names), "tensor"), _examples(names)) for reason, names in survey.skipped.items()]
        print("\nTensors left out\n" + table(reasons, align="<><"))


def _examples(names: list[str]) -> str:
    return _shortened(names[0]) + (", ..." if len(names) > 1 else "")


def _print_verdict(survey: _Survey) -> int:
    if not survey.rows:
        return 0
    failed = [row for row in survey.rows if not row.rotation.verified]
    for row in failed:
        print(f"\nFAILED: {row.tensor.name}, axis {row.axis}: the transform is not as exact as it should be.")
    if failed:
        return 1
    smaller = sum(row.rotation.after.int4 < row.rotation.before.int4 for row in survey.rows)
    print(
        f"\nThe int4 error is smaller after the transform on {smaller} of {plural(len(survey.rows), 'line')}.\n"
        "All transforms agree with the definition, computed in float64 on a sample of their rows."
    )
    return 0
