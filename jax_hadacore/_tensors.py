"""Reads the tensors of a .safetensors or .npy file, one at a time."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

# What safetensors calls the dtypes that the library transforms and NumPy names alike.
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


class UnreadableError(Exception):
    """A file that cannot be read; the message is one line and names the file."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file; `load` reads its values."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], np.ndarray]

    @property
    def is_float(self) -> bool:
        """Whether the values are of a real floating-point dtype of 16 bits or more."""
        return self.dtype in _FLOATS.values()


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[list[Tensor]]:
    """The tensors of a file, which stays open meanwhile.

    Raises:
        UnreadableError: there is no such file, or it is not a .safetensors or .npy file.
    """
    opener = {".safetensors": _open_safetensors, ".npy": _open_npy}.get(path.suffix)
    if not path.exists():
        raise UnreadableError(f"{path}: no such file")
    if opener is None or not path.is_file():
        raise UnreadableError(f"{path}: expected a .safetensors or .npy file")
    with contextlib.ExitStack() as stack:
        try:
            tensors = opener(path, stack)
        except (OSError, EOFError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise UnreadableError(f"{path}: not a readable {path.suffix} file: {reason}") from error
        yield tensors


def _open_safetensors(path: Path, stack: contextlib.ExitStack) -> list[Tensor]:
    # The NumPy framework knows bfloat16 because JAX has registered it with NumPy.
    file = stack.enter_context(safe_open(path, framework="numpy"))
    tensors = []
    for name in file.keys():  # noqa: SIM118 - the file is no mapping
        header = file.get_slice(name)
        dtype = str(header.get_dtype())
        tensors.append(
            Tensor(
                name,
                tuple(header.get_shape()),
                _FLOATS.get(dtype, dtype),
                lambda name=name: file.get_tensor(name),
            )
        )
    return tensors


def _open_npy(path: Path, _: contextlib.ExitStack) -> list[Tensor]:
    array = np.lib.format.open_memmap(path, mode="r")
    dtype = array.dtype.name
    if dtype == "void16":
        dtype += " (.npy files do not keep bfloat16: use .safetensors)"
    return [Tensor(path.stem, array.shape, dtype, lambda: array)]
