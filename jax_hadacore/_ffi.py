"""Loads the native modules, registers their handlers with XLA, and keeps the reason where one cannot serve."""

import functools
import importlib
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import jax
import jax.export
import jax.ffi

# Exported programs carry this name and the attributes bound to it: a change of their meaning is a new version.
HADAMARD_TARGET = "jax_hadacore_hadamard_v1"
QUANTIZE_TARGET = "jax_hadacore_quantize_v1"
# The function of a native module that returns the handler of each target.
_HANDLERS = {HADAMARD_TARGET: "hadamard_handler", QUANTIZE_TARGET: "quantize_handler"}
# What jax.export must be told (disabled_checks=EXPORT_SAFETY_CHECKS) before it saves a program that calls the kernels.
EXPORT_SAFETY_CHECKS = tuple(jax.export.DisabledSafetyCheck.custom_call(target) for target in _HANDLERS)


@dataclass(frozen=True)
class NativeModule:
    """A native module that serves a platform, or why it does not."""

    module: ModuleType | None
    problem: str = ""


def _load(name: str) -> NativeModule:
    try:
        module = importlib.import_module(f"{__package__}.{name}")
    except ModuleNotFoundError:
        return NativeModule(None, f"this installation was built without jax_hadacore.{name}")
    except ImportError as error:
        return NativeModule(None, f"jax_hadacore.{name} failed to load: {error}")
    if problem := _version_problem(module.ffi_api_version):
        return NativeModule(None, problem)
    return NativeModule(module)


def _version_problem(built: tuple[int, int]) -> str:
    """Why this jaxlib refuses a handler built with FFI version `built`, or ''.

    jaxlib accepts handlers of its own version and older. Registering a newer one would break all of JAX in the process.
    """
    if built <= (0, 1):  # what the oldest supported jaxlib has
        return ""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    found = re.findall(r"#define XLA_FFI_API_M(?:AJOR|INOR) (\d+)", header)
    runtime = (int(found[0]), int(found[1]))
    if built <= runtime:
        return ""
    return (
        f"it was built with XLA FFI {built[0]}.{built[1]}, newer than this jaxlib's {runtime[0]}.{runtime[1]}: "
        "reinstall jax_hadacore without --no-build-isolation, or update jax"
    )


def _register(name: str, platform: str) -> NativeModule:
    native = _load(name)
    if native.module is not None:
        for target, handler in _HANDLERS.items():
            jax.ffi.register_ffi_target(target, getattr(native.module, handler)(), platform=platform)
    return native


CPU = _register("_cpu", "cpu")
CUDA = _register("_cuda", "CUDA")
for _target in _HANDLERS:
    # Lets XLA's partitioner split the call over the leading dimensions that the lowering names.
    jax.ffi.register_ffi_target_as_batch_partitionable(_target)


def has_nvidia_gpu() -> bool:
    """Whether this process computes on an NVIDIA GPU."""
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


@functools.cache
def problem(platform: str) -> str:
    """Why the kernel of 'cpu' or 'cuda' cannot run in this process, or '' where it can."""
    if platform == "cpu":
        return CPU.problem
    if not has_nvidia_gpu():
        return "no NVIDIA GPU in this process"
    if CUDA.module is None:
        return CUDA.problem
    return CUDA.module.driver_problem() or CUDA.module.device_problem()


def serves(platform: str, *, exporting: bool) -> bool:
    """Whether a program lowered for 'cpu' or 'cuda' is to call the kernel; if not, warns once, with the reason.

    A program that is exported, or lowered for a GPU that this process does not have, runs elsewhere: it always calls
    the kernel. With JAX_HADACORE_REQUIRE_KERNEL=1 the warning is an error.
    """
    if exporting or (platform == "cuda" and not has_nvidia_gpu()):
        return True
    reason = problem(platform)
    if not reason:
        return True
    message = f"jax_hadacore: the {platform} kernel is not available, a slower plain-JAX transform serves: {reason}"
    if os.environ.get("JAX_HADACORE_REQUIRE_KERNEL") == "1":
        raise RuntimeError(message)
    _warn_once(message)
    return False


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
