"""A Llama in Flax NNX that names the places where rotations and quantisers act; the examples share it.

Its parameters have the names of google-tunix's models, so `rotations.plans.llama(naming="tunix")` is its plan.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model.

    Attributes:
        rope_scaling: Llama 3's of its position embedding, as in config.json, as sorted items; () for none.
        dtype: of the activations; norms, scores and logits are computed in float32.
        remat: compute a layer's activations again in the backward pass instead of keeping them.
        scan: run the layers as one loop, whose body is compiled once, where there is no cache.
    """

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    norm_eps: float = 1e-5
    tied: bool = False
    dtype: str = "float32"
    remat: bool = False
    scan: bool = False


def unchanged(x: jax.Array) -> jax.Array:
    """What the unquantised, unrotated model does."""
    return x


def unchanged_weight(w: jax.Array, contracted: tuple[int, ...]) -> jax.Array:
    """The same for weights."""
    del contracted
    return w


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention of grouped queries.

    Args:
        q: (batch, queries, heads, head_dim).
        k: (batch, keys, kv_heads, head_dim).
        v: like k.
        mask: (batch, 1, queries, keys), True where a key is seen.
    """
    return jax.nn.dot_product_attention(q, k.astype(q.dtype), v.astype(q.dtype), mask=mask)


@dataclasses.dataclass(frozen=True)
class Numerics:
    """What a forward pass does to its numbers. The default is the model itself.

    Attributes:
        weight: of a linear layer, with the axes that are contracted: what share a scale.
        activation: what a linear layer reads, along its last axis: the stream behind its norms, the result of each
            head, what down_proj reads.
        cached: keys, after their position embedding, and values, along the last axis. Caches keep and attention reads
            whatever it returns, a QuantizedArray too.
        rotate_heads: R3, of queries and keys.
        rotate_hidden: R4, of what down_proj reads. Its kernel must be rotated.
        attention: of queries, keys, values and a mask.
        fused_keys: rotate_heads and cached of keys in one call, in place of both.
        fused_hidden: rotate_hidden and activation in one call, in place of both.
    """

    weight: Callable[[jax.Array, tuple[int, ...]], jax.Array] = unchanged_weight
    activation: Callable[[jax.Array], jax.Array] = unchanged
    cached: Callable[[jax.Array], Any] = unchanged
    rotate_heads: Callable[[jax.Array], jax.Array] = unchanged
    rotate_hidden: Callable[[jax.Array], jax.Array] = unchanged
    attention: Callable[[jax.Array, Any, Any, jax.Array], jax.Array] = attention
    fused_keys: Callable[[jax.Array], Any] | None = None
    fused_hidden: Callable[[jax.Array], jax.Array] | None = None

    def keys(self, k: jax.Array) -> Any:
        """What the cache keeps of keys."""
        return self.cached(self.rotate_heads(k)) if self.fused_keys is None else self.fused_keys(k)

    def hidden(self, h: jax.Array) -> jax.Array:
        """What down_proj reads."""
        return self.activation(self.rotate_hidden(h)) if self.fused_hidden is None else self.fused_hidden(h)


EXACT = Numerics()


class Cache(Protocol):
    """The keys and values of one layer so far."""

    def extended(self, k: Any, v: Any) -> "tuple[Cache, Any, Any]":
        """The cache with more keys and values, and all of them: at index p of axis 1 those of position p."""
        ...


class Weight(nnx.Module):
    """A parameter with a name of its own: normally distributed, or ones for a norm."""

    def __init__(self, shape: tuple[int, ...], deviation: float | None, rngs: nnx.Rngs):
        ones = deviation is None
        self.w = nnx.Param(jnp.ones(shape) if ones else deviation * jax.random.normal(rngs.params(), shape))


class Kernel(nnx.Module):
    """A linear layer's kernel (in, out)."""

    def __init__(self, inner: int, outer: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (inner, outer)) / math.sqrt(inner))


class Embedder(nnx.Module):
    """The table of embeddings (vocab, hidden)."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.input_embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocab, config.hidden)))


class Attention(nnx.Module):
    """Attention of grouped queries with rotary position embedding."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        c = self.config = config
        deviation = c.hidden**-0.5
        self.q_proj = Weight((c.hidden, c.heads, c.head_dim), deviation, rngs)
        self.k_proj = Weight((c.hidden, c.kv_heads, c.head_dim), deviation, rngs)
        self.v_proj = Weight((c.hidden, c.kv_heads, c.head_dim), deviation, rngs)
        self.o_proj = Weight((c.heads, c.head_dim, c.hidden), (c.heads * c.head_dim) ** -0.5, rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, numerics: Numerics, cache: Cache | None):
        q, k, v = (_product("btd,dnh->btnh", x, p.w, (0,), numerics) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rope(array, positions, self.config) for array in (q, k))
        q, k, v = numerics.rotate_heads(q), numerics.keys(k), numerics.cached(v)
        if cache is not None:
            cache, k, v = cache.extended(k, v)
        mask = positions[:, None, :, None] >= jnp.arange(k.shape[1])
        mixed = numerics.activation(numerics.attention(q, k, v, mask))
        return _product("btnh,nhd->btd", mixed, self.o_proj.w, (0, 1), numerics), cache


class MLP(nnx.Module):
    """silu(x gate) * (x up) down."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.gate_proj = Kernel(config.hidden, config.inner, rngs)
        self.up_proj = Kernel(config.hidden, config.inner, rngs)
        self.down_proj = Kernel(config.inner, config.hidden, rngs)

    def __call__(self, x: jax.Array, numerics: Numerics) -> jax.Array:
        gate, up = (_product("btd,df->btf", x, p.kernel, (0,), numerics) for p in (self.gate_proj, self.up_proj))
        hidden = numerics.hidden(jax.nn.silu(gate) * up)
        return _product("btf,fd->btd", hidden, self.down_proj.kernel, (0,), numerics)


class Layer(nnx.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.eps = config.norm_eps
        self.input_layernorm = Weight((config.hidden,), None, rngs)
        self.attn = Attention(config, rngs)
        self.post_attention_layernorm = Weight((config.hidden,), None, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, numerics: Numerics, cache: Cache | None):
        seen = numerics.activation(rms_norm(x, self.input_layernorm.w, self.eps))
        mixed, cache = self.attn(seen, positions, numerics, cache)
        x = x + mixed
        seen = numerics.activation(rms_norm(x, self.post_attention_layernorm.w, self.eps))
        return x + self.mlp(seen, numerics), cache


class Llama(nnx.Module):
    """The model: logits of the next token at each position."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.embedder = Embedder(config, rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.layers)])
        self.final_norm = Weight((config.hidden,), None, rngs)
        if not config.tied:
            self.lm_head = Weight((config.hidden, config.vocab), config.hidden**-0.5, rngs)

    def __call__(
        self,
        tokens: jax.Array,
        numerics: Numerics = EXACT,
        *,
        start: jax.Array | int = 0,
        caches: list[Cache] | None = None,
        at: jax.Array | None = None,
    ):
        """The logits of a batch of tokens.

        Args:
            tokens: (batch, length).
            numerics: what is rotated and quantised.
            start: the position of the first token.
            caches: one a layer. With them, tokens also see what came before.
            at: (batch,), the only token of each sequence whose logits are wanted.

        Returns:
            float32 logits (batch, length, vocab), or (batch, 1, vocab) with `at`; with caches, a pair of them and the
            extended caches.
        """
        positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.embedder.input_embedding[...][tokens].astype(self.config.dtype)
        x, extended = self._run_layers(x, positions, numerics, caches)
        if at is not None:
            x = jnp.take_along_axis(x, at[:, None, None], axis=1)
        x = rms_norm(x, self.final_norm.w, self.config.norm_eps)
        head = self.embedder.input_embedding[...].T if self.config.tied else self.lm_head.w[...]
        logits = jnp.einsum("btd,dv->btv", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
        return logits if caches is None else (logits, extended)

    def _run_layers(self, x: jax.Array, positions: jax.Array, numerics: Numerics, caches: list[Cache] | None):
        run = nnx.remat(Layer.__call__, static_argnums=(3,)) if self.config.remat else Layer.__call__
        if self.config.scan and caches is None:
            graph, *states = nnx.graphdef(self.layers[0]), *map(nnx.state, self.layers)
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
            x, _ = jax.lax.scan(lambda x, s: run(nnx.merge(graph, s), x, positions, numerics, None), x, stacked)
            return x, None
        extended = []
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x, longer = run(layer, x, positions, numerics, cache)
            extended.append(longer)
        return x, extended


def rms_norm(x: jax.Array, weight: nnx.Param, eps: float) -> jax.Array:
    """The norm x / rms(x) * weight, computed in float32."""
    wide = x.astype(jnp.float32)
    y = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps) * weight[...].astype(jnp.float32)
    return y.astype(x.dtype)


def rope(x: jax.Array, positions: jax.Array, config: Config) -> jax.Array:
    """The rotary position embedding of (batch, length, heads, head_dim), whose pairs are elements i and i + d / 2."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling:
        frequency = _scaled(frequency, dict(config.rope_scaling))
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _scaled(frequency: jax.Array, scaling: Mapping[str, Any]) -> jax.Array:
    """Llama 3's: frequencies with a wavelength beyond the original context are divided by a factor, and between two
    wavelengths in part.
    """
    context = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)  # in wavelengths
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = jnp.clip((context - low) / (high - low), 0, 1)
    return frequency * (kept + (1 - kept) / scaling["factor"])


def _product(equation: str, x: jax.Array, weight: nnx.Param, contracted: tuple[int, ...], numerics: Numerics):
    return jnp.einsum(equation, x, numerics.weight(weight[...], contracted).astype(x.dtype))
