"""Writes checkpoints as Hugging Face has them: config.json, .safetensors files, and the index of several."""

import json

import decoder
import jax.numpy as jnp
from safetensors.numpy import save_file


def save(folder, described, params, *, shards):
    """Writes parameters, in their order, and a config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(described))
    if shards == 1:
        save_file(params, folder / "model.safetensors", {"format": "pt"})
        return
    names, places = list(params), {}
    for i in range(shards):
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({name: params[name] for name in part}, folder / shard, {"format": "pt"})
        places |= dict.fromkeys(part, shard)
    totals = {"total_parameters": 7, "total_size": sum(x.nbytes for x in params.values())}
    index = {"metadata": totals, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def save_llama(folder, sizes, params=None, *, shards=2, **changes):
    """Writes a Llama of the decoder's parameters, in bfloat16 by default; returns them."""
    described = {
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 100.0,
        "rope_scaling": None,
        "tie_word_embeddings": sizes.tied,
    }
    params = params or {name: x.astype(jnp.bfloat16) for name, x in decoder.parameters(sizes).items()}
    save(folder, {**described, **changes}, params, shards=shards)
    return params
