"""The .safetensors format: headers that are checked before anything is read, and one tensor at a time.

A file is the length of its header (8 bytes, little-endian), the header (JSON: of each tensor the dtype, the shape and
where it lies in the data) and the data. https://github.com/huggingface/safetensors
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import jax.numpy as jnp
import numpy as np

_DTYPES = {
    "F64": jnp.float64,
    "F32": jnp.float32,
    "F16": jnp.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "I64": jnp.int64,
    "I32": jnp.int32,
    "I16": jnp.int16,
    "I8": jnp.int8,
    "U64": jnp.uint64,
    "U32": jnp.uint32,
    "U16": jnp.uint16,
    "U8": jnp.uint8,
    "BOOL": jnp.bool_,
}
_LARGEST_HEADER = 100_000_000  # bytes, as in the reference implementation
_METADATA = "__metadata__"
_CHUNK = 1 << 24  # bytes that are copied at a time


class CheckpointError(Exception):
    """A checkpoint that cannot be read or written; the message is one line and names the file."""


@dataclass(frozen=True)
class Entry:
    """What the header says about a tensor: its dtype in the format's own words, its shape, its place in the data."""

    code: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def dtype(self) -> np.dtype:
        """NumPy's dtype."""
        return np.dtype(_DTYPES[self.code])

    @property
    def nbytes(self) -> int:
        """The number of bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class File:
    """A .safetensors file, of which only the header is in memory.

    Attributes:
        path: where it is.
        entries: of each tensor, in the order of the data.
        metadata: strings by their names; None where the header has none.
        data: where the data begin.
        size: of the whole file, in bytes.
    """

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str] | None
    data: int
    size: int

    def read(self, name: str) -> np.ndarray:
        """The values of a tensor, in memory of their own."""
        entry = self.entries[name]
        values = np.empty(entry.nbytes, np.uint8)
        with self.path.open("rb") as file:
            file.seek(self.data + entry.start)
            if file.readinto(values.data) != entry.nbytes:
                raise self._changed()
        return values.view(entry.dtype).reshape(entry.shape)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor, some at a time."""
        left = self.entries[name].nbytes
        with self.path.open("rb") as file:
            file.seek(self.data + self.entries[name].start)
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise self._changed()
                left -= len(chunk)
                yield chunk

    def _changed(self) -> CheckpointError:
        return CheckpointError(f"{self.path}: ended early; it must not change while it is read")


def open_file(path: Path) -> File:
    """Reads and checks the header of a file.

    Raises:
        CheckpointError: there is no such file, or its header is not that of a whole .safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise ValueError(f"a header of {length} bytes, in a file of {size}")
            header = json.loads(file.read(length))
        entries, metadata = _parse(header, size - 8 - length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: not a whole .safetensors file: {reason}") from error
    return File(path, entries, metadata, 8 + length, size)


def header(entries: Mapping[str, Entry], metadata: Mapping[str, str] | None) -> bytes:
    """The first bytes of a file with these tensors, whose data follow in this order."""
    found: dict[str, Any] = {} if metadata is None else {_METADATA: metadata}
    end = 0
    for name, entry in entries.items():
        start, end = end, end + entry.nbytes
        found[name] = {"dtype": entry.code, "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(found, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data are aligned
    return len(text).to_bytes(8, "little") + text


def as_bytes(array: np.ndarray) -> memoryview:
    """The values of a tensor as a file has them."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def is_strings(value: Any) -> TypeGuard[dict[str, str]]:
    """Whether a value of a JSON file is an object of strings."""
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _parse(header: Any, available: int) -> tuple[dict[str, Entry], dict[str, str] | None]:
    if not isinstance(header, dict):
        raise ValueError(f"the header must be an object, got {type(header).__name__}")
    metadata = header.pop(_METADATA, None)
    if metadata is not None and not is_strings(metadata):
        raise ValueError(f"{_METADATA} must be strings by their names")
    found = {name: _entry(name, described) for name, described in header.items()}
    end = 0
    entries = {}
    for name, (entry, stop) in sorted(found.items(), key=lambda item: (item[1][0].start, item[1][1])):
        if (entry.start, stop) != (end, end + entry.nbytes):
            raise ValueError(
                f"{name!r}, {entry.code} of shape {list(entry.shape)}, must lie at bytes {end} to "
                f"{end + entry.nbytes} of the data, got {entry.start} to {stop}"
            )
        entries[name], end = entry, stop
    if end != available:
        raise ValueError(f"the tensors have {end} bytes, and the file has {available} for them")
    return entries, metadata


def _entry(name: str, described: Any) -> tuple[Entry, int]:
    """An entry, and where its data end."""
    try:
        code, shape, (start, stop) = described["dtype"], tuple(described["shape"]), described["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{name!r} must have dtype, shape and data_offsets, got {described!r:.80}") from None
    if not isinstance(code, str) or code not in _DTYPES:
        raise ValueError(f"{name!r} must have one of the dtypes {', '.join(_DTYPES)}, got {code!r:.80}")
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"{name!r} must have a shape and offsets of whole numbers, got {described!r:.80}")
    return Entry(code, shape, start), stop
