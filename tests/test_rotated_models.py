"""The Flax models of google-tunix, rotated: their logits stay, and differ where something is left out."""

import dataclasses
import functools
import importlib
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder import Config, parameters
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from jax_hadacore import _cli
from jax_hadacore.rotations import Plan, Rotation, check_invariance, plans, rotate

if importlib.util.find_spec("tunix") is None:
    pytest.skip("google-tunix is not installed: needs the extra 'models'", allow_module_level=True)

from flax import nnx

from jax_hadacore.rotations import OnlineHadamard, RotatedLinear

# tunix is written for JAX's usual configuration, and its imports warn of names that JAX is about to drop.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("x64_off", "usual_promotion")]

SIZES = {"num_layers": 2, "embed_dim": 48, "hidden_dim": 80, "num_heads": 4, "head_dim": 16, "num_kv_heads": 2}
DECODER = {**SIZES, "vocab_size": 96, "rope_theta": 10000, "norm_eps": 1e-5}
GEMMA = {**SIZES, "num_embed": 96, "sliding_window_size": 4, "param_dtype": jnp.float32}
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
# Each model: its module, class and config. Heads are wider than embed_dim / num_heads.
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


@functools.cache
def built(name):
    """A model with random parameters: norms and biases are not trivial."""
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
    """A model's state, and what computes its logits from one."""
    graph, state = built(name)
    return state, lambda state: logits(nnx.merge(graph, state))


def merged(name, state):
    """The model with a state, to change its layers."""
    return nnx.merge(built(name)[0], state)


def logits(model):
    return model(TOKENS, POSITIONS, None, MASK)[0]


def plan_of(name, **options):
    if "moe" in name:
        options["moe"] = True
    if "tied" in name:
        options.setdefault("tied", "untie")
    return getattr(plans, name.split(",")[0].replace("llama3", "llama"))(**{"naming": "tunix", **options})


def untied(name):
    """The name of the same model with a head of its own."""
    return name.removesuffix(", tied")


def same(before, after, **options):
    return check_invariance(lambda x: x, before, after, **options)


def assert_far(before, after):
    """The outputs differ by much more than what rounding does."""
    assert jnp.max(jnp.abs(after - before)) > 0.05 * jnp.max(jnp.abs(before))


@pytest.mark.parametrize("learn", [(), ("R1", "R2")], ids=["random", "learned"])
@pytest.mark.parametrize("name", DECODERS)
def test_logits_stay(name, learn):
    state, apply = model_of(name)
    plan = plan_of(name)
    rotated = rotate(state, plan, plan.init(jax.random.key(0), state, learn=learn))
    _, apply_untied = model_of(untied(name))
    same(apply(state), apply_untied(rotated))
    assert not np.allclose(rotated["embedder"]["input_embedding"][...], state["embedder"]["input_embedding"][...])
    if "tied" not in name:
        assert jax.tree.structure(rotated) == jax.tree.structure(state)


@pytest.mark.parametrize("name", MODELS)
def test_r2_alone(name):
    state, apply = model_of(name)
    plan = plan_of(name, rotations=["R2"])
    rotated = rotate(state, plan, plan.init(jax.random.key(0), state, learn=["R2"]))
    check_invariance(apply, state, rotated)
    changed = jax.tree.leaves(jax.tree.map(lambda a, b: a is not b, state, rotated))
    assert sum(changed) == (6 if "qwen2" in name else 4)


@pytest.mark.parametrize("name", DECODERS)
def test_without_fusing_logits_differ(name):
    state, apply = model_of(name)
    plan = plan_of(name)
    turns = plan.init(jax.random.key(0), state)
    unfused = rotate(state, Plan(plan.rotate, untie=plan.untie, keep=["**"]), turns)
    assert_far(apply(state), model_of(untied(name))[1](unfused))
    with pytest.raises(ValueError, match=r"norm/w' of shape .* is not in the plan"):
        dataclasses.replace(plan, fuse=()).folds(state)


@pytest.mark.parametrize("name", [name for name in DECODERS if "qwen3" in name])
def test_fusing_into_the_wrong_norm_convention_differs(name):
    state, apply = model_of(name)
    plan = plan_of(name)
    plan = dataclasses.replace(plan, fuse=[dataclasses.replace(fuse, offset=1.0) for fuse in plan.fuse])
    rotated = rotate(state, plan, plan.init(jax.random.key(0), state))
    assert_far(apply(state), model_of(untied(name))[1](rotated))


def test_a_tied_model_is_not_rotated_without_saying_how():
    state, _ = model_of("llama3, tied")
    with pytest.raises(ValueError, match="no array matches 'lm_head/w'"):
        plans.llama(naming="tunix").folds(state)


@pytest.mark.parametrize("name", [name for name in DECODERS if "tied" in name])
def test_tied_embeddings_stay_with_an_online_rotation(name):
    state, apply = model_of(name)
    plan = plan_of(name, tied="online")
    turns = plan.init(jax.random.key(0), state)
    rotated = rotate(state, plan, turns)
    model = merged(name, rotated)
    assert_far(apply(state), logits(model))
    lookup, turn = model.embedder.encode, OnlineHadamard(turns["R1"])
    model.final_norm = nnx.Sequential(OnlineHadamard(turns["R1"], transpose=True), model.final_norm)
    object.__setattr__(model.embedder, "encode", lambda tokens: turn(lookup(tokens)))
    same(apply(state), logits(model))


@pytest.mark.parametrize("name", [name for name in MODELS if "moe" not in name])
def test_r4_is_online(name):
    state, apply = model_of(name)
    plan = plan_of(name, rotations=["R2", "R4"])
    turns = plan.init(jax.random.key(0), state)
    model = merged(name, rotate(state, plan, turns))
    assert_far(apply(state), logits(model))
    for layer in model.layers:
        layer.mlp.down_proj = nnx.Sequential(OnlineHadamard(turns["R4"]), layer.mlp.down_proj)
    same(apply(state), logits(model))


@pytest.mark.parametrize("name", GEMMAS)
def test_post_norms_take_an_online_r1(name):
    state, apply = model_of(name)
    plan = plan_of(name, online_r1=True)
    turns = plan.init(jax.random.key(0), state)
    model = merged(name, rotate(state, plan, turns))
    assert_far(apply(state), logits(model))
    for layer in model.layers:
        layer.pre_attention_norm = nnx.Sequential(layer.pre_attention_norm, OnlineHadamard(turns["R1"]))
        layer.pre_ffw_norm = nnx.Sequential(layer.pre_ffw_norm, OnlineHadamard(turns["R1"]))
    same(apply(state), logits(model))
    with pytest.raises(ValueError, match="R1 cannot be folded"):
        plan_of(name, rotations=["R1"])


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_rotated_linear_layers_need_no_plan(name):
    state, apply = model_of(name)
    model = merged(name, state)
    for layer in model.layers:
        for kind in "gate_proj", "up_proj", "down_proj":
            linear = getattr(layer.mlp, kind)
            setattr(layer.mlp, kind, RotatedLinear(linear, Rotation(linear.in_features)))
    same(apply(state), logits(model))


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3"])
def test_bfloat16_loses_no_more_than_bfloat16_does(name):
    state, apply = model_of(name)
    plan = plan_of(name)
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)
    rotated = rotate(halves, plan, plan.init(jax.random.key(0), halves))
    assert {x.dtype for x in jax.tree.leaves(rotated)} == {jnp.dtype(jnp.bfloat16)}
    # The parameters are rounded, the arithmetic is float32: what differs is what the fold's rounding does.
    wide, wide_rotated = (jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in (halves, rotated))
    exact = apply(state)
    rounding = jnp.sqrt(jnp.mean((apply(wide) - exact) ** 2))
    folding = jnp.sqrt(jnp.mean((apply(wide_rotated) - apply(wide)) ** 2))
    assert folding < 2 * rounding


def test_updates_a_model_in_place():
    state, apply = model_of("qwen3")
    model = merged("qwen3", state)
    params = nnx.state(model, nnx.Param)
    plan = plans.qwen3(naming="tunix")
    nnx.update(model, rotate(params, plan, plan.init(jax.random.key(0), params)))
    same(apply(state), logits(model))


def test_pure_dicts_have_the_same_paths():
    state, _ = model_of("llama3")
    plan = plans.llama(naming="tunix")
    turns = plan.init(jax.random.key(0), state)
    plain = rotate(state.to_pure_dict(), plan, turns)
    jax.tree.map(np.testing.assert_array_equal, plain, rotate(state, plan, turns).to_pure_dict())


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3, moe", "gemma3"])
def test_sharded_models_stay_sharded(name, cpu_devices):
    state, apply = model_of(name)
    mesh = jax.sharding.Mesh(np.array(cpu_devices[:2]), ("tp",))

    def spread(x):
        # The last axis of kernels, as of o_proj, and all of vectors: what is rotated is split too.
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "tp")))

    sharded = jax.tree.map(spread, state)
    plan = plan_of(name)
    turns = plan.init(jax.random.key(0), state)
    rotated = rotate(sharded, plan, turns)
    for before, after in zip(jax.tree.leaves(sharded), jax.tree.leaves(rotated), strict=True):
        assert after.sharding == before.sharding
    same(apply(state), apply(jax.device_put(rotated, cpu_devices[0])))


CHECKPOINTS = {
    "llama3": Config(),
    "llama3, tied": Config(tied=True),
    "qwen2": Config(bias=True),
    "qwen3": Config(qk_norm=True),
    "qwen3, moe": Config(qk_norm=True, experts=4),
    "gemma3": Config(qk_norm=True, offset=1.0, post_norms=True, tied=True),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_by_the_names_of_hugging_face(name, tmp_path):
    """The model that google-tunix loads from a rotated checkpoint is the one that it loads from the checkpoint."""
    c = dataclasses.replace(CHECKPOINTS[name], vocab=96, hidden=48, inner=80, head_dim=16)
    params = {path: 0.5 * x if "norm" not in path else x for path, x in parameters(c).items()}
    plan = plan_of(name, naming="hf", head_dim=16)
    rotated = rotate(params, plan, plan.init(jax.random.key(0), params))
    before = loaded(name, stored(params, tmp_path / "original"))
    after = loaded(untied(name), stored(rotated, tmp_path / "rotated"))
    same(before, after)
    assert not np.allclose(
        params["model.layers.1.self_attn.v_proj.weight"], rotated["model.layers.1.self_attn.v_proj.weight"]
    )


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_that_the_command_rotates(name, tmp_path):
    """What google-tunix loads is unchanged; it reads every .safetensors file of the folder."""
    c = dataclasses.replace(CHECKPOINTS[name], vocab=96, hidden=48, inner=80, head_dim=16)
    params = {path: 0.5 * x if "norm" not in path else x for path, x in parameters(c).items()}
    original = stored(params, tmp_path / "original", shards=3)
    model = name.split(",")[0].replace("llama3", "llama")
    described = {
        "model_type": f"{model}_moe" if "moe" in name else model,
        "head_dim": 16,
        "tie_word_embeddings": c.tied,
    }
    (original / "config.json").write_text(json.dumps(described))
    assert _cli.main(["rotate", str(original), str(tmp_path / "rotated"), "--model", model]) == 0
    same(loaded(name, original), loaded(untied(name), tmp_path / "rotated"))


def stored(params, folder, shards=1):
    """Writes a checkpoint; returns its folder."""
    folder.mkdir()
    places = {
        path: f"model-{i % shards}.safetensors" if shards > 1 else "model.safetensors" for i, path in enumerate(params)
    }
    for shard in set(places.values()):
        save_file({path: np.asarray(params[path]) for path in params if places[path] == shard}, folder / shard)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def loaded(name, folder):
    """The logits of the model that google-tunix makes of a checkpoint."""
    kind, _, config = MODELS[name]
    loader = importlib.import_module(f"tunix.models.{kind}.{'params_safetensors' if kind == 'gemma3' else 'params'}")
    module = importlib.import_module(f"tunix.models.{kind}.model")
    model = loader.create_model_from_safe_tensors(str(folder), module.ModelConfig(**config), dtype=jnp.float32)
    return logits(model)
