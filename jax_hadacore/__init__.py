"""The Hadamard transform for JAX: on NVIDIA tensor cores and on the CPU, rounded once."""

from importlib.metadata import version as _version

from ._ffi import EXPORT_SAFETY_CHECKS as EXPORT_SAFETY_CHECKS
from ._primitive import hadamard_p as hadamard_p
from ._transform import hadamard as hadamard
from ._transform import hadamard_sharded as hadamard_sharded

__version__ = _version("jax_hadacore")
