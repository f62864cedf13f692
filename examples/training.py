"""Small Llamas of bytes: text, training with outlier channels, 4-bit quantisers and perplexity, for what compares them.

Weights of all linear layers but the head are rounded to 4 bits, symmetric, with a scale for each output channel that a
search chooses (W4); what linear layers read asymmetric per token, and per head for o_proj (A4); keys and values
asymmetric per token and head (KV4).
"""

import dataclasses
import functools
import math
import operator
import sysconfig
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import llama
import numpy as np
import optax
from flax import nnx
from terminal import progress

from jax_hadacore import hadamard, hadamard_fake_quantize
from jax_hadacore.rotations import Plan, Rotation, fake_quant, plans, rotate

HELD_OUT = 16  # one file in so many, by a checksum of its name; of a single file, the last part
# Added to the first channels of the embedding before training, which keeps them: small models have no outliers else.
OFFSETS = (25.0, -18.0)
DEVIATION = 0.7  # of the embedding before training
BITS = 4
CONTRACTED = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"), (0,)) | {
    "o_proj": (0, 1)
}
Params = dict[str, Any]
Apply = Callable[[Params, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Text:
    """Bytes to train on and to judge by, and where they are from."""

    train: jax.Array
    held_out: jax.Array
    source: str


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW with a warm-up and a cosine to a tenth of the learning rate."""

    steps: int
    batch: int
    length: int
    rate: float


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, its training, and how many batches of the same size judge it."""

    config: llama.Config
    recipe: Recipe
    judged: int


_Bytes = functools.partial(llama.Config, vocab=256, scan=True)
SMALL = Size(
    _Bytes(hidden=128, inner=256, layers=2, heads=4, kv_heads=2, head_dim=32), Recipe(300, 16, 64, 4e-3), judged=16
)
USUAL = Size(
    _Bytes(hidden=128, inner=512, layers=4, heads=4, kv_heads=2, head_dim=32), Recipe(500, 16, 128, 4e-3), judged=16
)
LARGE = Size(
    _Bytes(hidden=512, inner=2048, layers=8, heads=8, kv_heads=4, head_dim=64, dtype="bfloat16"),
    Recipe(1000, 64, 256, 1e-3),
    judged=16,
)


def read_text(path: Path | None = None) -> Text:
    """The bytes of a file, or of the Python sources of the standard library."""
    if path is not None:
        data = path.read_bytes()
        split = len(data) - len(data) // HELD_OUT
        parts, name = (data[:split], data[split:]), path.name
    else:
        parts, name = _standard_library(), "the standard library"
    train, held_out = (jnp.asarray(np.frombuffer(part, np.uint8)) for part in parts)
    checksum = zlib.crc32(parts[0])
    return Text(train, held_out, f"{name}, {len(train):,} + {len(held_out):,} bytes, CRC {checksum:08x}")


def _standard_library() -> tuple[bytes, bytes]:
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    parts: tuple[list[bytes], list[bytes]] = [], []
    for name in names:
        if "-packages/" not in name:  # site-packages and dist-packages are others' code
            parts[zlib.crc32(name.encode()) % HELD_OUT == 0].append((root / name).read_bytes())
    return b"".join(parts[0]), b"".join(parts[1])


@functools.partial(jax.jit, static_argnames=("batch", "length"))
def windows(text: jax.Array, key: jax.Array, *, batch: int, length: int) -> jax.Array:
    """Tokens (batch, length) from random places of a text."""
    starts = jax.random.randint(key, (batch, 1), 0, len(text) - length)
    return text[starts + jnp.arange(length)].astype(jnp.int32)


def held_out_batches(text: Text, size: Size) -> jax.Array:
    """The fixed tokens (judged, batch, length) that perplexities are of."""
    count, batch, length = size.judged, size.recipe.batch, size.recipe.length
    return windows(text.held_out, jax.random.key(0), batch=count * batch, length=length).reshape(count, batch, length)


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """The mean over all tokens but the first of -log p."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


@functools.partial(jax.jit, static_argnums=0)
def initial(config: llama.Config, key: jax.Array, offsets: jax.Array | Sequence[float] = OFFSETS) -> Params:
    """The parameters of a model before it is trained, with outlier channels."""
    params = nnx.to_pure_dict(nnx.state(llama.Llama(config, nnx.Rngs(key)), nnx.Param))
    table = DEVIATION * params["embedder"]["input_embedding"]
    params["embedder"]["input_embedding"] = table.at[:, : len(offsets)].add(jnp.array(offsets))
    return params


def train(size: Size, text: Text, *, seed: int, offsets: Sequence[float] = OFFSETS) -> Params:
    """The parameters of a model that is trained from scratch; the seed is of its start and of its batches."""
    recipe, key = size.recipe, jax.random.key(seed)
    optimizer, step = _training(size.config, recipe)
    params = initial(size.config, key, offsets)
    opt_state = optimizer.init(params)
    with progress(recipe.steps) as shown:
        for i in range(recipe.steps):
            params, opt_state, loss = step(params, opt_state, text.train, jax.random.fold_in(key, i))
            if i % 10 == 9:
                shown(f"training, perplexity {math.exp(loss):.2f}", 10)
    return params


@functools.cache
def _training(config: llama.Config, recipe: Recipe):
    """The optimiser, and a step."""
    rate = optax.warmup_cosine_decay_schedule(0.0, recipe.rate, recipe.steps // 10, recipe.steps, recipe.rate / 10)
    adamw = optax.adamw(rate, b2=0.95, weight_decay=0.1, mask=_decayed)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    apply = model(config)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, text, key):
        tokens = windows(text, key, batch=recipe.batch, length=recipe.length)
        loss, gradients = jax.value_and_grad(lambda p: cross_entropy(apply(p, tokens), tokens))(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return optimizer, step


def _decayed(params: Any) -> Any:
    """Matrices, but not the embedding: its offsets are to stay."""
    return jax.tree.map_with_path(lambda path, p: p.ndim > 1 and "embed" not in jax.tree_util.keystr(path), params)


@functools.cache
def model(config: llama.Config, numerics: llama.Numerics = llama.EXACT) -> Apply:
    """The function apply(params, tokens) -> logits, the same object for the same arguments."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: llama.Llama(config, nnx.Rngs(0))))
    return lambda params, tokens: nnx.merge(graph, params)(tokens, numerics)


@functools.cache
def plan(names: Sequence[str]) -> Plan:
    """Of the rotations that are folded, R1, R2 and R4."""
    return plans.llama(naming="tunix", rotations=[name for name in names if name != "R3"])


@functools.cache
def rotated(names: Sequence[str]) -> Callable[[Params, dict[str, Rotation]], Params]:
    """The jitted fold of rotations into parameters."""
    return jax.jit(lambda params, rotations: rotate(params, plan(names), rotations))


def rounded(x: jax.Array, detach_scale: bool = True) -> jax.Array:
    """Of activations, keys and values."""
    return fake_quant(x, BITS, symmetric=False, detach_scale=detach_scale)


def rotated_and_rounded(x: jax.Array) -> jax.Array:
    """R3 or R4 and its quantiser, one kernel where there is one."""
    return hadamard_fake_quantize(x, "int4", asymmetric=True)


@functools.cache
def a4kv4(names: Sequence[str] = (), *, detach_scale: bool = True) -> llama.Numerics:
    """Quantised activations, keys and values, with the online ones of the named rotations.

    The one call for R3 or R4 and its quantiser has no gradient of the scale: with detach_scale=False they are two.
    """
    online = {"R3": "rotate_heads", "R4": "rotate_hidden"}
    fused = {"R3": "fused_keys", "R4": "fused_hidden"} if detach_scale else {}
    quantiser = functools.partial(rounded, detach_scale=detach_scale)
    return llama.Numerics(
        activation=quantiser,
        cached=quantiser,
        **{field: hadamard for name, field in online.items() if name in names},
        **{field: rotated_and_rounded for name, field in fused.items() if name in names},
    )


@jax.jit
def with_rounded_weights(params: Params) -> Params:
    """The parameters with all weights in 4 bits but the embedding's and the head's."""
    layers = params["layers"]
    # The same weights of all layers at once: their search is one loop.
    stacked = jax.tree.map_with_path(_rounded_weights, jax.tree.map(lambda *same: jnp.stack(same), *layers.values()))
    return {**params, "layers": {i: jax.tree.map(operator.itemgetter(i), stacked) for i in layers}}


def _rounded_weights(path: tuple, weights: jax.Array) -> jax.Array:
    """The weights of a linear layer (layers, ...), or those of a norm as they are."""
    kind = next((name for name in CONTRACTED if name in jax.tree_util.keystr(path)), None)
    if kind is None:
        return weights
    return fake_quant(weights, BITS, axis=tuple(1 + axis for axis in CONTRACTED[kind]), clip="search")


@functools.partial(jax.jit, static_argnums=0)
def mean_loss(apply: Apply, params: Params, batches: jax.Array) -> jax.Array:
    """Over batches (count, batch, length), one after the other."""
    return jax.lax.map(lambda tokens: cross_entropy(apply(params, tokens), tokens), batches).mean()


def perplexity(apply: Apply, params: Params, batches: jax.Array) -> float:
    """Per byte."""
    return math.exp(mean_loss(apply, params, batches))
