"""Runs of `jax-hadacore rotate` that are killed, interrupted and resumed, beside each other, and in little memory."""

import dataclasses
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import decoder
import jax.numpy as jnp
import pytest
from decoder import Config
from rotating import STATE, contents, run, start, write

from jax_hadacore.rotations import _checkpoint

pytestmark = pytest.mark.usefixtures("x64_off", "usual_promotion")


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
