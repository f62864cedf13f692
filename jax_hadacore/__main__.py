"""Runs the command line as `python -m jax_hadacore`."""

import sys

from ._cli import main

sys.exit(main())
