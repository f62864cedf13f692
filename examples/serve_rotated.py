"""Greedy decoding from a KV cache in bfloat16, int8 and float8, with and without the rotation of queries and keys.

    python examples/serve_rotated.py [--small] [--json FILE]

shows tokens per second on the device at hand, the bytes of the cache, and what its codes do to the logits. The model is
a Llama of random weights, on a GPU with a few of Llama-3-8B's layers, and R1 and R2 folded into them. R3 is online:

- `hadamard` of each query, after its position embedding;
- `hadamard_quantize` of each key, its rotation and its codes in one call. R2 has rotated the values already: theirs has
  block_size=1, the transform of single elements, which leaves them as they are.

The cache has codes c and a scale s for each token and head. Attention multiplies codes, and scales beside them,

    q k^T = (q c^T) s,    o = (p s) c,    p the weights of the softmax,

so that no dequantised cache is ever written. All caches are read by the same products of XLA, bfloat16 too; no kernel
for flash decoding takes part. One call reads the prompt, piece by piece, others decode many tokens each, and all write
into a cache that was allocated once, for all positions, and is donated from call to call.

Random weights lack two properties of trained ones, which are planted. Two channels of all keys are OUTLIERS times as
large, and the same of the queries as much smaller, which leaves the scores as they are. And queries are SHARPNESS times
as large: attention would weigh thousands of tokens alike otherwise, and average all errors away.

The error of the logits is the root mean square of their difference from those of the unrotated bfloat16 cache, relative
to them, while every model reads the tokens that this one decodes; `same tokens` is how often the most likely one is the
same. The rotated bfloat16 cache shows how much of that is rounding elsewhere.

An int8 code spends its range on the outliers, and R3 removes them. A float8 code has an exponent of its own: its error
is in proportion to its channel, and for an outlier the query's channel is small. R3 spreads that error over all.

Sources: QuaRot (Ashkboos et al., 2024, arXiv:2404.00456) and SpinQuant (Liu et al., 2024, arXiv:2405.16406), for the
rotations; KVQuant (Hooper et al., 2024, arXiv:2401.18079), for the outlier channels of keys.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import llama
import stored
from flax import nnx
from terminal import progress

from jax_hadacore import QuantizedArray, hadamard, hadamard_quantize
from jax_hadacore.bench.environment import environment
from jax_hadacore.rotations import plans, rotate

OUTLIERS = 16
SHARPNESS = 2
CACHES = tuple(itertools.product(("bfloat16", "int8", "float8_e4m3fn"), (False, True)))  # codes, and whether with R3
Stored = jax.Array | QuantizedArray


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is decoded.

    Attributes:
        context: positions of the cache; what is not decoded is the prompt.
        piece: the most positions of the prompt that are read at a time.
        steps: tokens that a call decodes.
        calls: how many are timed, after a first one.
    """

    model: llama.Config
    batch: int
    context: int
    piece: int = 128
    steps: int = 32
    calls: int = 7

    @property
    def prompt(self) -> int:
        """Positions of the prompt."""
        return self.context - self.steps * (1 + self.calls)


# The sizes of Llama-3-8B, whose 32 layers are alike.
LLAMA = llama.Config(128256, 4096, 14336, 4, 32, 8, 128, rope_theta=500000.0, dtype="bfloat16")
GPU = Setting(LLAMA, batch=32, context=8192)
CPU = Setting(llama.Config(1024, 512, 1536, 4, 8, 2, 128), batch=4, context=1024)
SMALL = Setting(llama.Config(1024, 256, 768, 2, 4, 2, 64), batch=4, context=512, piece=64, steps=8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of one layer: arrays, or codes with their scales, of which `length` positions are written.

    They are (batch, kv_heads, positions, ...): the positions of a head, which a product reads, are contiguous.
    """

    keys: Stored
    values: Stored
    length: jax.Array

    @classmethod
    def empty(cls, numerics: llama.Numerics, config: llama.Config, batch: int, context: int) -> "Cache":
        """A cache for what the numerics keep."""
        kept = jax.ShapeDtypeStruct((batch, context, config.kv_heads, config.head_dim), jnp.dtype(config.dtype))
        shapes = jax.eval_shape(lambda x: (_by_heads(numerics.keys(x)), _by_heads(numerics.cached(x))), kept)
        return cls(*jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), jnp.int32(0))

    def extended(self, k: Stored, v: Stored) -> "tuple[Cache, Stored, Stored]":
        """The cache with more keys and values, and all of them, as (batch, positions, kv_heads, ...)."""

        def write(all: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(all, new, self.length, axis=2)

        keys, values = (
            jax.tree.map(write, before, _by_heads(new)) for before, new in ((self.keys, k), (self.values, v))
        )
        return Cache(keys, values, self.length + k.shape[1]), _by_heads(keys), _by_heads(values)


def _by_heads(stored: Any) -> Any:
    """Positions and heads in each other's place."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), stored)


def attention(q: jax.Array, k: Stored, v: Stored, mask: jax.Array) -> jax.Array:
    """llama.attention on codes, whose scales multiply the scores and the weights."""
    (k, k_scale), (v, v_scale) = _codes(k, q.dtype), _codes(v, q.dtype)
    batch, queries, _, head_dim = q.shape
    grouped = q.reshape(batch, queries, k.shape[2], -1, head_dim)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("bqngd,bknd->bngqk", grouped, k) * (k_scale / math.sqrt(head_dim))
    weights = jax.nn.softmax(jnp.where(mask[:, :, None], scores, -jnp.inf), axis=-1)
    mixed = product("bngqk,bknd->bqngd", (weights * v_scale).astype(q.dtype), v)
    return mixed.reshape(q.shape).astype(q.dtype)


def _codes(stored: Stored, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array | float]:
    """Codes in a type that has all of them, and their scales, as (batch, kv_heads, 1, 1, positions)."""
    if isinstance(stored, QuantizedArray):
        return stored.values.astype(dtype), jnp.moveaxis(stored.scales, 1, -1)[:, :, None]
    return stored.astype(dtype), 1.0


def numerics(codes: str, *, rotated: bool) -> llama.Numerics:
    """Of a cache of such codes, with R3 or without."""
    turn = hadamard if rotated else llama.unchanged
    if codes == "bfloat16":
        return llama.Numerics(cached=lambda x: x.astype(codes), rotate_heads=turn, attention=attention)
    quantize = functools.partial(hadamard_quantize, qtype=codes)
    return llama.Numerics(
        cached=functools.partial(quantize, block_size=1),
        rotate_heads=turn,
        fused_keys=quantize if rotated else None,
        attention=attention,
    )


def create(config: llama.Config, *, seed: int = 0, outliers: float = OUTLIERS) -> tuple[nnx.GraphDef, nnx.State]:
    """A random model with planted outliers and, folded into it, R1 and R2; in the dtype of its activations."""
    model = llama.Llama(config, nnx.Rngs(seed))
    pair = jnp.array([1, config.head_dim // 2 + 1])  # the position embedding turns it, so it has one factor
    for layer in model.layers:
        q, k = layer.attn.q_proj.w, layer.attn.k_proj.w
        q[...] = (SHARPNESS * q[...]).at[..., pair].divide(outliers)
        k[...] = k[...].at[..., pair].multiply(outliers)
    graph, params = nnx.split(model)
    plan = plans.llama(naming="tunix")
    rotated = rotate(params, plan, plan.init(jax.random.key(seed), params))
    return graph, jax.tree.map(lambda w: w.astype(config.dtype), rotated)


@dataclasses.dataclass(frozen=True)
class Program:
    """What a model computes, without its parameters."""

    graph: nnx.GraphDef
    numerics: llama.Numerics

    def __call__(self, params: nnx.State, caches: list[Cache], tokens: jax.Array) -> tuple[list[Cache], jax.Array]:
        """The caches with more tokens (batch, length), and the logits of the next one, (batch, vocab)."""
        model, start = nnx.merge(self.graph, params), caches[0].length
        last = jnp.full(len(tokens), tokens.shape[1] - 1)
        logits, caches = model(tokens, self.numerics, start=start, caches=caches, at=last)
        return caches, logits[:, 0]


@functools.partial(jax.jit, static_argnames=("program", "piece"), donate_argnames="caches")
def prefill(
    program: Program, params: nnx.State, caches: list[Cache], prompt: jax.Array, *, piece: int
) -> tuple[list[Cache], jax.Array]:
    """Program of a long prompt, `piece` of its positions at a time, which divides their number."""
    pieces = jnp.moveaxis(prompt.reshape(len(prompt), -1, piece), 1, 0)
    caches, logits = jax.lax.scan(functools.partial(program, params), caches, pieces)
    return caches, logits[-1]


@functools.partial(jax.jit, static_argnames="program", donate_argnames="caches")
def decode(
    program: Program, params: nnx.State, caches: list[Cache], logits: jax.Array, given: jax.Array
) -> tuple[list[Cache], jax.Array, jax.Array]:
    """Decodes greedily, a token of each sequence for each row of `given`.

    Args:
        program: of the model.
        params: of the model.
        caches: of what came before.
        logits: (batch, vocab) of the first token.
        given: (steps, batch) tokens to go on with; where they are negative, the most likely ones.

    Returns:
        The caches; the tokens (steps, batch); and the logits (steps, batch, vocab) of what follows each.
    """

    def step(carry: tuple[list[Cache], jax.Array], given: jax.Array) -> tuple[tuple, tuple]:
        caches, logits = carry
        tokens = jnp.where(given < 0, jnp.argmax(logits, -1), given)
        caches, logits = program(params, caches, tokens[:, None])
        return (caches, logits), (tokens, logits)

    (caches, _), (tokens, logits) = jax.lax.scan(step, (caches, logits), given)
    return caches, tokens, logits


class Server:
    """A model, its cache, and the logits of the next token."""

    def __init__(self, graph: nnx.GraphDef, params: nnx.State, numerics: llama.Numerics, setting: Setting):
        config = setting.model
        self._model = Program(graph, numerics), params
        self._piece = setting.piece
        self.caches = [Cache.empty(numerics, config, setting.batch, setting.context) for _ in range(config.layers)]
        self._logits = jnp.zeros((setting.batch, config.vocab))

    def read(self, prompt: jax.Array) -> None:
        """Reads tokens (batch, length)."""
        self.caches, self._logits = prefill(*self._model, self.caches, prompt, piece=self._piece)

    def decode(self, given: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `decode`; waits for the device."""
        self.caches, tokens, logits = jax.block_until_ready(decode(*self._model, self.caches, self._logits, given))
        self._logits = logits[-1]
        return tokens, logits


def measure(setting: Setting, advance: Callable[[str, int], None]) -> dict:
    """The results, with a row for each cache. Timed calls take turns: a busy machine delays all caches alike."""
    graph, params = create(setting.model)
    prompt = jax.random.randint(jax.random.key(1), (setting.batch, setting.prompt), 0, setting.model.vocab)
    own = jnp.full((setting.steps, setting.batch), -1, jnp.int32)
    servers, errors, followed, exact = {}, {}, own, None
    for codes, rotated in CACHES:
        advance(f"reading the prompt into {codes}", 0)
        server = servers[codes, rotated] = Server(graph, params, numerics(codes, rotated=rotated), setting)
        server.read(prompt)
        tokens, logits = server.decode(followed)
        if exact is None:  # of the plain bfloat16 cache, the first
            followed, exact = tokens, logits
        errors[codes, rotated] = {
            "logit_error": float(rms(logits - exact) / rms(exact)),
            "same_tokens": float(jnp.mean(jnp.argmax(logits, -1) == jnp.argmax(exact, -1))),
        }
        advance(f"reading the prompt into {codes}", 1)
    seconds = {key: [] for key in servers}
    for _, (key, server) in itertools.product(range(setting.calls), servers.items()):
        advance(f"decoding from {key[0]}", 0)
        began = time.perf_counter()
        server.decode(own)
        seconds[key].append((time.perf_counter() - began) / setting.steps)
        advance(f"decoding from {key[0]}", 1)
    return {
        "setting": dataclasses.asdict(setting),
        "weight_bytes": _bytes(params) - _bytes(params["embedder"]),  # a step reads but some rows of the embedding
        "rows": [
            {"cache": key[0], "rotated": key[1], **_speed(setting, server, seconds[key]), **errors[key]}
            for key, server in servers.items()
        ],
    }


def _speed(setting: Setting, server: Server, seconds: Sequence[float]) -> dict:
    """Columns of a row: sizes, and the times of steps."""
    size = _bytes([(cache.keys, cache.values) for cache in server.caches])
    return {
        "bytes_per_token": size // (setting.batch * setting.context),
        "bytes": size,
        "tokens_per_second": setting.batch / statistics.median(seconds),
        "step_ms": [1e3 * step for step in seconds],
    }


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@jax.jit
def rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def summary(results: dict) -> Iterator[str]:
    """What was decoded, and the table."""
    s, model = results["setting"], results["setting"]["model"]
    yield (
        f"{model['layers']} layers of hidden size {model['hidden']}, {model['heads']} heads of queries and "
        f"{model['kv_heads']} of keys and values of {model['head_dim']}, {results['weight_bytes'] / 2**30:.2g} GiB of "
        f"weights in {model['dtype']}; batch {s['batch']}, context {s['context']}; {s['steps']} tokens a call, the "
        f"median of {s['calls']} calls, and their range."
    )
    header = ["cache", "R3", "KV bytes per token", "KV GiB", "tokens/s", "ms per step", "logit error", "same tokens"]
    yield stored.table(
        header,
        [
            [
                row["cache"],
                "yes" if row["rotated"] else "no",
                f"{row['bytes_per_token']:,}",
                f"{row['bytes'] / 2**30:.3g}",
                f"{row['tokens_per_second']:,.0f}",
                f"{statistics.median(row['step_ms']):.3g} ({min(row['step_ms']):.3g} to {max(row['step_ms']):.3g})",
                f"{row['logit_error']:.2%}",
                f"{row['same_tokens']:.1%}",
            ]
            for row in results["rows"]
        ],
    )


def conclusion(results: dict) -> Iterator[str]:
    """What the table says."""
    rows = {(row["cache"], row["rotated"]): row for row in results["rows"]}
    base = rows[CACHES[0]]
    for codes in ("int8", "float8_e4m3fn"):
        plain, rotated = rows[codes, False], rows[codes, True]
        # Calls of one turn, as what else the machine does delays them alike.
        faster = [before / after for before, after in zip(base["step_ms"], rotated["step_ms"], strict=True)]
        yield (
            f"{codes} with R3 takes {rotated['bytes'] / base['bytes']:.2f} of the bytes of bfloat16 without, and "
            f"decodes {statistics.median(faster):.2f} times as fast ({min(faster):.2f} to {max(faster):.2f}, turn by "
            f"turn). R3 multiplies the error of its logits by {rotated['logit_error'] / plain['logit_error']:.2f}."
        )


def chart(results: dict) -> Any:
    """Speed, bytes and errors, a bar for each cache."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional

    from jax_hadacore.bench.plot import versions  # noqa: PLC0415 - needs matplotlib

    environment, rows = results["environment"], results["rows"]
    panels = {
        "tokens per second": [row["tokens_per_second"] for row in rows],
        "KV bytes per token": [row["bytes_per_token"] for row in rows],
        "relative error of the logits, %": [100 * row["logit_error"] for row in rows],
    }
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    names = [f"{row['cache']}{', R3' if row['rotated'] else ''}" for row in rows]
    colours = ["tab:blue" if row["rotated"] else "tab:cyan" for row in rows]
    for axes, (title, values) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(
            bars, [f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in values], padding=2, size=8
        )
        axes.set_xlim(0, 1.22 * max(values))
        axes.set_title(title, size=10)
    axes.invert_yaxis()
    figure.suptitle(f"{environment['device']}: greedy decoding from a KV cache", size=12)
    figure.supxlabel(f"{environment['command']}: {versions(environment)}", size=7, color="dimgray")
    return figure


PARTS = (summary, conclusion)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="a smaller model and context, for a CPU")
    for name, text in ("layers", "of the model"), ("batch", "sequences"), ("context", "positions of the cache"):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    options = stored.parsed(parser, arguments)
    if options.markdown or options.png:
        return stored.publish(options, "serve", PARTS, "Tokens per second, bytes and errors of KV caches", chart)
    setting = SMALL if options.small else GPU if jax.default_backend() == "gpu" else CPU
    layers = dataclasses.replace(setting.model, layers=options.layers or setting.model.layers)
    setting = dataclasses.replace(
        setting, model=layers, batch=options.batch or setting.batch, context=options.context or setting.context
    )
    if setting.prompt < 1 or setting.prompt % setting.piece:
        parser.error(
            f"--context must be {setting.context - setting.prompt} positions for what is decoded and a multiple of "
            f"{setting.piece} for the prompt, got {setting.context}"
        )
    results: dict[str, Any] = {"environment": environment(stored.command("examples/serve_rotated.py", arguments))}
    with progress(len(CACHES) * (1 + setting.calls)) as advance:
        results |= measure(setting, advance)
    stored.show(PARTS, results, options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
