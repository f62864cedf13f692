"""Loads a Llama of Hugging Face, config.json and .safetensors files, into examples/llama.py's model on all devices.

Over the devices are split, where they divide them: heads, with the columns and rows of their projections; the inner
dimension of MLPs; the vocabulary. What they do not divide, and norms, each device has whole. This is tensor
parallelism: two sums over the devices in each layer, which XLA adds. One tensor at a time is in host memory.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import llama
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open
from terminal import progress

# Which axis is split: of the tensor in the file, which is (out, in), and of the parameter, (in, out).
_SPLIT = {
    "embedder": (0, 0),
    "lm_head": (0, 1),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), (0, 1)),
    **dict.fromkeys(("o_proj", "down_proj"), (1, 0)),
}
_OUTSIDE_LAYERS = {"embedder": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}
_SCALING = ("factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings")
_DTYPES = ("BF16", "F16", "F32")  # the format's names


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one line and names the folder or the file."""


class Checkpoint:
    """config.json and .safetensors files, of which only the headers are in memory.

    Attributes:
        folder: where they are.
        config: what config.json says.
        shards: the .safetensors files.
        tensors: of all shards, by their names; slicing one reads that part.
    """

    def __init__(self, folder: Path):
        index = folder / "model.safetensors.index.json"
        names = {"model.safetensors"}
        try:
            self.config = json.loads((folder / "config.json").read_bytes())
            if index.exists():
                names = set(json.loads(index.read_bytes())["weight_map"].values())
            self.folder, self.shards = folder, [folder / name for name in sorted(names)]
            files = [safe_open(path, framework="numpy") for path in self.shards]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder}: not a checkpoint of config.json and .safetensors files: {error}"
            ) from error
        self.tensors = {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118 - no mapping


class _Tensor(NamedTuple):
    """What becomes a parameter.

    Attributes:
        name: in the checkpoint.
        stored: its shape there.
        shape: that of the parameter.
        split: the axes of both that the devices share, or None where each has all.
        transposed: whether the parameter's axes are in another order.
    """

    name: str
    stored: tuple[int, ...]
    shape: tuple[int, ...]
    split: tuple[int, int] | None
    transposed: bool


def load(
    checkpoint: Checkpoint, *, dtype: str = "bfloat16", devices: Sequence[jax.Device] | None = None
) -> llama.Llama:
    """The model of a checkpoint.

    Args:
        checkpoint: of Hugging Face.
        dtype: of parameters and activations.
        devices: those that the parameters are split over; all by default.

    Raises:
        CheckpointError: it is not a Llama's, or of a kind that the model here does not know.
    """
    config = configuration(checkpoint, dtype)
    mesh = Mesh(np.array(jax.devices() if devices is None else devices), ("devices",))
    graph, wanted = nnx.split(nnx.eval_shape(lambda: llama.Llama(config, nnx.Rngs(0))))
    parameters = dict(nnx.to_flat_state(wanted))
    tensors = {path: _tensor(path, parameters[path].shape, config, mesh.size) for path in parameters}
    _check(checkpoint, list(tensors.values()), tied=config.tied)
    placed = {}
    with progress(sum(parameter.size for parameter in parameters.values())) as read:
        for path, tensor in tensors.items():
            placed[path] = parameters[path].replace(_placed(checkpoint.tensors[tensor.name], tensor, mesh, dtype))
            read("loading", parameters[path].size)
    return nnx.merge(graph, nnx.from_flat_state(placed))


def configuration(checkpoint: Checkpoint, dtype: str) -> llama.Config:
    """The sizes in config.json.

    Raises:
        CheckpointError: they are not a Llama's, or it does something that the model here does not know.
    """
    found, path = checkpoint.config, checkpoint.folder / "config.json"

    def size(key: str, default: int | None = None) -> int:
        value = found.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{path}: {key} must be a positive whole number, got {value!r}")
        return value

    known = {"model_type": ("llama",), "hidden_act": ("silu", None), "quantization_config": (None,)}
    for key, values in known.items():
        if found.get(key) not in values:
            raise CheckpointError(f"{path}: {key} must be {values[0]!r}, got {found.get(key)!r}")
    if online := found.get("jax_hadacore", {}).get("online"):
        raise CheckpointError(f"{path}: its model must apply {', '.join(online)}, which is not done here")
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    heads = size("num_attention_heads")
    config = llama.Config(
        vocab=size("vocab_size"),
        hidden=size("hidden_size"),
        inner=size("intermediate_size"),
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", size("hidden_size") // heads),
        rope_theta=float(rope.get("rope_theta") or found.get("rope_theta") or 10000),
        rope_scaling=_rope_scaling(rope, f"{path}"),
        norm_eps=float(found.get("rms_norm_eps", 1e-6)),
        tied=bool(found.get("tie_word_embeddings", False)),
        dtype=dtype,
    )
    if heads % config.kv_heads:
        raise CheckpointError(
            f"{path}: num_attention_heads must be a multiple of num_key_value_heads, got {heads} and {config.kv_heads}"
        )
    return config


def _rope_scaling(rope: Mapping[str, Any], path: str) -> tuple[tuple[str, Any], ...]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return ()
    if kind != "llama3" or any(key not in rope for key in _SCALING):
        raise CheckpointError(
            f"{path}: rope_scaling must be null, or of rope_type llama3 with {', '.join(_SCALING)}; got {dict(rope)}"
        )
    return tuple((key, rope[key]) for key in _SCALING)


def _tensor(path: tuple, shape: tuple[int, ...], config: llama.Config, devices: int) -> _Tensor:
    """Which tensor a parameter is."""
    *modules, _ = ("self_attn" if part == "attn" else str(part) for part in path)
    module, inside = modules[-1], ".".join(modules)
    name = f"{_OUTSIDE_LAYERS.get(inside, f'model.{inside}')}.weight"
    if module not in _SPLIT:
        return _Tensor(name, shape, shape, None, transposed=False)
    split = _SPLIT[module]
    other = math.prod(shape) // config.hidden  # all heads, the inner dimension or the vocabulary
    stored = (other, config.hidden) if split[0] == 0 else (config.hidden, other)
    # Heads of queries stay with theirs of keys.
    parts = config.kv_heads if "self_attn" in modules else other
    return _Tensor(name, stored, shape, None if parts % devices else split, transposed=module != "embedder")


def _check(checkpoint: Checkpoint, tensors: Sequence[_Tensor], *, tied: bool) -> None:
    """The checkpoint has the tensors of this model and no others: a bias or a norm more is another model's."""
    wanted = {tensor.name for tensor in tensors}
    given = {name for name in checkpoint.tensors if not name.endswith(".rotary_emb.inv_freq")}
    if tied:
        given.discard("lm_head.weight")
    for names, problem in (wanted - given, "lacks"), (given - wanted, "has, unlike the model here,"):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{checkpoint.folder}: the checkpoint {problem} {min(names)}{others}")
    for tensor in tensors:
        shape, dtype = checkpoint.tensors[tensor.name].get_shape(), checkpoint.tensors[tensor.name].get_dtype()
        if tuple(shape) != tensor.stored or dtype not in _DTYPES:
            raise CheckpointError(
                f"{checkpoint.folder}: {tensor.name} must have the shape {list(tensor.stored)}, by config.json, and "
                f"be of {' or '.join(_DTYPES)}; got {shape} and {dtype}"
            )


def _placed(values: Any, tensor: _Tensor, mesh: Mesh, dtype: str) -> jax.Array:
    """A parameter on the devices: of each its part is read, which it transposes itself."""
    stored, wanted = (
        NamedSharding(mesh, P() if tensor.split is None else P(*[None] * axis, "devices"))
        for axis in tensor.split or (0, 0)
    )
    on_devices = jax.make_array_from_callback(tensor.stored, stored, lambda index: values[index])
    # Waiting keeps a single tensor in host memory.
    return jax.block_until_ready(_layout(tensor.shape, wanted, dtype, tensor.transposed)(on_devices))


@functools.cache
def _layout(shape: tuple[int, ...], sharding: NamedSharding, dtype: str, transposed: bool):
    def parameter(stored: jax.Array) -> jax.Array:
        return (stored.T if transposed else stored).reshape(shape).astype(dtype)

    return jax.jit(parameter, out_shardings=sharding)
