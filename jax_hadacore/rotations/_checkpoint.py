"""Checkpoints of Hugging Face, a folder of .safetensors files: read and rotated one tensor at a time, and resumed."""

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from ._fold import Fold
from ._rotation import Rotation
from ._safetensors import CheckpointError, Entry, File, as_bytes, header, is_strings, open_file

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
_STATE = "jax_hadacore.unfinished"  # in an unfinished folder: the request that it belongs to
_PICKLED = {".bin", ".pt", ".pth", ".ckpt"}
_WEIGHTS = {*_PICKLED, ".safetensors", ".h5", ".msgpack", ".gguf", ".onnx"}
_PIECE = 1 << 20  # elements that are folded at a time


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, of which only the headers are in memory.

    Attributes:
        folder: where it is.
        config: its config.json.
        index: its model.safetensors.index.json; None where there is one file.
        shards: the files with weights, by their names.
    """

    folder: Path
    config: dict[str, Any]
    index: dict[str, Any] | None
    shards: dict[str, File]

    @functools.cached_property
    def places(self) -> dict[str, str]:
        """The shard of each tensor."""
        return {name: shard for shard, file in self.shards.items() for name in file.entries}

    @property
    def size(self) -> int:
        """Of all shards, in bytes."""
        return sum(file.size for file in self.shards.values())

    @property
    def others(self) -> list[Path]:
        """The files beside config.json and the weights, as those of the tokenizer."""
        found = [path for path in self.folder.iterdir() if path.is_file() and not path.name.startswith(".")]
        weights = {path for path in found if path.suffix in _WEIGHTS or path.name.endswith(".index.json")}
        return sorted(path for path in found if path.name != _CONFIG and path not in weights)

    @property
    def left_out(self) -> list[Path]:
        """What is not carried over: weights of other formats, folders, hidden files."""
        carried = {_CONFIG, _INDEX if self.index else _CONFIG, *self.shards, *(path.name for path in self.others)}
        return sorted(path for path in self.folder.iterdir() if path.name not in carried)

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The tensors by their names, without values."""
        return {
            name: jax.ShapeDtypeStruct(entry.shape, entry.dtype)
            for file in self.shards.values()
            for name, entry in file.entries.items()
        }

    def read(self, name: str) -> np.ndarray:
        """The values of a tensor."""
        return self.shards[self.places[name]].read(name)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor, some at a time."""
        return self.shards[self.places[name]].chunks(name)


@dataclass(frozen=True)
class Task:
    """A checkpoint to rotate.

    Attributes:
        checkpoint: the given one.
        folds: how the tensors that change are made, by their names.
        rotations: what the folds use.
        config: the new config.json.
    """

    checkpoint: Checkpoint
    folds: Mapping[str, Fold]
    rotations: Mapping[str, Rotation]
    config: Mapping[str, Any]

    @functools.cached_property
    def layout(self) -> dict[str, dict[str, Entry]]:
        """The tensors of each new shard, in the order of their data: a new one follows its source."""
        sources = self.checkpoint.places
        added = {fold.source: name for name, fold in self.folds.items() if name not in sources}
        return {
            shard: {
                name: entry
                for source, entry in file.entries.items()
                for name in (source, added.get(source))
                if name is not None
            }
            for shard, file in self.checkpoint.shards.items()
        }

    @property
    def size(self) -> int:
        """Of the values of all new tensors, in bytes."""
        return sum(entry.nbytes for entries in self.layout.values() for entry in entries.values())

    @property
    def request(self) -> str:
        """A hash of all that the new shards depend on: what was written for another request is none of this one."""
        given = {
            "config": self.config,
            "index": self.checkpoint.index,
            "files": [[name, file.size, file.path.stat().st_mtime_ns] for name, file in self.checkpoint.shards.items()],
        }
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()

    def run(self, out: Path, *, wrote: Callable[[str, int], None]) -> int:
        """Writes the rotated checkpoint, or the rest of it.

        Each file gets its name when it is complete and on the disk; config.json is the last.

        Args:
            out: the folder, which is empty or absent, or which an earlier run left unfinished.
            wrote: called with the name of the shard, and how many more bytes of its values are done.

        Returns:
            How many shards were complete before.

        Raises:
            CheckpointError: the folder has other files, or another request's.
            OSError: a file cannot be written.
        """
        source = self.checkpoint
        heads = {shard: header(entries, source.shards[shard].metadata) for shard, entries in self.layout.items()}
        sizes = {shard: sum(entry.nbytes for entry in entries.values()) for shard, entries in self.layout.items()}
        kept = [shard for shard in sizes if _is_complete(out / shard, heads[shard], sizes[shard])]
        _check_space(out, sum(sizes[shard] for shard in sizes if shard not in kept))
        with _claimed(out, self.request):
            for shard, entries in self.layout.items():
                if shard in kept:
                    wrote(shard, sizes[shard])
                    continue
                with _replacing(out / shard) as file:
                    file.write(heads[shard])
                    for name, entry in entries.items():
                        self._write(file, name)
                        wrote(shard, entry.nbytes)
            for path in source.others:
                with path.open("rb") as old, _replacing(out / path.name) as new:
                    shutil.copyfileobj(old, new)
            if source.index is not None:
                _write_json(out / _INDEX, self._index(source.index))
            _write_json(out / _CONFIG, self.config)
        return len(kept)

    def _write(self, file: BinaryIO, name: str) -> None:
        fold = self.folds.get(name)
        if fold is None:
            file.writelines(self.checkpoint.chunks(name))
        else:
            arrays = {path: self.checkpoint.read(path) for path in fold.reads}
            file.write(as_bytes(_folded(fold, arrays, self.rotations)))

    def _index(self, index: dict[str, Any]) -> dict[str, Any]:
        places = {name: shard for shard, entries in self.layout.items() for name in entries}
        metadata = {**index.get("metadata", {}), "total_size": self.size}
        if isinstance(metadata.get("total_parameters"), int):
            metadata["total_parameters"] += sum(
                math.prod(entry.shape)
                for entries in self.layout.values()
                for name, entry in entries.items()
                if name not in self.checkpoint.places
            )
        return {**index, "metadata": metadata, "weight_map": dict(sorted(places.items()))}


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads the headers of a checkpoint, and checks that it is whole.

    Raises:
        CheckpointError: there is none, or a file is missing or not what it should be.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    config = _read_json(folder / _CONFIG)
    if (folder / _SINGLE).exists():
        return Checkpoint(folder, config, None, {_SINGLE: open_file(folder / _SINGLE)})
    if not (folder / _INDEX).exists():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
        advice = f"; {pickled[0]} may hold code, and is not read: convert it to safetensors" if pickled else ""
        raise CheckpointError(f"{folder}: neither {_SINGLE} nor {_INDEX} is there{advice}")
    index = _read_json(folder / _INDEX)
    mapped = index.get("weight_map")
    if not is_strings(mapped) or not isinstance(index.get("metadata", {}), dict):
        raise CheckpointError(f"{folder / _INDEX}: must have objects weight_map, of strings, and metadata")
    names = sorted(set(mapped.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{folder / _INDEX}: shards must be .safetensors files beside it, got {name!r}")
    found = Checkpoint(folder, config, index, {name: open_file(folder / name) for name in names})
    _check_index(found, mapped)
    return found


def _check_index(checkpoint: Checkpoint, mapped: Mapping[str, str]) -> None:
    """Each tensor is in the shard that the index names, and in no other."""
    for shard, file in checkpoint.shards.items():
        for name in file.entries:
            if mapped.get(name) != shard:
                raise CheckpointError(
                    f"{file.path}: has the tensor {name!r}, which {_INDEX} places in {mapped.get(name, 'no shard')}"
                )
    for name, shard in mapped.items():
        if name not in checkpoint.places:
            raise CheckpointError(f"{checkpoint.folder / shard}: must have the tensor {name!r}, says {_INDEX}")


def _folded(fold: Fold, arrays: dict[str, np.ndarray], rotations: Mapping[str, Rotation]) -> np.ndarray:
    """The new values of a tensor, piece by piece in the place of the old ones where an axis can be cut."""
    array = arrays[fold.source]
    named = {axis.axis for axis in fold.recipe.axes} | {scale.axis.axis for scale in fold.recipe.scales}
    free = [axis for axis in range(array.ndim) if axis not in named]
    if not free:
        return np.asarray(fold(arrays, rotations))
    before, length = (slice(None),) * free[0], array.shape[free[0]]
    step = max(1, _PIECE * length // max(1, array.size))
    for start in range(0, length, step):
        piece = (*before, slice(start, start + step))
        array[piece] = fold({**arrays, fold.source: array[piece]}, rotations)
    return array


@contextlib.contextmanager
def _claimed(out: Path, request: str) -> Iterator[None]:
    """Makes a folder that of a request, and finished when this ends without an error."""
    out.mkdir(parents=True, exist_ok=True)
    state = out / _STATE
    others = [path.name for path in out.iterdir() if path != state]
    if others and not state.exists():
        raise CheckpointError(f"{out}: must be empty, or left unfinished by an earlier run; it has {min(others)!r}")
    with state.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{out}: another process is writing it") from None
        file.seek(0)
        found = file.read()
        if others and found != request:
            raise CheckpointError(
                f"{out}: was left unfinished by a run with another checkpoint, other options or another version; "
                "repeat that one, or remove the folder"
            )
        if found != request:
            file.truncate(0)
            file.write(request)
            file.flush()
            os.fsync(file.fileno())
        yield
        state.unlink()
        _sync(out)


def _check_space(out: Path, needed: int) -> None:
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(f"{out}: needs {needed / 1e6:,.1f} MB of space, got {free / 1e6:,.1f} MB")


def _is_complete(path: Path, head: bytes, size: int) -> bool:
    """Whether a shard has been written; only complete ones have their name."""
    if not path.is_file() or path.stat().st_size != len(head) + size:
        return False
    with path.open("rb") as file:
        return file.read(len(head)) == head


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which gets its name when it is complete and on the disk."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync(folder: Path) -> None:
    """Puts the names of a folder's files on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: must hold an object, got {type(found).__name__}")
    return found


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with _replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())
