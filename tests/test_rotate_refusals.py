"""What `jax-hadacore rotate` refuses: files that are not whole, other checkpoints, folders that cannot be written."""

import json
import re
import shutil
import subprocess
import sys

import decoder
import jax.numpy as jnp
import numpy as np
import pytest
from decoder import Config
from rotating import PROGRAM, STATE, assert_refused, corrupt, run, write
from safetensors.numpy import save_file

from jax_hadacore.rotations import _checkpoint

pytestmark = pytest.mark.usefixtures("x64_off", "usual_promotion")

NORM = "model.norm.weight"
# Each case: what is done to the header of a single file, and what the error says.
HEADERS = {
    "not JSON": (b"{]", "Expecting"),
    "not text": (b"\xff\xff", "codec"),
    "deep": (b"[" * 100_000, "recursion"),
    "a list": (b"[]", "must be an object, got list"),
    "no shape": (lambda h: h[NORM].pop("shape"), f"'{NORM}' must have dtype, shape and data_offsets, got"),
    "metadata": (lambda h: h.update(__metadata__={"format": 1}), "__metadata__ must be strings"),
    "metadata list": (lambda h: h.update(__metadata__=["pt"]), "__metadata__ must be strings"),
    "dtype": (
        lambda h: h[NORM].update(dtype="F4"),
        r"'model.norm.weight' must have one of the dtypes F64, .*, got 'F4'",
    ),
    "dtype list": (lambda h: h[NORM].update(dtype=[]), "must have one of the dtypes"),
    "offsets": (lambda h: h[NORM].update(data_offsets=[0, 4]), "must lie at bytes"),
    "negative": (lambda h: h[NORM].update(shape=[-24]), "a shape and offsets of whole numbers"),
    "fraction": (lambda h: h[NORM].update(shape=[24.0]), "a shape and offsets of whole numbers"),
    "three offsets": (lambda h: h[NORM].update(data_offsets=[0, 1, 2]), "must have dtype, shape and data_offsets"),
    "larger": (lambda h: h[NORM].update(shape=[25]), r"'model.norm.weight', F32 of shape \[25\], must lie at bytes"),
    "huge": (lambda h: h[NORM].update(shape=[1 << 62, 1 << 62]), "must lie at bytes"),
    "hole": (lambda h: h.pop("model.layers.0.mlp.up_proj.weight"), "must lie at bytes"),
    "unlisted data": (lambda h: h.pop(NORM), r"the tensors have \d+ bytes, and the file has \d+ for them"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_are_checked(tmp_path, capsys, case):
    write(tmp_path / "in", "llama", Config(), shards=1)
    change, message = HEADERS[case]

    def header(found):
        change(found)
        return found

    corrupt(tmp_path / "in" / "model.safetensors", change if isinstance(change, bytes) else header)
    pattern = rf"in/model\.safetensors: not a whole \.safetensors file: .*{message}"
    assert_refused(capsys, tmp_path / "in", tmp_path / "out", pattern)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cut": 1}, r"the tensors have \d+ bytes, and the file has \d+ for them"),
        ({"cut": 10_000}, "the tensors have"),
        ({"length": 1}, r"a header of 1 bytes, in a file of \d+"),
        ({"length": 100_000_001}, "a header of 100000001 bytes"),
        ({"length": 1 << 63}, "a header of 9223372036854775808 bytes"),
    ],
    ids=str,
)
def test_truncated_files(tmp_path, capsys, change, message):
    write(tmp_path / "in", "llama", Config())
    corrupt(tmp_path / "in" / "model-00002-of-00003.safetensors", **change)
    pattern = rf"in/model-00002-of-00003\.safetensors: not a whole \.safetensors file: {message}"
    assert_refused(capsys, tmp_path / "in", tmp_path / "out", pattern)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04" * 50, b"\x80\x02}q\x00."], ids=["empty", "zip", "pickle"])
def test_foreign_files(tmp_path, capsys, data):
    write(tmp_path / "in", "llama", Config(), shards=1)
    (tmp_path / "in" / "model.safetensors").write_bytes(data)
    assert_refused(
        capsys, tmp_path / "in", tmp_path / "out", r"model\.safetensors: not a whole .* a header of \d+ bytes"
    )


def edited(folder, file, **values):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def placed(folder, name, shard):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = shard
    path.write_text(json.dumps(index))


def resaved(folder, **changes):
    """A single file with other tensors: each is given, or None for one that is taken away."""
    params = decoder.parameters(Config()) | changes
    save_file({name: x for name, x in params.items() if x is not None}, folder / "model.safetensors")


INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"
V = "model.layers.1.self_attn.v_proj.weight"
# Each case: what is done to a checkpoint, and what the error says.
CHECKPOINTS = {
    "absent": (shutil.rmtree, "in: no such folder"),
    "no config": (lambda f: (f / "config.json").unlink(), r"in/config\.json: cannot be read: No such file"),
    "config": (lambda f: (f / "config.json").write_text("{"), r"in/config\.json: not a JSON file: Expecting"),
    "config list": (lambda f: (f / "config.json").write_text("[]"), r"in/config\.json: must hold an object, got list"),
    "no index": (lambda f: (f / INDEX).unlink(), r"in: neither model\.safetensors nor .*index\.json is there\n?$"),
    "index": (lambda f: edited(f, INDEX, weight_map=[1]), "must have objects weight_map, of strings, and metadata"),
    "metadata": (lambda f: edited(f, INDEX, metadata=[1]), "must have objects weight_map, of strings, and metadata"),
    "index out of the folder": (
        lambda f: placed(f, V, "../model.safetensors"),
        r"shards must be \.safetensors files beside it, got '\.\./model\.safetensors'",
    ),
    "index of pickles": (lambda f: placed(f, V, "pytorch_model.bin"), "beside it, got 'pytorch_model.bin'"),
    "missing shard": (lambda f: (f / SECOND).unlink(), rf"in/{SECOND}: cannot be read: No such file or directory"),
    "unlisted tensor": (
        lambda f: edited(f, INDEX, weight_map={"x": SECOND}),
        rf"in/{SECOND}: has the tensor 'model\..*', which {INDEX} places in no shard",
    ),
    "missing tensor": (lambda f: placed(f, "x", SECOND), rf"in/{SECOND}: must have the tensor 'x', says {INDEX}"),
    "model_type": (
        lambda f: edited(f, "config.json", model_type="qwen3_moe"),
        r"for --model llama, model_type must be llama or mistral, got 'qwen3_moe'; use --model qwen3\n?$",
    ),
    "unknown model_type": (
        lambda f: edited(f, "config.json", model_type="gemma"),
        r"config\.json: for --model llama, .* got 'gemma'\n?$",
    ),
    "rotated": (lambda f: edited(f, "config.json", jax_hadacore={}), "rotated already: it has the key 'jax_hadacore'"),
    "quantised": (
        lambda f: edited(f, "config.json", quantization_config={"bits": 4}),
        "is quantised, see quantization",
    ),
    "no head_dim": (
        lambda f: edited(f, "config.json", head_dim=None, hidden_size="24"),
        "must have head_dim, or hidden_size and num_attention_heads, got None, '24' and 4",
    ),
    "wrong head_dim": (
        lambda f: edited(f, "config.json", head_dim=7),
        r"in: does not fit --model llama: Plan: R2 has size 7; axis 0 of .* must have a multiple of it, got 16",
    ),
    "no head": (lambda f: resaved(f, **{"lm_head.weight": None}), "Plan: no array matches 'lm_head.weight'"),
    "bias": (
        lambda f: resaved(f, **{V.replace("weight", "bias"): np.ones(16, np.float32)}),
        r"does not fit --model llama: Plan: '.*v_proj.bias' of shape \(16,\) is not in the plan",
    ),
    "name": (
        lambda f: resaved(f, **{"model.vision.weight": np.ones((2, 2), np.float32)}),
        "'model.vision.weight' of sh",
    ),
    "shape": (lambda f: resaved(f, **{V: np.ones((16, 25), np.float32)}), "Plan: the norm .* does not fit axis 1 of"),
    "fp8": (
        lambda f: resaved(f, **{V: np.ones((16, 24), jnp.float8_e4m3fn)}),
        rf"'{V}' has dtype float8_e4m3fn; it must be float16, .* Rotate weights before they are quantised",
    ),
    "int8": (lambda f: resaved(f, **{V: np.ones((16, 24), np.int8)}), "has dtype int8; it must be float16"),
    "float64": (lambda f: resaved(f, **{V: np.ones((16, 24))}), "has dtype float64, which needs jax_enable_x64"),
    "length": (
        lambda f: resaved(
            f, **{n: np.ones((22, 22)[: x.ndim], np.float32) for n, x in decoder.parameters(Config()).items()}
        ),
        "",
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints_that_cannot_be_rotated(tmp_path, capsys, case):
    write(tmp_path / "in", "llama", Config())
    change, message = CHECKPOINTS[case]
    change(tmp_path / "in")
    assert_refused(capsys, tmp_path / "in", tmp_path / "out", message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-00001-of-00002.pt", "consolidated.00.pth"])
def test_pickles_are_not_read(tmp_path, capsys, name):
    write(tmp_path / "in", "llama", Config(), shards=1)
    (tmp_path / "in" / "model.safetensors").rename(tmp_path / "in" / name)
    message = rf"in: neither .* is there; {name} may hold code, and is not read: convert it to safetensors"
    assert_refused(capsys, tmp_path / "in", tmp_path / "out", message)


def test_lengths_without_a_matrix(tmp_path, capsys):
    write(tmp_path / "in", "llama", Config(inner=22))
    assert_refused(capsys, tmp_path / "in", tmp_path / "out", r"R4 needs another block, .*: .* 22 = 11 \* 2.*", "--r4")
    assert run(tmp_path / "in", tmp_path / "out") == 0


def test_folders_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    source = tmp_path / "in"
    write(source, "llama", Config())
    assert_refused(capsys, source, source, "in: must not be .*in or in it")
    assert_refused(capsys, source, source / "out", "in/out: must not be .*in or in it")
    (tmp_path / "link").symlink_to(source)
    assert_refused(capsys, source, tmp_path / "link" / "out", "link/out: must not be")
    file = tmp_path / "file"
    file.write_text("mine")
    assert_refused(capsys, source, file, "file: must be a folder")
    assert_refused(capsys, source, file / "out", "file/out: Not a directory")
    full = tmp_path / "full"
    full.mkdir()
    (full / "model-00001-of-00003.safetensors").write_text("mine")
    message = r"full: must be empty, or left unfinished by an earlier run; it has 'model-00001-of-00003\.safetensors'"
    assert_refused(capsys, source, full, message)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert_refused(capsys, source, tmp_path / "new" / "out", r"new/out: needs 0\.0 MB of space, got 0\.0 MB")


def test_a_disk_that_is_full_while_writing(tmp_path):
    """The system refuses to write more than so many bytes to a file: to the second shard, which is the largest."""
    config = Config(layers=3)
    params = decoder.parameters(config)
    params["model.layers.1.mlp.down_proj.weight"] = params.pop("model.layers.1.mlp.down_proj.weight")
    write(tmp_path / "in", "llama", config)
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("in/*.safetensors")}
    largest = max(sizes, key=sizes.__getitem__)
    limit = max(size for name, size in sizes.items() if name != largest) + 100
    program = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); {PROGRAM}"
    command = [sys.executable, "-P", "-c", program, "rotate", tmp_path / "in", tmp_path / "out", "--model", "llama"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"jax-hadacore rotate: \S+out: File too large\n", done.stderr)
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert largest not in names
    assert not [name for name in names if name.endswith(".tmp") or name == "config.json"]


def test_a_file_that_ends_while_it_is_read(tmp_path, capsys, monkeypatch):
    write(tmp_path / "in", "llama", Config(), shards=1)
    opened = _checkpoint.open_file

    def shortened(path):
        found = opened(path)
        corrupt(path, cut=9000)
        return found

    monkeypatch.setattr(_checkpoint, "open_file", shortened)
    assert run(tmp_path / "in", tmp_path / "out") == 2
    assert re.search(r"in/model\.safetensors: ended early; it must not change", capsys.readouterr().err)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [STATE]
