"""FlashAttention-3's experiment: the error of FP8 attention with and without the rotation of queries and keys.

    python examples/fp8_attention.py [--small] [--json FILE]

Entries of q, k and v are N(0, 1) + N(0, 100) * Bernoulli(0.001): small, with a few outliers. In

    o = softmax(q k^T / sqrt(d)) v

both products multiply float8_e4m3fn codes. These have 4 significant bits at any size, so a large score, where outliers
of q and k meet, has the error of a single product. A rotation H along d leaves it as it is, (q H)(k H)^T = q k^T, but
makes it a sum of d products of like size, whose errors average out. The error of o is the root mean square against
float64 on the same bfloat16 inputs, with one scale

- per tensor: for each of q, k and v;
- per block: for 64 rows of a head, FlashAttention-3's blocks; when decoding, for the queries on one head of k and v;
- per row: for a row of q or k and a column of v, the vectors that the products sum over.

The softmax is in float32, its weights times 2^8 in float8, as in FlashAttention-3's kernel; nothing is masked. The
paper's rotation has random signs, which change nothing here: the entries are independent, and as often negative.

Source: Shah et al., FlashAttention-3 (2024, arXiv:2407.08608), sections 3.3 and 4.3.
"""

import argparse
import functools
import itertools
import math
import statistics
import sys
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import stored

from jax_hadacore import hadamard, hadamard_quantize
from jax_hadacore.bench.environment import environment

HEAD_DIM = 128
MODELS = {"Llama-2-70B": (64, 8), "Llama-3-8B": (32, 8)}  # heads of queries, and of keys and values
SCALES = ("per tensor", "per block", "per row")
BLOCK = 64  # rows
COMPARED = 2048  # rows of q beside each head of k and v: in prefill those of one query head
E4M3 = jnp.float8_e4m3fn
WEIGHT_ONE = 256.0  # the code of the largest weight of a softmax
Operand = tuple[jax.Array, jax.Array]  # codes (heads of k and v, rows, d), and their scales
Phase = tuple[str, int, int, int]  # its name, queries of a head, keys, and how often they are drawn
FULL: list[Phase] = [("prefill", 2048, 2048, 5), ("decode", 1, 4096, 20)]
SMALL: list[Phase] = [("prefill", 256, 256, 3), ("decode", 1, 1024, 8)]


def quantized(x: jax.Array, scales: str, *, rotate: bool) -> Operand:
    """Codes of (heads, rows, length), and a scale for each row, (heads, rows, 1)."""
    heads, rows, length = x.shape
    block_size = length if rotate else 1  # the transform of a single element leaves it as it is
    if scales == "per tensor":
        largest = jnp.max(jnp.abs(hadamard(x.astype(jnp.float32), block_size=block_size)))
        scale = largest / float(jnp.finfo(E4M3).max)
        q = hadamard_quantize(x, E4M3, granularity="tensor", quant_scale=scale, block_size=block_size)
        return q.values, jnp.full((heads, rows, 1), scale)
    # Rows that share a scale are quantised as one long row, of which each part is rotated alone.
    count = min(BLOCK, rows) if scales == "per block" else 1
    q = hadamard_quantize(x.reshape(heads, rows // count, count * length), E4M3, block_size=block_size)
    return q.values.reshape(x.shape), jnp.repeat(q.scales, count, axis=1)


@functools.partial(jax.jit, static_argnames=("scales", "rotate"))
def operands(q: jax.Array, k: jax.Array, v: jax.Array, *, scales: str, rotate: bool) -> list[Operand]:
    """Quantises q, k and v, rotates q and k if asked to; v's scales are (heads, blocks, d)."""
    heads, keys, d = v.shape
    if scales == "per row":  # the product with v sums over its columns
        codes, scale = (part.swapaxes(1, 2) for part in quantized(v.swapaxes(1, 2), scales, rotate=False))
    else:
        codes, scale = quantized(v, scales, rotate=False)
        scale = scale[:, ::BLOCK]
    values = codes, jnp.broadcast_to(scale, (heads, keys // BLOCK, d))
    return [quantized(q, scales, rotate=rotate), quantized(k, scales, rotate=rotate), values]


@jax.jit
def fp8_attention(q: Operand, k: Operand, v: Operand, mask: jax.Array | None = None) -> jax.Array:
    """Attention whose products multiply float8 codes, and sum them in float32.

    A mask (rows, keys) is True where a key is seen.
    """
    (q, q_scale), (k, k_scale), (v, v_scale) = q, k, v
    heads, keys, d = v.shape
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("hrd,hkd->hrk", q, k) * q_scale * k_scale.swapaxes(1, 2) / math.sqrt(d)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    codes = (WEIGHT_ONE * weights).astype(E4M3).reshape(heads, -1, keys // BLOCK, BLOCK)
    # A scale for each block of keys is applied to the block's sum, as a kernel would to what it accumulates.
    sums = product("hrbk,hbkd->hbrd", codes, v.reshape(heads, keys // BLOCK, BLOCK, d))
    total = (sums * v_scale[:, :, None]).sum(axis=1)
    return (total / (WEIGHT_ONE * weights.sum(axis=-1, keepdims=True))).astype(jnp.bfloat16)


@jax.jit
def bf16_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(*(x[:, :, None] for x in (q, k, v)))[:, :, 0]


def float64_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights @ v / weights.sum(axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def draw(seed: int, kv_heads: int, queries: int, keys: int) -> list[jax.Array]:
    """q, k and v in bfloat16: N(0, 1), and N(0, 100) added to one entry in a thousand."""
    usual, outliers, where = jax.random.split(jax.random.key(seed), 3)
    shape = (kv_heads, queries + 2 * keys, HEAD_DIM)
    entries = jax.random.normal(usual, shape, jnp.float32)
    added = 10 * jax.random.normal(outliers, shape, jnp.float32)
    entries = jnp.where(jax.random.bernoulli(where, 0.001, shape), entries + added, entries).astype(jnp.bfloat16)
    return jnp.split(entries, (queries, queries + keys), axis=1)


def measure(phases: Sequence[Phase]) -> Iterator[dict]:
    """Rows of results: the error of each kind of attention, one for each seed."""
    kinds = [("bfloat16", False), *((scales, rotate) for scales in SCALES for rotate in (False, True))]
    for (model, (heads, kv_heads)), (phase, queries, keys, seeds) in itertools.product(MODELS.items(), phases):
        errors, exact_rms = {kind: [] for kind in kinds}, []
        for seed in range(seeds):
            # Query heads that share keys and values are rows of one matrix, one head after the other.
            q, k, v = draw(seed, kv_heads, heads // kv_heads * queries, keys)
            exact = float64_attention(np.asarray(q[:, :COMPARED]), np.asarray(k), np.asarray(v))
            exact_rms.append(rms(exact))
            for scales, rotate in kinds:
                fp8 = scales in SCALES
                o = fp8_attention(*operands(q, k, v, scales=scales, rotate=rotate)) if fp8 else bf16_attention(q, k, v)
                errors[scales, rotate].append(rms(np.asarray(o[:, :COMPARED]).astype(np.float64) - exact))
        of_all = {"model": model, "phase": phase, "queries": queries, "keys": keys, "exact_rms": exact_rms}
        yield from ({**of_all, "scales": scales, "rotated": r, "rmse": rmse} for (scales, r), rmse in errors.items())


def rms(x: np.ndarray) -> float:
    return float(f"{np.sqrt(np.mean(np.square(x))):.4g}")


def tables(results: dict) -> Iterator[str]:
    """A table for each model, and what it says."""
    for model in MODELS:
        yield from _of_model(model, results["rows"])


def _of_model(model: str, rows: Sequence[dict]) -> Iterator[str]:
    found = {(row["phase"], row["scales"], row["rotated"]): row for row in rows if row["model"] == model}
    phases = [row for (_, scales, _), row in found.items() if scales == "bfloat16"]
    heads, kv_heads = MODELS[model]
    yield f"{model}, {heads} heads of q and {kv_heads} of k and v, d = {HEAD_DIM}: RMSE in 1e-3, ± its deviation."
    sizes = (f"{row['phase']} {row['queries']} x {row['keys']}" for row in phases)
    header = ["scales", *(name for size in sizes for name in (size, "rotated"))]
    lines = []
    for scales in ("bfloat16", *SCALES):
        columns = [(row["phase"], scales, rotated) for row in phases for rotated in (False, True)]
        errors = (found[column]["rmse"] if column in found else [] for column in columns)
        cells = [f"{1e3 * statistics.fmean(e):.2f} ± {1e3 * statistics.stdev(e):.2f}" if e else "" for e in errors]
        lines.append([scales, *cells])
    yield stored.table(header, lines)
    for row in phases:
        mean = {key[1:]: statistics.fmean(x["rmse"]) for key, x in found.items() if key[0] == row["phase"]}
        gains = ", ".join(f"{mean[scales, False] / mean[scales, True]:.2f} {scales}" for scales in SCALES)
        excess = mean["per row", False] / min(mean[scales, True] for scales in SCALES)
        yield (
            f"{row['phase'].capitalize()}, {len(row['rmse'])} seeds, rms {statistics.fmean(row['exact_rms']):.2g}: the "
            f"rotation divides the error by {gains}. Scales per row without it have {excess:.2f} times the error of "
            f"the best with it{': they suffice' if excess < 1.1 else ''}."
        )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="short sequences, for a CPU")
    options = stored.parsed(parser, arguments, chart=False)
    if options.markdown:
        return stored.publish(options, "fp8-attention", (tables,))
    results: dict = {"environment": environment(stored.command("examples/fp8_attention.py", arguments))}
    results["rows"] = list(measure(SMALL if options.small else FULL))
    stored.show((tables,), results, options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
