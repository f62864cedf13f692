"""Rotates checkpoints by `jax-hadacore rotate`: writes them, runs the command, reads and compares what it wrote."""

import json
import re
import subprocess
import sys

import checkpoints
import decoder
import numpy as np
from safetensors import safe_open

from jax_hadacore import _cli

STATE = "jax_hadacore.unfinished"
PROGRAM = "import sys; from jax_hadacore._cli import main; sys.exit(main(sys.argv[1:]))"
TOKENS = np.array([3, 1, 4, 1, 5, 9, 2, 6])


def write(folder, model_type, config, *, shards=3, params=None, dtype=np.float32):
    """Writes a checkpoint as Hugging Face has them; returns its parameters."""
    params = params or {name: x.astype(dtype) for name, x in decoder.parameters(config).items()}
    described = {
        "architectures": ["ForCausalLM"],
        "model_type": model_type,
        "hidden_size": config.hidden,
        "num_attention_heads": config.heads,
        "head_dim": config.head_dim,
        "tie_word_embeddings": config.tied,
    }
    checkpoints.save(folder, described, params, shards=shards)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "tokenizer.model").write_bytes(bytes(range(256)))
    return params


def load(folder):
    """The parameters, as the loaders of Hugging Face find them: by the index, or in one file."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = json.loads(index.read_text())["weight_map"]
    else:
        with safe_open(folder / "model.safetensors", "numpy") as file:
            places = dict.fromkeys(file.keys(), "model.safetensors")
    params = {}
    for shard in set(places.values()):
        with safe_open(folder / shard, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            assert {name for name in places if places[name] == shard} == set(file.keys())
            params |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
    if json.loads((folder / "config.json").read_text())["tie_word_embeddings"]:
        params.pop("lm_head.weight", None)
    return params


def deviation(config, params, rotated, online=None):
    before, after = decoder.logits(params, config, TOKENS), decoder.logits(rotated, config, TOKENS, online)
    return np.max(np.abs(after - before)) / np.max(np.abs(before))


def run(source, out, *options, model="llama"):
    return _cli.main(["rotate", str(source), str(out), "--model", model, *options])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(source, out, *options):
    command = [sys.executable, "-P", "-c", PROGRAM, "rotate", source, out, "--model", "llama", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_refused(capsys, source, out, message, *options, model="llama"):
    """One line that says why, exit status 2, and no file that was not there."""
    before = [contents(folder) if folder.is_dir() else None for folder in (source, out)]
    capsys.readouterr()  # what was printed before
    assert run(source, out, *options, model=model) == 2
    printed, error = capsys.readouterr()
    assert printed == ""
    assert re.fullmatch(rf"jax-hadacore rotate: .*{message}.*\n", error), error
    assert [contents(folder) if folder.is_dir() else None for folder in (source, out)] == before


def corrupt(path, header=None, *, cut=0, length=None):
    """Gives a .safetensors file another header, another length of it, or takes its last bytes."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + size]
    if header is not None:
        found = json.loads(text)
        text = header if isinstance(header, bytes) else json.dumps(header(found) or found).encode()
    size = len(text) if length is None else length
    path.write_bytes(
        (size.to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :])[: -cut or None]
    )
