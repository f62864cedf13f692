"""`jax-hadacore rotate`: checkpoints whose logits stay, runs that are killed and resumed, memory, and every error."""

import dataclasses
import fcntl
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import checkpoints
import decoder
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder import Config, Online
from safetensors import safe_open
from safetensors.numpy import save_file

from jax_hadacore import CONVENTION, _cli
from jax_hadacore.rotations import _checkpoint, load_rotations, plans, rotate

pytestmark = pytest.mark.usefixtures("x64_off", "usual_promotion")

STATE = "jax_hadacore.unfinished"
TOKENS = np.array([3, 1, 4, 1, 5, 9, 2, 6])
# Each case: --model, model_type, and the decoder.
CASES = {
    "llama": ("llama", "llama", Config()),
    "mistral, tied": ("llama", "mistral", Config(tied=True)),
    "qwen2": ("qwen2", "qwen2", Config(bias=True)),
    "qwen2, tied": ("qwen2", "qwen2", Config(bias=True, tied=True)),
    "qwen3": ("qwen3", "qwen3", Config(qk_norm=True)),
    "qwen3, moe": ("qwen3", "qwen3_moe", Config(qk_norm=True, experts=4)),
    "gemma3": ("gemma3", "gemma3_text", Config(qk_norm=True, offset=1.0, post_norms=True, tied=True)),
}


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


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_the_unchanged_loader_gives_the_same_logits(tmp_path, capsys, name, shards):
    model, model_type, config = CASES[name]
    params = write(tmp_path / "in", model_type, config, shards=shards)
    before = contents(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out", model=model) == 0
    after, rotated = contents(tmp_path / "out"), load(tmp_path / "out")
    assert contents(tmp_path / "in") == before
    assert after.keys() == before.keys()
    assert deviation(config, params, rotated) < 5e-6
    for path in "model.layers.1.self_attn.v_proj.weight", "model.layers.0.self_attn.o_proj.weight":
        assert not np.allclose(rotated[path], params[path], atol=0.1)
    for carried in "generation_config.json", "tokenizer.model":
        assert after[carried] == before[carried]
    untied = config.tied and name != "gemma3"
    assert rotated.keys() - params.keys() == ({"lm_head.weight"} if untied else set())
    old, new = (json.loads(files["config.json"]) for files in (before, after))
    assert new.pop("jax_hadacore")["online"] == []
    assert new == {**old, "tie_word_embeddings": config.tied and not untied}
    if shards > 1:
        totals = json.loads(after["model.safetensors.index.json"])["metadata"]
        new_parameters = config.vocab * config.hidden if untied else 0
        assert totals == {
            "total_parameters": 7 + new_parameters,
            "total_size": sum(x.nbytes for x in rotated.values()),
        }
    report = capsys.readouterr().out
    assert (": 1 shard," if shards == 1 else f": {shards} shards,") in report
    assert re.search(rf"rotated +\d+  tensors: {'R2' if name == 'gemma3' else 'R1'} ", report)
    assert ("untied " in report) == untied
    assert re.search(r"carried +2  other files: generation_config.json, tokenizer.model\n", report)
    assert max(map(len, report.replace(str(tmp_path), "").splitlines())) <= 100


@pytest.mark.parametrize("piece", [1, 100, 1 << 22])
@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32], ids=lambda t: np.dtype(t).name)
def test_each_tensor_is_that_of_rotate(tmp_path, monkeypatch, dtype, piece):
    config = Config(bias=True, tied=True)
    params = write(tmp_path / "in", "qwen2", config, dtype=dtype)
    monkeypatch.setattr(_checkpoint, "_PIECE", piece)
    assert run(tmp_path / "in", tmp_path / "out", "--r4", model="qwen2") == 0
    rotations = load_rotations(tmp_path / "out")
    plan = plans.qwen2(naming="hf", rotations=["R1", "R2", "R4"], tied="untie", head_dim=config.head_dim)
    expected = rotate(params, plan, rotations)
    written = load(tmp_path / "out")
    assert written.keys() == expected.keys()
    for name, x in written.items():
        assert x.dtype == dtype
        np.testing.assert_array_equal(x, expected[name], err_msg=name)


def test_r4_is_recorded_and_needs_an_online_transform(tmp_path, capsys):
    config = Config()
    params = write(tmp_path / "in", "llama", config)
    assert run(tmp_path / "in", tmp_path / "out", "--r4") == 0
    report = capsys.readouterr().out
    assert re.search(r"R4 needs an online transform: .* of 20 elements,\nin CONVENTION 1\. Without it the", report)
    recorded = json.loads((tmp_path / "out" / "config.json").read_text())["jax_hadacore"]
    assert recorded["convention"] == CONVENTION
    assert recorded["online"] == ["R4"]
    assert recorded["rotations"]["R4"] == {"size": 20, "signs": None}
    rotated = load(tmp_path / "out")
    assert deviation(config, params, rotated) > 0.05
    p = decoder.matrix(load_rotations(tmp_path / "out")["R4"])
    assert deviation(config, params, rotated, Online(hidden=lambda x: x @ p)) < 5e-6


def test_signs_are_recorded(tmp_path):
    config = Config(hidden=20, layers=11)  # 20 bits do not fill their bytes
    params = write(tmp_path / "in", "llama", config)
    for out, options in {"zero": [], "again": [], "seven": ["--seed", "7"]}.items():
        assert run(tmp_path / "in", tmp_path / out, *options) == 0
    assert contents(tmp_path / "zero") == contents(tmp_path / "again")
    drawn = plans.llama(naming="hf", head_dim=8).init(jax.random.key(7), params)
    recorded = json.loads((tmp_path / "seven" / "config.json").read_text())["jax_hadacore"]
    assert recorded["seed"] == 7
    digits = recorded["rotations"]["R1"]["signs"]
    bits = f"{int(digits, 16):0{4 * len(digits)}b}"
    np.testing.assert_array_equal([-1 if bit == "1" else 1 for bit in bits[:20]], drawn["R1"].signs)
    rotations = load_rotations(tmp_path / "seven")
    assert rotations.keys() == drawn.keys()
    for name, rotation in rotations.items():
        np.testing.assert_array_equal(rotation.signs, drawn[name].signs)
    assert not np.array_equal(load_rotations(tmp_path / "zero")["R1"].signs, drawn["R1"].signs)


def test_errors_of_load_rotations(tmp_path):
    write(tmp_path / "in", "llama", Config())
    with pytest.raises(ValueError, match=r"in/config.json must have the key 'jax_hadacore', which jax-hadacore rotate"):
        load_rotations(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out") == 0
    path = tmp_path / "out" / "config.json"
    path.write_text(path.read_text().replace('"convention": 1', '"convention": 2'))
    with pytest.raises(ValueError, match="must have the convention 1, got 2"):
        load_rotations(tmp_path / "out")


def test_what_is_no_weight_of_the_plan(tmp_path, capsys):
    """Constants of old checkpoints and integers are copied; files of other formats and folders stay."""
    config = Config()
    constants = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.linspace(0, 1, 5, dtype=np.float32),
        "model.position_ids": np.arange(7)[None],
        "model.scalar": np.array(True),
        "model.empty": np.ones((0, 3), np.int8),
    }
    write(tmp_path / "in", "llama", config, params=decoder.parameters(config) | constants)
    (tmp_path / "in" / "pytorch_model.bin").write_text("x")
    (tmp_path / "in" / ".gitattributes").write_text("x")
    (tmp_path / "in" / "original").mkdir()
    assert run(tmp_path / "in", tmp_path / "out") == 0
    written = load(tmp_path / "out")
    for name, x in constants.items():
        assert written[name].dtype == x.dtype
        np.testing.assert_array_equal(written[name], x)
    report = capsys.readouterr().out
    assert re.search(r"left out +3  files and folders: \.gitattributes, original, pytorch_model\.bin\n", report)
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_a_tied_head_that_is_stored_too(tmp_path, capsys):
    config = Config(tied=True)
    params = decoder.parameters(config)
    same = {**params, "lm_head.weight": params["model.embed_tokens.weight"].copy()}
    write(tmp_path / "same", "llama", config, params=same)
    assert run(tmp_path / "same", tmp_path / "out") == 0
    assert "untied " in capsys.readouterr().out
    assert deviation(config, params, load(tmp_path / "out")) < 5e-6
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    same["lm_head.weight"][-1, -1] += 1
    write(tmp_path / "other", "llama", config, params=same)
    assert_refused(
        capsys, tmp_path / "other", tmp_path / "new", r"config\.json: has tie_word_embeddings, but lm_head\.weight is"
    )


PROGRAM = "import sys; from jax_hadacore._cli import main; sys.exit(main(sys.argv[1:]))"


def start(source, out, *options):
    command = [sys.executable, "-P", "-c", PROGRAM, "rotate", source, out, "--model", "llama", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_run_is_resumed(tmp_path):
    config = Config(hidden=256, inner=1024, heads=8, head_dim=32, layers=12)
    write(tmp_path / "in", "llama", config, shards=12)
    process = start(tmp_path / "in", tmp_path / "out")
    while not list(tmp_path.glob("out/*.safetensors")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    complete = {path: path.stat().st_ino for path in tmp_path.glob("out/*.safetensors")}
    assert 1 <= len(complete) < 12
    early = {path.name: path.read_bytes() for path in complete}
    assert not (tmp_path / "out" / "config.json").exists()  # nothing loads this
    resumed = start(tmp_path / "in", tmp_path / "out")
    report, errors = resumed.communicate()
    assert (resumed.returncode, errors) == (0, "")
    assert re.search(rf"kept +{len(complete)}  shards of an earlier run", report)
    assert {path: path.stat().st_ino for path in complete} == complete
    whole = start(tmp_path / "in", tmp_path / "whole")
    assert "kept" not in whole.communicate()[0]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert early.items() <= contents(tmp_path / "whole").items()


@pytest.fixture
def interrupted(tmp_path, monkeypatch, capsys):
    """A checkpoint in `in`, and in `out` a run of which Ctrl-C left two shards of three."""
    write(tmp_path / "in", "llama", Config())
    written = _checkpoint.Task._write

    def interrupt(self, file, name):
        if name == "model.layers.1.mlp.gate_proj.weight":  # in the last shard
            raise KeyboardInterrupt
        return written(self, file, name)

    with monkeypatch.context() as patch:
        patch.setattr(_checkpoint.Task, "_write", interrupt)
        assert run(tmp_path / "in", tmp_path / "out") == 130
    assert capsys.readouterr().err == "jax-hadacore rotate: interrupted; the same command continues\n"
    assert sorted(contents(tmp_path / "out")) == [
        STATE,
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
    ]
    return tmp_path


def test_an_interrupted_run_leaves_complete_shards_and_continues(interrupted):
    shard = interrupted / "out" / "model-00001-of-00003.safetensors"
    (interrupted / "out" / "model-00003-of-00003.safetensors.tmp").write_text("of a run that was killed")
    shard.write_bytes(shard.read_bytes()[:-1])  # no run of the command leaves this
    assert run(interrupted / "in", interrupted / "out") == 0
    assert run(interrupted / "in", interrupted / "whole") == 0
    assert contents(interrupted / "out") == contents(interrupted / "whole")


@pytest.mark.parametrize("change", ["seed", "r4", "mtime", "config", "index", "state"])
def test_shards_of_another_request_are_not_used(interrupted, capsys, change):
    source, out = interrupted / "in", interrupted / "out"
    options = {"seed": ["--seed", "1"], "r4": ["--r4"]}.get(change, [])
    if change == "mtime":
        os.utime(source / "model-00003-of-00003.safetensors", (1, 1))
    elif change == "state":
        (out / STATE).write_text("")
    elif change not in ("seed", "r4"):
        path = source / {"config": "config.json", "index": "model.safetensors.index.json"}[change]
        path.write_text(json.dumps({**json.loads(path.read_text()), "new": 1}))
    before = contents(out)
    assert run(source, out, *options) == 2
    assert re.fullmatch(
        r"jax-hadacore rotate: \S+/out: was left unfinished by a run with another .*\n", capsys.readouterr().err
    )
    assert contents(out) == before


def test_two_runs_at_once(interrupted, capsys):
    with (interrupted / "out" / STATE).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run(interrupted / "in", interrupted / "out") == 2
    assert capsys.readouterr().err.endswith("out: another process is writing it\n")
    assert run(interrupted / "in", interrupted / "out") == 0


def test_a_claim_without_a_shard_is_anyones(tmp_path):
    write(tmp_path / "in", "llama", Config())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / STATE).write_text("another request")
    assert run(tmp_path / "in", tmp_path / "out") == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_peak_memory_is_below_twice_the_largest_shard(tmp_path):
    config = Config(vocab=16384, hidden=1024, inner=2048, heads=16, kv_heads=4, head_dim=64, layers=8)
    params = {name: x.astype(jnp.bfloat16) for name, x in decoder.parameters(config).items()}
    params["lm_head.weight"] = params.pop("lm_head.weight")  # the last, far from the embedding
    write(tmp_path / "in", "llama", config, shards=4, params=params)
    write(tmp_path / "small", "llama", dataclasses.replace(config, vocab=40, layers=1), dtype=jnp.bfloat16)
    program = """
        import re, sys
        from pathlib import Path
        from jax_hadacore._cli import main

        def memory(kind):
            return 1024 * int(re.search(rf"{kind}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

        def rotate(name):
            assert main(["rotate", f"{sys.argv[1]}/{name}", f"{sys.argv[1]}/{name}-out", "--model", "llama"]) == 0

        rotate("small")
        before = memory("VmRSS")  # what Python, JAX and its compiler need
        rotate("in")
        print(memory("VmHWM") - before, file=sys.stderr)
    """
    command = [sys.executable, "-P", "-c", textwrap.dedent(program), tmp_path]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stderr)
    largest = max(path.stat().st_size for path in tmp_path.glob("in/*.safetensors"))
    assert sum(x.nbytes for x in params.values()) > 2.5 * largest
    assert peak < 2 * largest


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


@pytest.mark.parametrize("seed", ["-1", "4294967296", "x", "1.5"])
def test_arguments(capsys, seed):
    with pytest.raises(SystemExit, match="2"):
        run(Path("in"), Path("out"), f"--seed={seed}")
    assert f"expected a number from 0 to 2^32 - 1, got '{seed}'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(Path("in"), Path("out"), model="gpt2")
    assert "invalid choice: 'gpt2'" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal(tmp_path, monkeypatch):
    write(tmp_path / "in", "llama", Config())
    find_spec = importlib.util.find_spec
    for has_rich in True, False:
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            patch.setenv("TERM", "xterm")
            if not has_rich:
                patch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find_spec(name))
            assert run(tmp_path / "in", tmp_path / f"out{has_rich}") == 0
        shown = terminal.getvalue()
        assert "model-00003-of-00003.safetensors" in shown
        assert ("\x1b[" in shown) == has_rich
    assert re.fullmatch(r"(( 0| 3\d| 6\d|.*)% model-0000\d-of-00003\.safetensors\n){3}", shown)


def test_is_quiet_elsewhere(tmp_path, capsys):
    write(tmp_path / "in", "llama", Config())
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert capsys.readouterr().err == ""


def test_imports_neither_flax_nor_the_benchmark():
    program = """
        import sys
        from jax_hadacore._cli import main
        assert main(["rotate", "absent", "out", "--model", "llama"]) == 2
        assert not {"flax", "optax", "rich", "torch", "safetensors.torch"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-P", "-c", textwrap.dedent(program)], check=True)
