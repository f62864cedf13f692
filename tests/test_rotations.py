"""Rotations folded into a decoder by its names in Hugging Face's checkpoints leave its logits as they are."""

import dataclasses

import decoder
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder import Config, Online

from jax_hadacore import rotations
from jax_hadacore.rotations import Axis, Plan, Rotation, plans, rotate

TOKENS = np.array([3, 1, 4, 1, 5, 9, 2, 6, 35])
CONFIGS = {
    "llama": Config(),
    "llama, as many heads": Config(kv_heads=4),
    "llama, one kv head": Config(kv_heads=1, head_dim=12),
    "qwen2": Config(bias=True),
    "qwen3": Config(qk_norm=True),
    "qwen3, moe": Config(qk_norm=True, experts=4),
    "gemma3": Config(qk_norm=True, offset=1.0, post_norms=True, tied=True),
}
FULL = [name for name in CONFIGS if name != "gemma3"]


def plan_of(name, config, **options):
    if config.experts:
        options["moe"] = True
    return getattr(plans, name.split(",")[0])(naming="hf", head_dim=config.head_dim, **options)


def folded(name, config, *, learn=(), key=0, block=None, **options):
    """The parameters, the rotated ones, and the rotations."""
    params = jax.tree.map(jnp.asarray, decoder.parameters(config))
    plan = plan_of(name, config, **options)
    turns = plan.init(jax.random.key(key), params, learn=learn, block=block)
    turns = {name: with_learned(turn) for name, turn in turns.items()}
    return params, rotate(params, plan, turns), turns


def with_learned(rotation):
    """A rotation whose q is orthogonal and random in place of the identity."""
    if rotation.q is None:
        return rotation
    q = np.linalg.qr(np.random.default_rng(7).standard_normal(rotation.q.shape))[0]
    return dataclasses.replace(rotation, q=jnp.asarray(q, jnp.float32))


def turned(rotation):
    p = decoder.matrix(rotation)
    return lambda x: x @ p


def deviation(config, params, rotated, online=None):
    before = decoder.logits(params, config, TOKENS)
    after = decoder.logits(rotated, config, TOKENS, online)
    return np.max(np.abs(after - before)) / np.max(np.abs(before))


@pytest.mark.parametrize("learn", [(), ("R1", "R2")], ids=["random", "learned"])
@pytest.mark.parametrize("chosen", [("R1",), ("R2",), ("R1", "R2")], ids="+".join)
@pytest.mark.parametrize("name", FULL)
def test_logits_stay(name, chosen, learn):
    config = CONFIGS[name]
    params, rotated, _ = folded(name, config, rotations=chosen, learn=set(learn) & set(chosen))
    assert deviation(config, params, rotated) < 5e-6
    changed = {path for path in params if not np.array_equal(params[path], rotated[path])}
    assert any("o_proj" in path for path in changed)
    assert ("model.embed_tokens.weight" in changed) == ("R1" in chosen)
    assert {path: x.dtype for path, x in rotated.items()} == {path: x.dtype for path, x in params.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_r3_and_r4_are_online(name):
    config = CONFIGS[name]
    chosen = ["R2", "R4"] if name == "gemma3" else ["R1", "R2", "R4"]
    params, rotated, turns = folded(name, config, rotations=chosen)
    assert turns["R4"].signs is None  # the model's own `hadamard` is enough
    online = Online(hidden=turned(turns["R4"]), queries_keys=turned(Rotation(config.head_dim)))
    assert deviation(config, params, rotated, online) < 5e-6
    assert deviation(config, params, rotated) > 0.05


@pytest.mark.parametrize("name", FULL)
def test_without_fusing_logits_differ(name):
    config = CONFIGS[name]
    params = decoder.parameters(config)
    plan = plan_of(name, config)
    turns = plan.init(jax.random.key(0), params)
    with pytest.raises(ValueError, match=r"norm.weight' of shape \(24,\) is not in the plan.*fuse it"):
        rotate(params, Plan(plan.rotate, keep=["lm_head.**"]), turns)
    unfused = rotate(params, Plan(plan.rotate, keep=["**"]), turns)
    assert deviation(config, params, unfused) > 0.05


def test_fusing_alone():
    config = CONFIGS["qwen2"]
    params = decoder.parameters(config)
    plan = plan_of("qwen2", config)
    fused = rotations.fuse_norms(params, plan)
    assert deviation(config, params, fused) < 1e-6
    for path, x in fused.items():
        if "norm" in path:
            np.testing.assert_array_equal(x, 1)
    # Rotating what is fused is rotating.
    turns = plan.init(jax.random.key(0), params)
    again, once = rotate(fused, plan, turns), rotate(params, plan, turns)
    for path in params:
        np.testing.assert_allclose(again[path], once[path], atol=1e-5)


def test_each_array_is_the_product_of_matrices():
    config = CONFIGS["qwen2"]
    params, rotated, turns = folded("qwen2", config, learn=["R1", "R2"], rotations=["R1", "R2", "R4"])
    p1, p4 = (decoder.matrix(turns[name]) for name in ("R1", "R4"))
    double = {path: np.asarray(x, np.float64) for path, x in params.items()}
    expected = {
        "model.embed_tokens.weight": double["model.embed_tokens.weight"] @ p1,
        "lm_head.weight": double["lm_head.weight"] * double["model.norm.weight"] @ p1,
        "model.norm.weight": np.ones(config.hidden),
    }
    for i in range(config.layers):
        layer = {path.removeprefix(f"model.layers.{i}."): x for path, x in double.items() if f"layers.{i}." in path}
        before, middle = layer["input_layernorm.weight"], layer["post_attention_layernorm.weight"]
        p2 = decoder.matrix(turns["R2"][i])
        per_kv, per_head = (np.kron(np.eye(heads), p2) for heads in (config.kv_heads, config.heads))
        new = {
            "input_layernorm.weight": np.ones(config.hidden),
            "post_attention_layernorm.weight": np.ones(config.hidden),
            "self_attn.q_proj.weight": layer["self_attn.q_proj.weight"] * before @ p1,
            "self_attn.k_proj.weight": layer["self_attn.k_proj.weight"] * before @ p1,
            "self_attn.v_proj.weight": per_kv.T @ (layer["self_attn.v_proj.weight"] * before @ p1),
            "self_attn.q_proj.bias": layer["self_attn.q_proj.bias"],
            "self_attn.k_proj.bias": layer["self_attn.k_proj.bias"],
            "self_attn.v_proj.bias": layer["self_attn.v_proj.bias"] @ per_kv,
            "self_attn.o_proj.weight": p1.T @ layer["self_attn.o_proj.weight"] @ per_head,
            "mlp.gate_proj.weight": layer["mlp.gate_proj.weight"] * middle @ p1,
            "mlp.up_proj.weight": layer["mlp.up_proj.weight"] * middle @ p1,
            "mlp.down_proj.weight": p1.T @ layer["mlp.down_proj.weight"] @ p4,
        }
        expected |= {f"model.layers.{i}.{path}": x for path, x in new.items()}
    assert rotated.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_allclose(rotated[path], x, atol=2e-6, err_msg=path)


@pytest.mark.parametrize("block", [{"R1": 4}, {"R1": 12, "R2": 4}], ids=str)
@pytest.mark.parametrize("learn", [(), ("R1", "R2")], ids=["random", "learned"])
def test_blocks(block, learn):
    config = CONFIGS["llama"]
    params, rotated, turns = folded("llama", config, block=block, learn=learn)
    assert turns["R1"].block == block["R1"]
    assert deviation(config, params, rotated) < 5e-6


@pytest.mark.parametrize("name", FULL)
def test_tied_embeddings_are_untied(name):
    config = dataclasses.replace(CONFIGS[name], tied=True)
    params, rotated, _ = folded(name, config, tied="untie")
    assert rotated.keys() - params.keys() == {"lm_head.weight"}
    assert deviation(config, params, rotated) < 5e-6


@pytest.mark.parametrize("name", FULL)
def test_tied_embeddings_stay_with_an_online_rotation(name):
    config = dataclasses.replace(CONFIGS[name], tied=True)
    params, rotated, turns = folded(name, config, tied="online")
    p = decoder.matrix(turns["R1"])
    online = Online(embedded=lambda x: x @ p, before_final_norm=lambda x: x @ p.T)
    assert deviation(config, params, rotated, online) < 5e-6
    assert deviation(config, params, rotated) > 0.05
    assert rotated["model.embed_tokens.weight"] is params["model.embed_tokens.weight"]


def test_tied_embeddings_without_saying_so():
    config = Config(tied=True)
    params = decoder.parameters(config)
    with pytest.raises(ValueError, match=r"no array matches 'lm_head.weight'"):
        folded("llama", config)
    params["lm_head.weight"] = params["model.embed_tokens.weight"]
    with pytest.raises(ValueError, match=r"'lm_head.weight' and 'model.embed_tokens.weight' are one array.*tied"):
        plan_of("llama", config).folds(params)
    with pytest.raises(ValueError, match=r"'lm_head\.weight' is in the tree: it is not tied"):
        plan_of("llama", config, tied="untie").folds(params)


def test_post_norms_refuse_a_folded_r1_and_take_an_online_one():
    config = CONFIGS["gemma3"]
    with pytest.raises(ValueError, match=r"R1 cannot be folded.*post_attention_norm.*online_r1"):
        plan_of("gemma3", config, rotations=["R1"])
    params, rotated, turns = folded("gemma3", config, online_r1=True)
    assert deviation(config, params, rotated, Online(normed=turned(turns["R1"]))) < 5e-6
    assert deviation(config, params, rotated) > 0.05


def test_norms_of_one_plus_w():
    # Gemma's norms, in a decoder without its post-norms.
    config = dataclasses.replace(CONFIGS["gemma3"], post_norms=False, tied=False)
    plan = plan_of("qwen3", config)
    plan = dataclasses.replace(plan, fuse=tuple(dataclasses.replace(fuse, offset=1.0) for fuse in plan.fuse))
    params = decoder.parameters(config)
    rotated = rotate(params, plan, plan.init(jax.random.key(0), params))
    np.testing.assert_array_equal(rotated["model.norm.weight"], 0)
    assert deviation(config, params, rotated) < 5e-6


def test_one_array_at_a_time():
    config = dataclasses.replace(CONFIGS["qwen3, moe"], tied=True, layers=11)
    params = decoder.parameters(config)
    plan = plan_of("qwen3, moe", config, tied="untie")
    structs = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in params.items()}
    folds = plan.folds(structs)
    turns = plan.init(jax.random.key(0), structs)
    assert folds["lm_head.weight"].reads == ("model.embed_tokens.weight", "model.norm.weight")
    assert folds["model.layers.10.self_attn.v_proj.weight"].rotations == (("R1", None), ("R2", 10))
    whole = rotate(params, plan, turns)
    assert whole.keys() == params.keys() | folds.keys()
    for path, x in whole.items():
        if path in folds:
            read = {name: params[name] for name in folds[path].reads}
            np.testing.assert_array_equal(folds[path](read, turns), x)
        else:
            assert x is params[path]
    rows = {"model.embed_tokens.weight": params["model.embed_tokens.weight"][5:9]}
    embedding = "model.embed_tokens.weight"
    np.testing.assert_array_equal(folds[embedding](rows, turns), whole[embedding][5:9])


def test_scanned_layers():
    """MaxText's layout: the axis of the layers is the second one of a kernel and of a norm."""
    config = Config(layers=3)
    flat = decoder.parameters(config)
    c, d = config, config.head_dim

    def stacked(name, shape):
        found = [flat[f"model.layers.{i}.{name}.weight"] for i in range(c.layers)]
        return np.stack([x.T.reshape(shape) for x in found], axis=1)

    params = {
        "embed": flat["model.embed_tokens.weight"],
        "head": flat["lm_head.weight"].T,
        "norm": flat["model.norm.weight"],
        "layers": {
            "norm1": stacked("input_layernorm", (c.hidden,)),
            "norm2": stacked("post_attention_layernorm", (c.hidden,)).T,
            "q": stacked("self_attn.q_proj", (c.hidden, c.heads, d)),
            "k": stacked("self_attn.k_proj", (c.hidden, c.kv_heads, d)),
            "v": stacked("self_attn.v_proj", (c.hidden, c.kv_heads, d)),
            "o": stacked("self_attn.o_proj", (c.heads, d, c.hidden)),
            "gate": stacked("mlp.gate_proj", (c.hidden, c.inner)),
            "up": stacked("mlp.up_proj", (c.hidden, c.inner)),
            "down": stacked("mlp.down_proj", (c.inner, c.hidden)),
        },
    }
    reads = [Axis("layers/(q|k|v)", 0, layers=1)]
    reads_mlp = [Axis("layers/(gate|up)", 0, layers=1)]
    plan = Plan(
        {
            "R1": ["embed@1", "head@0", *reads, *reads_mlp, Axis("layers/o", -1, layers=1), "layers/down@2"],
            "R2": rotations.Axes([Axis("layers/v", 3, layers=1), Axis("layers/o", 2, layers=1)], per_layer=True),
        },
        fuse=[
            rotations.Fuse(Axis("layers/norm1", 0, layers=1), reads),
            rotations.Fuse(Axis("layers/norm2", 1, layers=0), reads_mlp),
            rotations.Fuse("norm", ["head@0"]),
        ],
    )
    turns = plan.init(jax.random.key(0), params, learn=["R2"])
    assert turns["R2"].signs.shape == (3, d)
    rotated = rotate(params, plan, {"R1": turns["R1"], "R2": with_learned(turns["R2"])})
    names = {
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj", "norm1": "input_layernorm",
    }  # fmt: skip
    back = {"model.embed_tokens.weight": rotated["embed"], "lm_head.weight": rotated["head"].T}
    back["model.norm.weight"] = rotated["norm"]
    for i in range(c.layers):
        for short, name in names.items():
            original = flat[f"model.layers.{i}.{name}.weight"]
            x = np.asarray(rotated["layers"][short])[:, i]
            back[f"model.layers.{i}.{name}.weight"] = x.reshape(original.shape[::-1]).T
        back[f"model.layers.{i}.post_attention_layernorm.weight"] = rotated["layers"]["norm2"][i]
    assert deviation(config, flat, back) < 5e-6
