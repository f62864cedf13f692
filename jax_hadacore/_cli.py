"""The command line: `jax-hadacore` checks this installation, `jax-hadacore FILE` rotates the tensors of a file.

`jax-hadacore bench` and `jax-hadacore rotate` are command lines of their own.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from . import __version__, _selfcheck, _survey, bench
from ._tensors import UnreadableError
from .rotations import _command

_DESCRIPTION = """\
Without FILE: checks the Hadamard transform on this machine. Says which implementation serves,
compares it with the definition, times it, and shows what it does to outliers.

With FILE: rotates each floating-point tensor of the file along each axis of a supported length
and shows its peaks and its int4 rounding error before and after. The file is not changed.

With bench instead of FILE: measures the transform; see jax-hadacore bench --help. With rotate:
rotates the weights of a language model; see jax-hadacore rotate --help. Files of these names are
./bench and ./rotate.
"""

_EPILOG = """\
exit status:
  0  all checks passed (also when no axis of FILE has a supported length)
  1  a check failed
  2  FILE cannot be read, or the arguments are wrong
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:
        return bench.main(argv[1:])
    if argv[:1] == ["rotate"]:
        return _command.main(argv[1:])
    arguments = _parser().parse_args(argv)
    with warnings.catch_warnings():
        # The check reports which implementation serves, and why, in its own words.
        warnings.filterwarnings("ignore", "jax_hadacore: the .* kernel is not available", RuntimeWarning)
        if arguments.file is None:
            return _selfcheck.run()
        try:
            return _survey.run(arguments.file, print_all=arguments.all)
        except UnreadableError as error:
            print(f"jax-hadacore: {error}", file=sys.stderr)
            return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-hadacore",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file",
        nargs="?",
        type=Path,
        metavar="FILE",
        help="weights or activations, .safetensors or .npy; float64 is measured in float32",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help=f"with FILE: print every row, not only the {_survey.PRINTED_ROWS} with the largest peaks",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser
