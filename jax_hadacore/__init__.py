"""The Hadamard transform for JAX: on NVIDIA tensor cores and on the CPU, rounded once."""

from importlib.metadata import version as _version

from ._ffi import EXPORT_SAFETY_CHECKS as EXPORT_SAFETY_CHECKS
from ._orders import CONVENTION as CONVENTION
from ._orders import decompose as decompose
from ._orders import hadamard_matrix as hadamard_matrix
from ._orders import is_supported as is_supported
from ._primitive import hadamard_p as hadamard_p
from ._quantized_array import QuantizedArray as QuantizedArray
from ._rotated_dot import rotated_dot_general as rotated_dot_general
from ._transform import hadamard as hadamard
from ._transform import hadamard_sharded as hadamard_sharded
from ._transform import random_signs as random_signs
from .quantize import hadamard_fake_quantize as hadamard_fake_quantize
from .quantize import hadamard_quantize as hadamard_quantize
from .quantize import nvfp4_tensor_scale as nvfp4_tensor_scale

__version__ = _version("jax_hadacore")
