"""The benchmark, `jax-hadacore bench`: measures, and writes charts and the README's table from stored results."""

import importlib.util
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Runs `jax-hadacore bench` with the arguments after `bench`; returns its exit status."""
    if not _installed("rich"):
        return 2
    from .command import DRAWING, parse, run  # noqa: PLC0415 - needs rich

    arguments = parse(argv)
    if arguments.command in DRAWING and not _installed("matplotlib"):
        return 2
    return run(arguments)


def _installed(package: str) -> bool:
    """Whether a package of the extra is here; if not, says how it comes."""
    if importlib.util.find_spec(package):
        return True
    print(f"jax-hadacore bench: {package} is not installed; pip install 'jax_hadacore[bench]'", file=sys.stderr)
    return False
