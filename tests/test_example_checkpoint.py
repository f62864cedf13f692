"""Checkpoints of Hugging Face in the Llama of the examples: logits of the definition, devices, and every refusal."""

import dataclasses
import re

import checkpoints
import decoder
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts

pytest.importorskip("flax", reason="flax is not installed: needs the extra 'models'")

from jax_hadacore import _cli

checkpoint = scripts.load("checkpoint")

pytestmark = pytest.mark.usefixtures("x64_off", "usual_promotion")

SIZES = decoder.Config(vocab=64, inner=40, heads=8, kv_heads=4)
LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}


@pytest.fixture
def load(tmp_path, cpu_devices):
    """Loads the test's checkpoint, in float32."""

    def load(folder=tmp_path, devices=1):
        return checkpoint.load(checkpoint.Checkpoint(folder), dtype="float32", devices=cpu_devices[:devices])

    return load


def tokens(*shape):
    return np.random.default_rng(1).integers(SIZES.vocab, size=shape)


def assert_close(logits, exact):
    np.testing.assert_allclose(logits, exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_definition(tmp_path, load, tied, shards):
    sizes = dataclasses.replace(SIZES, tied=tied)
    params = checkpoints.save_llama(tmp_path, sizes, shards=shards)
    prompts, model = tokens(2, 30), load()
    exact = np.stack([decoder.logits(params, sizes, prompt) for prompt in prompts])
    with jax.default_matmul_precision("highest"):
        assert_close(model(prompts), exact)
        assert_close(model(prompts, at=jnp.array([29, 11]))[:, 0], exact[[0, 1], [29, 11]])


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": LLAMA3},
        {"rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 100.0}, "rope_theta": None},
    ],
)
def test_the_position_embedding_of_llama_3(tmp_path, load, monkeypatch, rope):
    params = checkpoints.save_llama(tmp_path, SIZES, **rope)
    monkeypatch.setattr(decoder, "_rope", rope_of_llama_3)
    prompt = tokens(80)
    with jax.default_matmul_precision("highest"):
        assert_close(load()(prompt[None])[0], decoder.logits(params, SIZES, prompt))


def rope_of_llama_3(x):
    """By wavelengths: long ones are multiplied by the factor, short ones kept, those between interpolated."""
    half = x.shape[-1] // 2
    context, low, high, factor = (
        LLAMA3[name] for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "factor")
    )
    usual = 100.0 ** (-np.arange(half) / half)
    wavelength = 2 * np.pi / usual
    smooth = (context / wavelength - low) / (high - low)
    short, long = wavelength < context / high, wavelength > context / low
    assert [short.sum(), long.sum()] == [1, 1]
    frequency = np.select([short, long], [usual, usual / factor], (1 - smooth) * usual / factor + smooth * usual)
    y = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * np.arange(len(x))[:, None, None] * frequency)
    return np.concatenate([y.real, y.imag], -1)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_devices_share_the_model(tmp_path, load, kv_heads):
    checkpoints.save_llama(tmp_path, dataclasses.replace(SIZES, kv_heads=kv_heads))
    one, four = load(), load(devices=4)
    layer = four.layers[1]
    arrays = {
        "embedding": four.embedder.input_embedding[...],
        "norm": four.final_norm.w[...],
        "q": layer.attn.q_proj.w[...],
        "v": layer.attn.v_proj.w[...],
        "o": layer.attn.o_proj.w[...],
        "up": layer.mlp.up_proj.kernel[...],
        "down": layer.mlp.down_proj.kernel[...],
        "head": four.lm_head.w[...],
    }
    parts = {name: array.size // array.addressable_shards[0].data.size for name, array in arrays.items()}
    heads = 4 if kv_heads == 4 else 1
    assert parts == {"embedding": 4, "norm": 1, "q": heads, "v": heads, "o": heads, "up": 4, "down": 4, "head": 4}
    assert_close(four(tokens(2, 30)), np.asarray(one(tokens(2, 30))))


def test_a_rotated_checkpoint_is_one_too(tmp_path, load):
    checkpoints.save_llama(tmp_path / "in", SIZES, decoder.parameters(SIZES))
    assert _cli.main(["rotate", str(tmp_path / "in"), str(tmp_path / "out"), "--model", "llama"]) == 0
    before, after = (load(tmp_path / folder) for folder in ("in", "out"))
    assert not np.allclose(before.layers[0].attn.q_proj.w[...], after.layers[0].attn.q_proj.w[...], atol=0.1)
    assert_close(after(tokens(1, 30)), np.asarray(before(tokens(1, 30))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3_text"}, "model_type must be 'llama', got 'gemma3_text'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config must be None, got \{'bits': 4\}"),
        ({"hidden_size": None}, "hidden_size must be a positive whole number, got None"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads, got 8 and 3"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling must be null, or of rope_type llama3 with factor, "),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling must be null, or of rope_type llama3 with factor, "),
        ({"jax_hadacore": {"online": ["R4"]}}, "its model must apply R4"),
        ({"intermediate_size": 32}, r"must have the shape \[24, 32\], .*; got \[24, 40\] and BF16"),
        ({"num_hidden_layers": 1}, r"has, unlike the model here, model.layers.1.input_layernorm.weight and 8 more"),
    ],
)
def test_other_configurations_are_refused(tmp_path, load, changes, message):
    checkpoints.save_llama(tmp_path, SIZES, **changes)
    with pytest.raises(checkpoint.CheckpointError, match=message):
        load()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.norm.weight", None, "the checkpoint lacks model.norm.weight$"),
        ("model.layers.0.self_attn.q_proj.bias", np.zeros(64, np.float32), "has, unlike the model here, .*q_proj.bias"),
        ("model.norm.weight", np.zeros(24, np.int8), r"F32; got \[24\] and I8"),
    ],
)
def test_other_tensors_are_refused(tmp_path, load, name, value, message):
    params = {**decoder.parameters(SIZES), name: value}
    checkpoints.save_llama(tmp_path, SIZES, {name: value for name, value in params.items() if value is not None})
    with pytest.raises(checkpoint.CheckpointError, match=message):
        load()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "model-00002-of-00002.safetensors"])
@pytest.mark.parametrize("content", [None, b"{}", b'{"weight_map'])
def test_other_files_are_refused(tmp_path, load, file, content):
    checkpoints.save_llama(tmp_path, SIZES)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match=f"^{re.escape(str(tmp_path))}.*config.json"):
        load()
