"""The Hadamard transform for JAX: on NVIDIA tensor cores and on the CPU, rounded once."""

from importlib.metadata import version as _version

from ._primitive import hadamard_p as hadamard_p
from ._transform import hadamard as hadamard

__version__ = _version("jax_hadacore")
