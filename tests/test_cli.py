"""The command line: the check of this installation, the report on a file, and its errors."""

import contextlib
import importlib.util
import io
import re
import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import DTYPES
from safetensors.numpy import save_file

import jax_hadacore
from jax_hadacore import _cli, _ffi, _measure, _selfcheck, _survey


@pytest.fixture(scope="module")
def check():
    """The exit status and the report of the main job."""
    report = io.StringIO()
    with contextlib.redirect_stdout(report):
        status = _cli.main([])
    return status, report.getvalue()


def outlier_weights(shape, dtype, channels=4):
    generator = np.random.default_rng(0)
    x = generator.standard_normal(shape)
    x[..., generator.choice(shape[-1], channels, replace=False)] *= 50
    return x.astype(dtype)


def rows_of(report, name):
    """(shape, dtype, axis, peak before, after, int4 error before, after) of each line about a tensor."""
    number = r"([\d.]+)"
    pattern = rf"^  {re.escape(name)} +(\S+) +(\S+) +(\d+) +{number} -> +{number} +{number}% -> +{number}%$"
    return [(*row[:2], *map(float, row[2:])) for row in re.findall(pattern, report, re.MULTILINE)]


def test_check_passes_and_prints_every_section(check):
    status, report = check
    assert status == 0
    for text in (
        f"jax_hadacore {jax_hadacore.__version__}, jax {jax.__version__}",
        f"Default device: {jax.devices()[0].platform}",
        "Implementations",
        "Check against the definition",
        "Outliers, on a synthetic sample",
        "All checks passed.",
    ):
        assert text in report
    assert len(re.findall(r"^  (?:float32|bfloat16|float16) .* ok ", report, re.MULTILINE)) == 9
    assert max(map(len, report.splitlines())) <= 100


def test_check_shows_that_the_outliers_are_gone(check):
    (before, after) = re.findall(r"^  (?:before|after) +([\d.]+) +([\d.]+)%$", check[1], re.MULTILINE)
    assert float(before[0]) > 4 * float(after[0])
    assert float(before[1]) > 2 * float(after[1])


def test_check_fails_when_an_error_exceeds_the_bound(monkeypatch, capsys):
    monkeypatch.setattr(_selfcheck, "_LENGTHS", (16,))
    monkeypatch.setattr(_selfcheck, "_DTYPES", (jnp.float32,))
    monkeypatch.setattr(_selfcheck, "error_bound", lambda dtype, n: 0.5)
    monkeypatch.setattr(_selfcheck, "_hidden_gpu", lambda: "the hint")
    assert _cli.main([]) == 1
    report = capsys.readouterr().out
    assert "the hint" in report
    assert re.search(r"^  float32 +16 .* FAIL ", report, re.MULTILINE)
    assert "FAILED: in 1 of 2 checks the error exceeds what is allowed." in report


def test_check_says_why_a_kernel_does_not_serve(monkeypatch):
    monkeypatch.setattr(_ffi, "CPU", _ffi.NativeModule(None, "built without it"))
    monkeypatch.setattr(_ffi, "CUDA", _ffi.NativeModule(None, "failed to load"))
    assert dict(_selfcheck._implementations()) == {
        "cpu": "plain-JAX reference: built without it",
        "cuda": "plain-JAX reference: failed to load",
        "others": "plain-JAX reference",
    }


@pytest.mark.parametrize(
    ("setting", "plugin", "remedy"),
    [
        ("", None, "pip install 'jax_hadacore[cuda13]'"),
        ("", object(), "CUDA_VISIBLE_DEVICES"),
        ("cpu", None, "JAX_PLATFORMS is set to cpu"),
    ],
    ids=["no plugin", "plugin", "JAX_PLATFORMS"],
)
def test_a_gpu_that_jax_does_not_see(monkeypatch, setting, plugin, remedy):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: plugin if name.startswith("jax_cuda") else find_spec(name)
    )
    monkeypatch.setattr(_ffi, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(_selfcheck, "_nvidia_traces", lambda: True)
    monkeypatch.setenv("JAX_PLATFORMS", setting)
    hint = _selfcheck._hidden_gpu()
    assert hint.startswith("This machine seems to have an NVIDIA GPU, but JAX does not see it")
    assert remedy in hint
    monkeypatch.setattr(_selfcheck, "_nvidia_traces", lambda: False)
    assert _selfcheck._hidden_gpu() == ""


@pytest.mark.parametrize("n", [2, 4, 8, 64, 512])
def test_definition_is_the_sign_matrix(n):
    x = np.random.default_rng(n).standard_normal((3, n))
    np.testing.assert_allclose(_measure.definition(x), x @ _measure.sign_matrix(n) / np.sqrt(n), rtol=0, atol=1e-13)
    sign = [[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)]
    np.testing.assert_array_equal(_measure.sign_matrix(n), sign)


@pytest.mark.parametrize("n", [1, 128, 8192, 12, 768, 10944])
def test_definition_and_bound_are_those_of_the_tests(n):
    x = np.random.default_rng(n).standard_normal((3, n))
    np.testing.assert_allclose(_measure.definition(x), oracle.transform(x), rtol=0, atol=1e-13)
    for dtype in DTYPES:
        assert _measure.error_bound(dtype, n) == oracle.bound(dtype, n)


def test_spread_by_hand():
    # The first row is a peak of 7 among ones, exact in int4; of the second, 0.5 and -0.5 round to even: to zero.
    rows = np.array([[7, 1, -1, 1], [7, 0.5, -0.5, 7], [0, 0, 0, 0]], np.float32)
    before = _measure.rotate(rows).before
    assert before.peak == pytest.approx((7 / np.sqrt(13) + 7 / np.sqrt(24.625)) / 2)
    assert before.int4 == pytest.approx(np.sqrt(0.5 / (52 + 98.5)))


def test_rotation_in_chunks_is_the_same(monkeypatch):
    rows = outlier_weights((40, 64), np.float32)
    whole = _measure.rotate(rows)
    monkeypatch.setattr(_measure, "_CHUNK", 7 * 64)
    assert _measure.rotate(rows) == whole


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32, np.float64], ids=lambda d: np.dtype(d).name)
def test_safetensors(tmp_path, capsys, dtype):
    path = tmp_path / "model.safetensors"
    save_file({"down_proj.weight": outlier_weights((54, 1024), dtype)}, path)
    assert _cli.main([str(path)]) == 0
    report = capsys.readouterr().out
    ((shape, _, axis, peak, peak_after, int4, int4_after),) = rows_of(report, "down_proj.weight")
    assert (shape, axis) == ("54x1024", 1)
    assert peak > 3 * peak_after
    assert int4 > 2 * int4_after
    assert "54 = 3^3 * 2  1 axis" in report
    assert "All transforms agree with the definition" in report


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
def test_npy_of_every_axis_and_byte_order(tmp_path, capsys, dtype):
    path = tmp_path / "activations.npy"
    np.save(path, outlier_weights((4, 1, 6, 256), dtype))
    assert _cli.main([str(path)]) == 0
    rows = rows_of(capsys.readouterr().out, "activations")
    assert {row[2] for row in rows} == {0, 3}
    assert rows == sorted(rows, key=lambda row: -row[3])


def test_what_cannot_be_measured_is_listed(tmp_path, capsys):
    path = tmp_path / "mixed.safetensors"
    nan = np.ones((4, 8), np.float32)
    nan[2, 3] = np.nan
    tensors = {
        "nan": nan,
        "zeros": np.zeros((4, 8), np.float32),
        "huge": np.full((8,), 60000, np.float16),
        "int": np.ones((4, 8), np.int64),
        "bool": np.ones((8,), np.bool_),
        "fp8": np.ones((8,), jnp.float8_e4m3fn),
        "scalar": np.array(1, np.float32),
        "one": np.ones((1, 1), np.float32),
        "empty": np.ones((0, 8), np.float32),
        "odd": np.ones((6, 10), np.float32),
        "odd too": np.ones((6,), np.float32),
    }
    save_file(tensors, path)
    assert _cli.main([str(path)]) == 0
    report = capsys.readouterr().out
    assert "Nothing to rotate" in report
    for line in (
        r"6 = 3 \* 2 +2 axes",
        r"10 = 5 \* 2 +1 axis",
        r"values that are not finite +1 tensor +nan",
        r"only zeros +1 tensor +zeros",
        r"results beyond the range of float16 +1 tensor +huge",
        r"dtype I64 +1 tensor +int",
        r"dtype BOOL +1 tensor +bool",
        r"dtype F8_E4M3 +1 tensor +fp8",
        r"a single value +2 tensors +one, \.\.\.",
        r"empty +1 tensor +empty",
    ):
        assert re.search(rf"^  {line}$", report, re.MULTILINE)


def test_the_largest_peaks_are_printed_and_all_on_request(tmp_path, capsys):
    path = tmp_path / "many.safetensors"
    rows = {f"layer.{i}": np.linspace(1, 2 + i, 8, dtype=np.float32) for i in range(_survey.PRINTED_ROWS + 3)}
    rows["a.very.long.prefix.of.a.name." * 3 + "weight"] = np.eye(8, dtype=np.float32)[0]
    save_file(rows, path)
    assert _cli.main([str(path)]) == 0
    report = capsys.readouterr().out
    assert report.count(" -> ") == 2 * _survey.PRINTED_ROWS + 1
    assert "... and 4 lines with smaller peaks; --all prints them." in report
    assert re.search(r"^  a\.very\.long\..*\.\.\..*weight  8 ", report, re.MULTILINE)
    assert max(map(len, report.splitlines())) <= 100
    assert _cli.main([str(path), "--all"]) == 0
    assert capsys.readouterr().out.count(" -> ") == 2 * len(rows) + 1


def test_npy_does_not_keep_bfloat16(tmp_path, capsys):
    path = tmp_path / "x.npy"
    np.save(path, np.ones((4, 8), jnp.bfloat16))
    assert _cli.main([str(path)]) == 0
    assert "do not keep bfloat16: use .safetensors" in capsys.readouterr().out


def test_a_wrong_transform_is_a_failure(tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(8, dtype=np.float32))
    monkeypatch.setattr(_measure, "definition", lambda rows: rows[:, ::-1].astype(np.float64))
    assert _cli.main([str(path)]) == 1
    assert "FAILED: x, axis 0" in capsys.readouterr().out


def write_unreadable(folder):
    (folder / "text.txt").write_text("x")
    (folder / "junk.npy").write_bytes(b"junk")
    (folder / "junk.safetensors").write_bytes(b"\xff" * 100)
    np.save(folder / "object.npy", np.array([{}]), allow_pickle=True)
    (folder / "folder.npy").mkdir()
    np.save(folder / "whole.npy", np.ones(100))
    (folder / "cut.npy").write_bytes((folder / "whole.npy").read_bytes()[:-8])
    save_file({"x": np.ones(100)}, folder / "whole.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "whole.safetensors").read_bytes()[:-8])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.npy", "no such file"),
        ("text.txt", "expected a .safetensors or .npy file"),
        ("folder.npy", "expected a .safetensors or .npy file"),
        ("junk.npy", "not a readable .npy file"),
        ("cut.npy", "not a readable .npy file"),
        ("object.npy", "not a readable .npy file"),
        ("junk.safetensors", "not a readable .safetensors file"),
        ("cut.safetensors", "not a readable .safetensors file"),
    ],
)
def test_an_unreadable_file_is_one_line_and_status_2(tmp_path, capsys, name, reason):
    write_unreadable(tmp_path)
    assert _cli.main([str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"jax-hadacore: {tmp_path / name}: {reason}")
    assert err.count("\n") == 1


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        _cli.main(["--version"])
    assert capsys.readouterr().out == f"jax-hadacore {jax_hadacore.__version__}\n"


def test_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jax_hadacore", "absent.npy"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("jax_hadacore", run_name="__main__")
    assert "absent.npy: no such file" in capsys.readouterr().err
