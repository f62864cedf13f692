"""A decoder in NumPy float64, by the names of Hugging Face's checkpoints: what rotations must not change.

It shares no code with the library. Its parameters have everything that a fold can get wrong: norms and biases that are
not trivial, grouped queries, heads that are wider than hidden / heads, tied embeddings, norms of queries and keys,
experts with a router.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import oracle


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a decoder and its features. 24 and 20 are no powers of two."""

    vocab: int = 40
    hidden: int = 24
    inner: int = 20
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    layers: int = 2
    bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    tied: bool = False
    offset: float = 0.0  # 1 for norms that multiply by 1 + w
    post_norms: bool = False


def unchanged(x):
    """No online rotation."""
    return x


@dataclasses.dataclass(frozen=True)
class Online:
    """What a rotated model does to its activations."""

    hidden: Callable = unchanged  # R4
    queries_keys: Callable = unchanged  # R3
    embedded: Callable = unchanged
    before_final_norm: Callable = unchanged
    normed: Callable = unchanged  # what attention and MLP read


def parameters(config, seed=0):
    """Random parameters, float32."""
    draw = np.random.default_rng(seed).standard_normal
    c, found = config, {}

    def norm(name, size):
        found[name] = 1 - c.offset + 0.4 * draw(size)

    def linear(name, out, size, bias=False):
        found[f"{name}.weight"] = draw((out, size)) / np.sqrt(size)
        if bias:
            found[f"{name}.bias"] = draw(out)

    found["model.embed_tokens.weight"] = draw((c.vocab, c.hidden))
    norm("model.norm.weight", c.hidden)
    if not c.tied:
        linear("lm_head", c.vocab, c.hidden)
    for i in range(c.layers):
        layer = f"model.layers.{i}"
        norm(f"{layer}.input_layernorm.weight", c.hidden)
        norm(f"{layer}.post_attention_layernorm.weight", c.hidden)
        if c.post_norms:
            norm(f"{layer}.pre_feedforward_layernorm.weight", c.hidden)
            norm(f"{layer}.post_feedforward_layernorm.weight", c.hidden)
        for kind, heads in ("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads):
            linear(f"{layer}.self_attn.{kind}_proj", heads * c.head_dim, c.hidden, c.bias)
        linear(f"{layer}.self_attn.o_proj", c.hidden, c.heads * c.head_dim)
        if c.qk_norm:
            norm(f"{layer}.self_attn.q_norm.weight", c.head_dim)
            norm(f"{layer}.self_attn.k_norm.weight", c.head_dim)
        if c.experts:
            linear(f"{layer}.mlp.gate", c.experts, c.hidden)
        for mlp in [f"mlp.experts.{e}" for e in range(c.experts)] or ["mlp"]:
            linear(f"{layer}.{mlp}.gate_proj", c.inner, c.hidden)
            linear(f"{layer}.{mlp}.up_proj", c.inner, c.hidden)
            linear(f"{layer}.{mlp}.down_proj", c.hidden, c.inner)
    return {name: value.astype(np.float32) for name, value in found.items()}


def logits(params, config, tokens, online=None):
    """The logits of a sequence of tokens."""
    c, online = config, online or Online()
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * (p[name] + c.offset)

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)

    def mlp(x, name):
        gate = linear(x, f"{name}.gate_proj")
        return linear(online.hidden(gate / (1 + np.exp(-gate)) * linear(x, f"{name}.up_proj")), f"{name}.down_proj")

    def experts(x, name):
        scores = linear(x, f"{name}.gate")
        chosen = np.argsort(scores, -1)[:, -2:]
        weights = np.zeros_like(scores)
        np.put_along_axis(weights, chosen, _softmax(np.take_along_axis(scores, chosen, -1)), -1)
        return sum(weights[:, e, None] * mlp(x, f"{name}.experts.{e}") for e in range(c.experts))

    def heads(x, layer, kind, count):
        split = linear(x, f"{layer}.self_attn.{kind}_proj").reshape(len(x), count, c.head_dim)
        if c.qk_norm and kind != "v":
            split = norm(split, f"{layer}.self_attn.{kind}_norm.weight")
        return np.repeat(split if kind == "v" else online.queries_keys(_rope(split)), c.heads // count, axis=1)

    def attention(x, layer):
        q, k, v = heads(x, layer, "q", c.heads), heads(x, layer, "k", c.kv_heads), heads(x, layer, "v", c.kv_heads)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(c.head_dim)
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        mixed = np.einsum("hqk,khd->qhd", _softmax(scores), v).reshape(len(x), -1)
        return linear(mixed, f"{layer}.self_attn.o_proj")

    x = online.embedded(p["model.embed_tokens.weight"][tokens])
    for i in range(c.layers):
        layer = f"model.layers.{i}"
        before_mlp = "pre_feedforward" if c.post_norms else "post_attention"
        branch = attention(online.normed(norm(x, f"{layer}.input_layernorm.weight")), layer)
        x = x + (norm(branch, f"{layer}.post_attention_layernorm.weight") if c.post_norms else branch)
        feed = experts if c.experts else mlp
        branch = feed(online.normed(norm(x, f"{layer}.{before_mlp}_layernorm.weight")), f"{layer}.mlp")
        x = x + (norm(branch, f"{layer}.post_feedforward_layernorm.weight") if c.post_norms else branch)
    x = norm(online.before_final_norm(x), "model.norm.weight")
    return linear(x, "lm_head" if "lm_head.weight" in p else "model.embed_tokens")


def matrix(rotation):
    """The n x n matrix P of T(x) = x P: diag(signs) H q, entry by entry."""
    n = rotation.size
    width = rotation.block or n
    p = np.kron(np.eye(n // width), oracle.dense(width) / np.sqrt(width))
    if rotation.signs is not None:
        p = np.asarray(rotation.signs, np.float64)[:, None] * p
    if rotation.q is not None:
        q = np.asarray(rotation.q, np.float64).reshape(-1, width, width)
        blocks = np.zeros((n, n))
        for b, block in enumerate(q):
            blocks[b * width : (b + 1) * width, b * width : (b + 1) * width] = block
        p = p @ blocks
    return p


def _rope(x):
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] / 100.0 ** (np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def _softmax(x):
    e = np.exp(x - np.max(x, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
