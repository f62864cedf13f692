"""The command line of the benchmark."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import _ffi
from .._orders import decompose
from . import alternatives, axis, device, dims, errors, fused, peers, program, tables
from .environment import environment
from .grid import DTYPES, Selection
from .store import SWEPT, Results, StoreError, load

_Plain = argparse.RawDescriptionHelpFormatter
DRAWING = ("plot", "report")  # the commands that need matplotlib
_WIDTH = 132  # of tables that no terminal limits
_INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended

_SWEEP = """\
Measures, and prints a table of:
  device        device time of the kernel beside the best copy of the same bytes
  alternatives  time of a call of XLA's alternatives: x @ H, two factors, a butterfly
  program       what a jitted call costs end to end, and the thunks that XLA made of it
  peers         device time of PyTorch's packages, where they are installed
  axis          time of a call on the axis before the last, beside one that transposes; on a GPU device time
  errors        the error in roundings, for every length and dtype

Cold: buffers that together exceed the caches take turns. Warm: the same buffers every time.
"""
_DIMS = """\
Measures the device time of the kernel at the lengths that models have, beside the best copy of
the same bytes, and of a few of them a jitted call beside the dense product x @ H; prints a table.
"""
_FUSED = """\
Measures, and prints a table of:
  fused      device time of the transform to codes of 8 or 4 bits beside kernels that move the same bytes; on a GPU
  two steps  time of a call of hadamard_quantize, and of hadamard with XLA's quantiser behind it
  layers     time of x @ w, and of rotated_dot_general with codes of w, which rotates and quantises x
"""
_EPILOG = """\
exit status:
  0    done
  1    an error is larger than docs/numerics.md promises, or a table stopped early
  2    the arguments are wrong, a file cannot be used, or a table cannot be measured here
  130  interrupted; the file has what was measured until then
"""


class UnmeasurableError(Exception):
    """Why a table cannot be measured on this machine."""


@dataclass(frozen=True)
class _Work:
    """A table to measure: the number of its rows, and their measurement."""

    name: str
    count: int
    rows: Generator[dict]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the arguments; without a command they are those of `sweep`."""
    named = argv and (not argv[0].startswith("-") or argv[0] in {"-h", "--help"})
    arguments = _parser().parse_args(argv if named else ["sweep", *argv])
    arguments.given = argv
    return arguments


def run(arguments: argparse.Namespace) -> int:
    """Runs a command and returns its exit status."""
    try:
        return arguments.run(arguments)
    except (StoreError, UnmeasurableError, OSError) as error:
        print(f"jax-hadacore bench: {error}", file=sys.stderr)
        return 2


def _sweep(arguments: argparse.Namespace) -> int:
    return _run(arguments, _work)


def _dims(arguments: argparse.Namespace) -> int:
    return _run(arguments, _dims_work)


def _fused(arguments: argparse.Namespace) -> int:
    return _run(arguments, _fused_work)


def _run(arguments: argparse.Namespace, plan: Callable[[argparse.Namespace], list[_Work]]) -> int:
    """Measures, stores and prints what is planned."""
    results = Results(arguments.json, environment(_command(arguments)))
    work = plan(arguments)
    status = 0
    try:
        with _progress() as progress:
            for table in work:
                try:
                    _measure(table, results, progress)
                except (RuntimeError, ImportError) as error:  # the device's memory, or a broken package of a peer
                    status = 1
                    print(f"jax-hadacore bench: {table.name} stopped: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        status = _INTERRUPTED
        print("jax-hadacore bench: interrupted; what was measured until then follows", file=sys.stderr)
    tables.show(_console(), results.data)
    inexact = any(row["error"] > row["bound"] for name in ("errors", "dims") for row in results.data.get(name, []))
    return status or int(inexact)


def _measure(table: _Work, results: Results, progress: Progress) -> None:
    task = progress.add_task(table.name, total=table.count)
    with contextlib.closing(table.rows) as rows:
        for row in rows:
            results.add(table.name, row)
            progress.advance(task)
    if table.name == "program":
        results.note("copies", program.loop_copies())
        results.note("thunks", program.thunks() if jax.default_backend() == "gpu" else [])


def _plot(arguments: argparse.Namespace) -> int:
    from . import plot  # noqa: PLC0415 - needs matplotlib

    for path in plot.write(load(arguments.files), arguments.out):
        print(path)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from . import report  # noqa: PLC0415 - needs matplotlib

    for path in report.write(arguments.files, arguments.readme):
        print(path)
    return 0


def _work(arguments: argparse.Namespace) -> list[_Work]:
    """What a sweep is to measure, in the order of SWEPT."""
    platform = _platform()
    names = arguments.tables or ["device", "alternatives", "program", *(["peers"] if _peers_run(platform) else [])]
    selection = Selection(platform, arguments.full, arguments.dtype, arguments.n, arguments.elements)
    work = [_table(name, selection, inplace=arguments.inplace) for name in SWEPT if name in names]
    if not any(table.count for table in work):
        raise UnmeasurableError("nothing to measure: expected --n of at most --elements in one case or more")
    return work


def _dims_work(arguments: argparse.Namespace) -> list[_Work]:
    platform = _platform()
    _require_kernel("dims", platform)
    cases = dims.cases(platform, arguments.lengths)
    return [_Work("dims", len(cases), dims.rows(platform, cases, arguments.lengths))]


def _fused_work(arguments: argparse.Namespace) -> list[_Work]:
    platform = _platform()
    _require_kernel("fused", platform)
    chosen = arguments.n, arguments.elements
    cases = fused.cases(*chosen) if platform == "gpu" else []
    pairs = fused.two_steps_cases(platform, *chosen)
    layers = fused.LAYERS[platform]
    return [
        *([_Work("fused", len(cases), fused.rows(cases))] if cases else []),
        _Work("two steps", len(pairs), fused.two_steps_rows(pairs)),
        _Work("layers", len(layers), fused.layer_rows(platform, layers)),
    ]


def _platform() -> str:
    platform = jax.default_backend()
    if platform not in {"gpu", "cpu"}:
        raise UnmeasurableError(f"measures on an NVIDIA GPU or the CPU; JAX's default backend is {platform}")
    return platform


def _require_kernel(table: str, platform: str, advice: str = "") -> None:
    if problem := _ffi.problem("cuda" if platform == "gpu" else "cpu"):
        raise UnmeasurableError(f"the {table} table needs the native kernel: {problem}{advice}")


def _table(name: str, selection: Selection, *, inplace: bool) -> _Work:
    platform = selection.platform
    if name == "device":
        _require_kernel("device", platform, "; --tables names others")
        cases = selection.device()
        return _Work(name, len(cases), device.rows(platform, cases, inplace=inplace))
    if name == "peers":
        if not _peers_run(platform):
            raise UnmeasurableError("the peers table needs a GPU, PyTorch, and fast_hadamard_transform or HadaCore")
        cases = peers.cases(selection.device())
        return _Work(name, len(cases), peers.rows(cases))
    if name == "alternatives":
        cases = selection.alternatives()
        return _Work(name, len(cases), alternatives.rows(platform, cases))
    if name == "axis":
        cases = selection.axis()
        return _Work(name, len(cases), axis.rows(platform, cases))
    if name == "program":
        cases = selection.program()
        return _Work(name, len(cases), program.rows(platform, cases))
    cases = errors.cases(selection.dtypes, selection.lengths)
    return _Work(name, len(cases), errors.rows(cases))


def _peers_run(platform: str) -> bool:
    return platform == "gpu" and peers.installed()


def _command(arguments: argparse.Namespace) -> str:
    """The command as it was given, but for the folder of the file, which concerns nobody else."""
    file = arguments.json and (str(arguments.json), arguments.json.name)
    given = [part.replace(*file) if file else part for part in arguments.given]
    return " ".join(["jax-hadacore", "bench", *given])


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-hadacore bench",
        description="Measures the transform, and draws what was measured. Without a command: sweep.",
        epilog=_EPILOG,
        formatter_class=_Plain,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sweep = commands.add_parser(
        "sweep",
        help="measure: quickly, or with --full the grid of the HadaCore paper",
        description=_SWEEP,
        epilog=_EPILOG,
        formatter_class=_Plain,
    )
    sweep.add_argument("--full", action="store_true", help="the grid of the HadaCore paper: minutes")
    sweep.add_argument(
        "--tables",
        nargs="+",
        choices=SWEPT,
        metavar="TABLE",
        help="which to measure; default: device, alternatives, program, and peers if they are installed",
    )
    sweep.add_argument("--dtype", nargs="+", choices=DTYPES, metavar="DTYPE", help=", ".join(DTYPES))
    sweep.add_argument("--n", nargs="+", type=_length, metavar="N", help="lengths, such as 4096 or 2^12")
    sweep.add_argument(
        "--elements",
        nargs="+",
        type=_elements,
        metavar="E",
        help="elements of a call, of device, peers, alternatives, axis",
    )
    sweep.add_argument("--inplace", action="store_true", help="device: results replace operands")
    sweep.add_argument("--json", type=Path, metavar="FILE", help="store what is measured, as it comes")
    sweep.set_defaults(run=_sweep)
    models = commands.add_parser(
        "dims", help="measure the dimensions of models", description=_DIMS, epilog=_EPILOG, formatter_class=_Plain
    )
    models.add_argument("--lengths", type=_lengths, metavar="N,N", help="measure these, such as 3072,7168, instead")
    models.add_argument("--json", type=Path, metavar="FILE", help="store what is measured, as it comes")
    models.set_defaults(run=_dims)
    quantised = commands.add_parser(
        "fused", help="measure quantised results", description=_FUSED, epilog=_EPILOG, formatter_class=_Plain
    )
    quantised.add_argument(
        "--n",
        nargs="+",
        type=_supported_length,
        metavar="N",
        help="lengths, of fused and two steps, such as 2^12 or 7168",
    )
    quantised.add_argument(
        "--elements", nargs="+", type=_many_elements, metavar="E", help="elements of a call, of fused and two steps"
    )
    quantised.add_argument("--json", type=Path, metavar="FILE", help="store what is measured, as it comes")
    quantised.set_defaults(run=_fused)
    plot = commands.add_parser("plot", help="draw charts of stored results")
    plot.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    plot.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="for the PNG files; default: here")
    plot.set_defaults(run=_plot)
    report = commands.add_parser("report", help="write the README's tables and chart from stored results")
    report.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    report.add_argument("--readme", type=Path, default=Path("README.md"), metavar="README.md")
    report.set_defaults(run=_report)
    return parser


def _lengths(text: str) -> list[int]:
    return [_supported_length(part) for part in text.split(",")]


def _supported_length(text: str) -> int:
    if "^" in text:
        return _length(text)
    try:
        n = int(text)
        decompose(n)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return n


def _length(text: str) -> int:
    return _power_of_two(text, 1, 1 << 24)


def _elements(text: str) -> int:
    return _power_of_two(text, 8, 1 << 30)


def _many_elements(text: str) -> int:
    return _power_of_two(text, 1 << 13, 1 << 30)  # from what measure_codes takes


def _power_of_two(text: str, least: int, most: int) -> int:
    base, _, exponent = text.partition("^")
    try:
        value = int(base) ** int(exponent or 1) if int(exponent or 1) in range(64) else 0
    except ValueError:
        value = 0
    if not least <= value <= most or value & (value - 1):
        raise argparse.ArgumentTypeError(
            f"expected a power of two from {least} to 2^{most.bit_length() - 1}, got {text!r}"
        )
    return value
