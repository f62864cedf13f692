"""The Flax models of google-tunix, rotated: their logits stay, and differ where something is left out."""

import dataclasses
import functools
import importlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_hadacore.rotations import OnlineHadamard, Plan, RotatedLinear, Rotation, check_invariance, plans, rotate

if importlib.util.find_spec("tunix") is None:
    pytest.skip("google-tunix is not installed: needs the extra 'models'", allow_module_level=True)

# tunix is written for JAX's usual configuration, and its imports warn of names that JAX is about to drop.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("x64_off", "usual_promotion")]

SIZES = {"num_layers": 2, "embed_dim": 48, "hidden_dim": 80, "num_heads": 4, "head_dim": 16, "num_kv_heads": 2}
DECODER = {**SIZES, "vocab_size": 96, "rope_theta": 10000, "norm_eps": 1e-5}
GEMMA = {**SIZES, "num_embed": 96, "sliding_window_size": 4, "param_dtype": jnp.float32}
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
# Each model: module, class, and its config beside the sizes. Heads are wider than embed_dim / num_heads.
MODELS = {
    "llama3": ("llama3", "Llama3", DECODER),
    "llama3, tied": ("llama3", "Llama3", {**DECODER, "weight_tying": True}),
    "qwen2": ("qwen2", "Qwen2", DECODER),
    "qwen2, tied": ("qwen2", "Qwen2", {**DECODER, "use_tied_embedding": True}),
    "qwen3": ("qwen3", "Qwen3", DECODER),
    "qwen3, tied": ("qwen3", "Qwen3", {**DECODER, "use_tied_embedding": True}),
    "qwen3, moe": ("qwen3", "Qwen3", {**DECODER, **MOE}),
    "gemma3": ("gemma3", "Gemma3", GEMMA),
    "gemma3, as many heads": ("gemma3", "Gemma3", {**GEMMA, "num_kv_heads": 4}),
    "gemma3, one kv head": ("gemma3", "Gemma3", {**GEMMA, "num_kv_heads": 1}),
}
DECODERS = [name for name in MODELS if "gemma" not in name]
GEMMAS = [name for name in MODELS if "gemma" in name]
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 7))

POSITIONS = np.tile(np.arange(7), (2, 1))
MASK = np.broadcast_to(np.tri(7, dtype=bool), (2, 7, 7))


@pytest.fixture
def usual_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def built(name):
    """A model with random parameters: norms and biases are not trivial."""
    from flax import nnx

    kind, cls, config = MODELS[name]
    module = importlib.import_module(f"tunix.models.{kind}.model")
    model = getattr(module, cls)(module.ModelConfig(**config), rngs=nnx.Rngs(0))
    generator = np.random.default_rng(1)

    def draw(path, x):
        path = jax.tree_util.keystr(path)
        values = generator.standard_normal(x.shape)
        if "norm" in path:
            values = 0.4 * values + (0 if kind == "gemma3" else 1)
        elif x.ndim > 1:
            values *= 0.15
        return jnp.asarray(values, x.dtype)

    graph, state = nnx.split(model)
    return graph, jax.tree_util.tree_map_with_path(draw, state)


def model_of(name):
    """A fresh model, its state and what computes its logits from a state."""
    from flax import nnx

    graph, state = built(name)
    return nnx.merge(graph, state), state, lambda state: logits(nnx.merge(graph, state))


def logits(model):
    return model(TOKENS, POSITIONS, None, MASK)[0]


def plan_of(name, **options):
    if "moe" in name:
        options["moe"] = True
    if "tied" in name:
        options.setdefault("tied", "untie")
    return getattr(plans, name.split(",")[0].replace("llama3", "llama"))(naming="tunix", **options)


def untied(name):
    """The name of the same model with a head of its own."""
    return name.removesuffix(", tied")


def deviation(before, after):
    with pytest.raises(AssertionError, match="may deviate"):
        check_invariance(lambda x: x, before, after)
    return float(jnp.max(jnp.abs(after - before)) / jnp.max(jnp.abs(before)))


@pytest.mark.parametrize("learn", [(), ("R1", "R2")], ids=["random", "learned"])
@pytest.mark.parametrize("name", DECODERS)
def test_logits_stay(name, learn):
    _, state, apply = model_of(name)
    plan = plan_of(name)
    rotated = rotate(state, plan, plan.init(jax.random.key(0), state, learn=learn))
    _, _, apply_untied = model_of(untied(name))
    check_invariance(lambda f: f(), lambda: apply(state), lambda: apply_untied(rotated))
    assert not np.allclose(rotated["embedder"]["input_embedding"][...], state["embedder"]["input_embedding"][...])
    if "tied" not in name:
        assert jax.tree.structure(rotated) == jax.tree.structure(state)
