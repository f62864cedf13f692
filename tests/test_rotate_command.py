"""`jax-hadacore rotate`: checkpoints whose logits stay, what it records and reports, and its arguments."""

import importlib.util
import io
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import decoder
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder import Config, Online
from rotating import assert_refused, contents, deviation, load, run, write

from jax_hadacore import CONVENTION
from jax_hadacore.rotations import _checkpoint, load_rotations, plans, rotate

pytestmark = pytest.mark.usefixtures("x64_off", "usual_promotion")

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
