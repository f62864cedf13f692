"""The examples' Llama beside the NumPy decoder: logits, caches, and the places where rotations and quantisers act."""

import dataclasses
import functools
import importlib.util
import math

import decoder
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts

from jax_hadacore import hadamard
from jax_hadacore.rotations import plans, rotate

if importlib.util.find_spec("flax") is None:
    pytest.skip("flax is not installed: needs the extra 'models'", allow_module_level=True)

from flax import nnx

llama = scripts.load("llama")

# Flax is written for JAX's usual configuration.
pytestmark = pytest.mark.usefixtures("x64_off", "usual_promotion")

# As in the NumPy decoder, with grouped queries and heads that are wider than hidden / heads.
CONFIG = llama.Config(
    vocab=40, hidden=24, inner=20, layers=2, heads=4, kv_heads=2, head_dim=8, rope_theta=100.0, norm_eps=1e-6
)
TOKENS = np.random.default_rng(1).integers(0, 40, (2, 9))
ONLINE = {"R3": {"rotate_heads": hadamard}, "R4": {"rotate_hidden": hadamard}}


def parameters(tied=False):
    """The NumPy decoder's, and the same under the model's names."""
    given = decoder.parameters(decoder.Config(tied=tied))
    c = CONFIG

    def kernel(name, *shape):
        return given[f"{name}.weight"].T.reshape(shape)

    layers = {}
    for i in range(c.layers):
        layer = f"model.layers.{i}"
        q, o = f"{layer}.self_attn.q_proj", f"{layer}.self_attn.o_proj"
        layers[i] = {
            "input_layernorm": {"w": given[f"{layer}.input_layernorm.weight"]},
            "post_attention_layernorm": {"w": given[f"{layer}.post_attention_layernorm.weight"]},
            "attn": {
                "q_proj": {"w": kernel(q, c.hidden, c.heads, c.head_dim)},
                "k_proj": {"w": kernel(f"{layer}.self_attn.k_proj", c.hidden, c.kv_heads, c.head_dim)},
                "v_proj": {"w": kernel(f"{layer}.self_attn.v_proj", c.hidden, c.kv_heads, c.head_dim)},
                "o_proj": {"w": kernel(o, c.heads, c.head_dim, c.hidden)},
            },
            "mlp": {
                name: {"kernel": given[f"{layer}.mlp.{name}.weight"].T}
                for name in ("gate_proj", "up_proj", "down_proj")
            },
        }
    params = {
        "embedder": {"input_embedding": given["model.embed_tokens.weight"]},
        "layers": layers,
        "final_norm": {"w": given["model.norm.weight"]},
    }
    if not tied:
        params["lm_head"] = {"w": given["lm_head.weight"].T}
    return given, jax.tree.map(jnp.asarray, params)


def logits(params, config=CONFIG, numerics=llama.EXACT, tokens=TOKENS, **options):
    graph = nnx.graphdef(nnx.eval_shape(lambda: llama.Llama(config, nnx.Rngs(0))))
    with jax.default_matmul_precision("highest"):
        return nnx.merge(graph, params)(jnp.asarray(tokens), numerics, **options)


@functools.cache
def expected(tied=False):
    config = decoder.Config(tied=tied)
    return np.stack([decoder.logits(decoder.parameters(config), config, row) for row in TOKENS])


def deviation(found, exact):
    return np.max(np.abs(np.asarray(found, np.float64) - exact)) / np.max(np.abs(exact))


@pytest.mark.parametrize(
    "options", [{}, {"tied": True}, {"remat": True}, {"scan": True}, {"scan": True, "remat": True}], ids=str
)
def test_logits_are_those_of_the_decoder(options):
    tied = options.get("tied", False)
    found = logits(parameters(tied)[1], dataclasses.replace(CONFIG, **options))
    assert found.dtype == np.float32
    assert deviation(found, expected(tied)) < 5e-6


def test_gradients_do_not_depend_on_how_layers_are_run():
    params = parameters()[1]

    def gradient(**options):
        config = dataclasses.replace(CONFIG, **options)
        return jax.grad(lambda p: jnp.sum(logits(p, config) ** 2))(params)

    usual = gradient()
    for options in {"remat": True}, {"scan": True}, {"scan": True, "remat": True}:
        for a, b in zip(jax.tree.leaves(gradient(**options)), jax.tree.leaves(usual), strict=True):
            assert deviation(a, np.asarray(b)) < 1e-4


@dataclasses.dataclass
class Growing:
    """A cache that keeps everything."""

    k: jax.Array
    v: jax.Array

    def extended(self, k, v):
        k, v = jnp.concatenate([self.k, k], axis=1), jnp.concatenate([self.v, v], axis=1)
        return Growing(k, v), k, v


@pytest.mark.parametrize("parts", [(9,), (4, 5), (3, 1, 1, 4)], ids=str)
def test_caches(parts):
    params, found, start = parameters()[1], [], 0
    caches = [Growing(*jnp.zeros((2, len(TOKENS), 0, CONFIG.kv_heads, CONFIG.head_dim))) for _ in range(CONFIG.layers)]
    for count in parts:
        tokens = TOKENS[:, start : start + count]
        some, caches = logits(params, tokens=tokens, start=start, caches=caches)
        found.append(some)
        start += count
    assert deviation(np.concatenate(found, axis=1), expected()) < 5e-6
    assert caches[0].k.shape == (*TOKENS.shape, CONFIG.kv_heads, CONFIG.head_dim)


@pytest.mark.parametrize("names", [("R1",), ("R2",), ("R3",), ("R4",), ("R1", "R2", "R3", "R4")], ids=",".join)
@pytest.mark.parametrize("scan", [False, True], ids=["layers", "scan"])
def test_rotations_leave_the_logits(names, scan):
    params, config = parameters()[1], dataclasses.replace(CONFIG, scan=scan)
    plan = plans.llama(naming="tunix", rotations=[name for name in names if name != "R3"])
    turned = rotate(params, plan, plan.init(jax.random.key(3), params))
    fields = {field: value for name in names for field, value in ONLINE.get(name, {}).items()}
    assert deviation(logits(turned, config, llama.Numerics(**fields)), expected()) < 5e-6


@pytest.mark.parametrize("name", ["R3", "R4"])
def test_online_rotations_are_not_nothing(name):
    """What is left out changes the logits: R3 of queries alone, and R4 without a rotated kernel."""
    hooks = {"R3": {"fused_keys": hadamard}, "R4": {"rotate_hidden": hadamard}}
    assert deviation(logits(parameters()[1], numerics=llama.Numerics(**hooks[name])), expected()) > 1e-2


def coarse(x):
    return jnp.round(4 * x) / 4


def test_what_is_quantised():
    """Every hook is called, as often as there are such places, with the axis last that shares a scale."""
    seen = []

    def watched(name):
        return lambda x, *contracted: seen.append((name, x.shape[-1], *contracted)) or x

    names = ("weight", "activation", "cached", "rotate_heads", "rotate_hidden")
    logits(parameters()[1], numerics=llama.Numerics(**{name: watched(name) for name in names}))
    c = CONFIG
    once = [
        *[("activation", size) for size in (c.hidden, c.head_dim, c.hidden, c.inner)],
        *[("cached", c.head_dim)] * 2,
        *[("rotate_heads", c.head_dim)] * 2,
        ("rotate_hidden", c.inner),
        *[("weight", c.head_dim, (0,))] * 3,
        ("weight", c.hidden, (0, 1)),
        *[("weight", c.inner, (0,))] * 2,
        ("weight", c.hidden, (0,)),
    ]
    assert sorted(seen) == sorted(once * c.layers)


def test_fused_calls_take_the_place_of_two():
    def both(x):
        return coarse(hadamard(x))

    of_two = llama.Numerics(activation=coarse, cached=coarse, rotate_heads=hadamard, rotate_hidden=hadamard)
    fused = dataclasses.replace(of_two, fused_keys=both, fused_hidden=both)
    params = parameters()[1]
    exact = np.asarray(logits(params, numerics=of_two))
    np.testing.assert_array_equal(logits(params, numerics=fused), exact)
    for field in "fused_keys", "fused_hidden":
        other = dataclasses.replace(fused, **{field: jnp.zeros_like})
        assert deviation(logits(params, numerics=other), exact) > 0.1


def test_llama_3_scales_low_frequencies():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    config = dataclasses.replace(CONFIG, head_dim=16, rope_scaling=tuple(sorted(scaling.items())))
    x = np.random.default_rng(2).standard_normal((1, 5, 1, 16)).astype(np.float32)
    positions = np.array([[0, 1, 7, 30, 100]])
    found = llama.rope(jnp.asarray(x), jnp.asarray(positions), config)
    exact = np.zeros(x.shape)
    kinds = set()
    for i in range(8):
        frequency = 100.0 ** (-i / 8)
        wavelength = 2 * math.pi / frequency
        if wavelength > 32 / 1.0:
            kinds.add("low")
            frequency /= 8.0
        elif wavelength > 32 / 4.0:
            kinds.add("between")
            smooth = (32 / wavelength - 1.0) / (4.0 - 1.0)
            frequency = (1 - smooth) * frequency / 8.0 + smooth * frequency
        else:
            kinds.add("high")
        for t, position in enumerate(positions[0]):
            turned = complex(x[0, t, 0, i], x[0, t, 0, i + 8]) * np.exp(1j * position * frequency)
            exact[0, t, 0, [i, i + 8]] = turned.real, turned.imag
    assert kinds == {"low", "between", "high"}
    np.testing.assert_allclose(found, exact, atol=2e-5)
